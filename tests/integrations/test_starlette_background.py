"""Starlette's and FastAPI's background tasks on the manager of the application."""

import asyncio
import contextvars
import logging
import threading

import pytest
from requirements import need
from work import wait_until

from bgtasks import BackgroundTaskManager, InvalidOptionError

need("starlette")
fastapi = need("fastapi")
need("httpx2")

from starlette.applications import Starlette  # noqa: E402
from starlette.background import BackgroundTask  # noqa: E402
from starlette.background import BackgroundTasks as StarletteBackgroundTasks  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.middleware.base import BaseHTTPMiddleware  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402
from starlette.routing import Mount, Route  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from bgtasks.integrations.fastapi import BackgroundTasksDep  # noqa: E402
from bgtasks.integrations.starlette import (  # noqa: E402
    BackgroundTasks,
    install,
    lifespan,
    task_manager,
    uninstall,
)


@pytest.fixture
def installed():
    """Install without arguments for the time of a test."""
    install()
    yield
    uninstall()


def app_of(endpoint, **options):
    """Return an application with one endpoint and a manager."""
    return Starlette(routes=[Route("/", endpoint)], lifespan=lifespan(drain_timeout=5.0), **options)


@pytest.mark.usefixtures("installed")
def test_tasks_run_on_the_manager_of_the_application():
    """After the response, with a name, in order; plain functions in threads."""
    seen = []
    may_go = threading.Event()

    async def first():
        await asyncio.to_thread(may_go.wait, 10)
        seen.append("first")

    def second(text, *, more):
        seen.append((text, more, threading.current_thread() is threading.main_thread()))

    async def endpoint(request):
        tasks = StarletteBackgroundTasks([BackgroundTask(first)])
        tasks.add_task(second, "second", more=2)
        return PlainTextResponse("sent", background=tasks)

    app = app_of(endpoint)
    with TestClient(app) as client:
        assert client.get("/").text == "sent"
        assert seen == []
        manager = app.state.task_manager
        (info,) = manager.get_task_info()
        assert info["name"].endswith("first, " + info["name"].rpartition(", ")[2])
        assert info["name"].endswith("second")
        may_go.set()
    assert seen == ["first", ("second", 2, False)]
    assert manager.stats()["completed"] == 1


@pytest.mark.usefixtures("installed")
def test_a_failure_is_logged_once(caplog):
    """The request does not fail, and the next function does not run."""
    seen = []

    async def fail():
        raise ValueError("down")

    async def endpoint(request):
        tasks = StarletteBackgroundTasks([BackgroundTask(fail), BackgroundTask(seen.append, 1)])
        return PlainTextResponse("sent", background=tasks)

    app = app_of(endpoint)
    with TestClient(app) as client:
        assert client.get("/").status_code == 200
        assert wait_until(lambda: app.state.task_manager.stats()["failed"] == 1)
    assert [record.levelno for record in caplog.records if record.levelno >= logging.WARNING] == [logging.ERROR]
    assert "ValueError: down" in caplog.text
    assert seen == []


@pytest.mark.usefixtures("installed")
def test_middleware_does_not_hold_the_tasks():
    """``BaseHTTPMiddleware`` awaits the background of its response; the request ends all the same."""
    may_go = threading.Event()
    seen = []

    class Passing(BaseHTTPMiddleware):
        async def dispatch(self, request, call_next):
            return await call_next(request)

    async def work():
        await asyncio.to_thread(may_go.wait, 10)
        seen.append(1)

    async def endpoint(request):
        return PlainTextResponse("sent", background=BackgroundTask(work))

    with TestClient(app_of(endpoint, middleware=[Middleware(Passing)])) as client:
        assert client.get("/").text == "sent"
        assert seen == []
        may_go.set()
    assert seen == [1]


