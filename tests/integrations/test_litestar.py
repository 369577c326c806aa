"""The integration with Litestar, in a real application."""

import asyncio
import contextlib

import pytest
from requirements import need
from work import after, forever

from bgtasks import BackgroundTaskManager, InvalidOptionError, NoManagerError

need("httpx")
need("litestar")
need("litestar.testing")

from litestar import Litestar, get  # noqa: E402
from litestar.di import NamedDependency, Provide  # noqa: E402
from litestar.testing import TestClient  # noqa: E402

from bgtasks.integrations.litestar import lifespan, task_manager  # noqa: E402

TASKS = {"tasks": Provide(task_manager, sync_to_thread=False)}


def application(events, gate, **options):
    """Return an application with a resource, a manager and a handler that starts a task."""

    @contextlib.asynccontextmanager
    async def resource(app):
        events.append("opens")
        yield
        events.append(f"closes, {app.state.task_manager.get_task_count()} tasks")

    @get("/start")
    async def start(tasks: NamedDependency[BackgroundTaskManager]) -> int:
        tasks.create_task(after(gate), name="work")
        return tasks.get_task_count()

    @get("/finish")
    async def finish() -> None:
        gate.set()

    return Litestar([start, finish], lifespan=[resource, lifespan(**options)], dependencies=TASKS, logging_config=None)


def test_work_outlives_its_request_and_ends_before_the_resources():
    """A task started in a request runs on after the response, and ends before the resource closes."""
    events = []
    app = application(events, asyncio.Event())
    with TestClient(app) as client:
        assert client.get("/start").json() == 1
        assert client.get("/start").json() == 2
        client.get("/finish")
    assert events == ["opens", "closes, 0 tasks"]
    assert app.state.task_manager.stats()["completed"] == 2


def test_unfinished_tasks_are_named(caplog):
    """The log names the tasks that did not finish within the drain timeout."""
    caplog.set_level("WARNING", logger="bgtasks")
    app = application([], asyncio.Event(), drain_timeout=0.0)
    with TestClient(app) as client:
        client.get("/start")
    assert app.state.task_manager.stats()["cancelled"] == 1
    assert "Shutdown cancelled 1 of 1 background task: work (1)" in caplog.text


@pytest.mark.parametrize("where", ["before", "after"])
async def test_a_lifespan_that_raises_does_not_keep_the_manager_open(where):
    """The manager is shut down whether the user's lifespan raises when it opens or when it closes."""

    @contextlib.asynccontextmanager
    async def raising(app):
        app.state.task_manager.create_task(forever())
        if where == "before":
            raise ValueError("the user's part")
        yield
        raise ValueError("the user's part")

    app = Litestar([], lifespan=[lifespan(drain_timeout=0.0), raising], logging_config=None)
    # The task group of Litestar's event emitter wraps the error.
    with pytest.raises(ExceptionGroup) as caught:
        async with app.lifespan():
            pass
    assert [str(error) for error in caught.value.exceptions] == ["the user's part"]
    assert app.state.task_manager._shutdown.phase == "closed"
    assert app.state.task_manager.get_task_count() == 0


def test_without_the_lifespan_the_error_says_what_to_do():
    """The error of an application without a manager shows the missing line."""
    with pytest.raises(NoManagerError, match="lifespan"):
        task_manager(Litestar([]).state)


def test_refuses_options_outside_their_values():
    """The error comes when the application is made."""
    with pytest.raises(InvalidOptionError, match="history"):
        lifespan(history=-1)