@pytest.mark.usefixtures("installed")
def test_fastapi_follows():
    """Its ``BackgroundTasks`` are Starlette's; so do mounted applications."""
    seen = []
    app = fastapi.FastAPI(lifespan=lifespan(drain_timeout=5.0))
    inner = fastapi.FastAPI()
    variable = contextvars.ContextVar("variable", default="")

    async def slow(variable):
        await asyncio.sleep(0.05)
        seen.append(variable.get())

    @inner.post("/")
    async def post(tasks: fastapi.BackgroundTasks):
        variable.set("of the request")
        tasks.add_task(slow, variable)
        tasks.add_task(seen.append, "second")
        return {}

    app.mount("/inner", inner)
    with TestClient(app) as client:
        assert client.post("/inner/").status_code == 200
        assert wait_until(lambda: app.state.task_manager.stats()["completed"] == 1)
    assert seen == ["of the request", "second"]


def test_waiting_requests_raise_failures():
    """With ``wait=True``, for tests."""
    seen = []

    async def fail():
        await asyncio.sleep(0.01)
        seen.append(1)
        raise ValueError("down")

    async def endpoint(request):
        return PlainTextResponse("sent", background=BackgroundTask(fail))

    install(wait=True)
    try:
        with TestClient(app_of(endpoint)) as client, pytest.raises(ValueError, match="down"):
            client.get("/")
    finally:
        uninstall()
    assert seen == [1]


def test_without_a_manager_nothing_changes(installed):
    """An application without ``lifespan()`` runs its tasks in the request, or on the manager of ``install``."""
    seen = []

    async def endpoint(request):
        return PlainTextResponse("sent", background=BackgroundTask(seen.append, 1))

    app = Starlette(routes=[Route("/", endpoint)])
    TestClient(app).get("/")
    assert seen == [1]
    manager = BackgroundTaskManager()
    install(manager=manager, wait=True)
    TestClient(app).get("/")
    assert (seen, manager.stats()["completed"]) == ([1, 1], 1)


def test_what_the_manager_refuses_runs_in_the_request(installed):
    """Nothing is lost."""
    seen = []

    async def endpoint(request):
        return PlainTextResponse("sent", background=BackgroundTask(seen.append, 1))

    manager = BackgroundTaskManager()
    asyncio.run(manager.shutdown())
    install(manager=manager)
    TestClient(Starlette(routes=[Route("/", endpoint)])).get("/")
    assert seen == [1]


def test_uninstall_puts_everything_back():
    """Also after two calls of ``install``."""
    before = (Starlette.__call__, BackgroundTask.__call__, StarletteBackgroundTasks.__call__)
    install()
    install(wait=True)
    assert (Starlette.__call__, BackgroundTask.__call__, StarletteBackgroundTasks.__call__) != before
    uninstall()
    uninstall()
    assert (Starlette.__call__, BackgroundTask.__call__, StarletteBackgroundTasks.__call__) == before


def test_own_background_tasks():
    """Without ``install``: as the background of a response, and as a dependency of FastAPI."""
    seen = []
    may_go = threading.Event()

    async def work(number):
        await asyncio.to_thread(may_go.wait, 10)
        seen.append(number)

    async def endpoint(request):
        tasks = BackgroundTasks(task_manager(request))
        tasks.add_task(work, 1)
        tasks.add_task(seen.append, 2)
        return PlainTextResponse("sent", 202, background=tasks)

    app = fastapi.FastAPI(lifespan=lifespan(drain_timeout=5.0), routes=[Mount("/old", routes=[Route("/", endpoint)])])

    @app.post("/", status_code=202)
    async def post(tasks: BackgroundTasksDep):
        tasks.add_task(work, 3)
        return {}

    with TestClient(app) as client:
        assert (client.get("/old/").status_code, client.post("/").status_code, seen) == (202, 202, [])
        may_go.set()
    assert sorted(seen) == [1, 2, 3]
    assert app.state.task_manager.stats()["completed"] == 2


def test_wrong_arguments_are_refused():
    """Nothing is installed."""
    with pytest.raises(InvalidOptionError, match="manager must be"):
        install(manager=5)
    with pytest.raises(InvalidOptionError, match="manager must be"):
        BackgroundTasks(None)
    assert BackgroundTask.__call__.__module__ == "starlette.background"
