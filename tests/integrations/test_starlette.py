"""The integrations with Starlette and FastAPI, in a real application."""

import asyncio
import contextlib
import threading

import pytest
from requirements import need
from work import forever

from bgtasks import BackgroundExecutor, BackgroundTaskManager, InvalidOptionError, ManagerClosedError, NoManagerError

starlette = need("starlette")
fastapi = need("fastapi")
need("httpx2")

from starlette.applications import Starlette  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.middleware.base import BaseHTTPMiddleware  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402
from starlette.routing import Mount, Route, WebSocketRoute  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from bgtasks.integrations import fastapi as for_fastapi  # noqa: E402
from bgtasks.integrations.starlette import lifespan, task_manager  # noqa: E402


@pytest.fixture
def events():
    """Give a list that records events in order."""
    return []


@pytest.fixture
def inner(events):
    """Give a user's lifespan with a resource and its own state."""

    @contextlib.asynccontextmanager
    async def lifespan_of_the_user(app):
        events.append("opens")
        # The manager is there from the beginning.
        app.state.task_manager.create_task(forever(), name="service")
        try:
            yield {"pool": "pool"}
        finally:
            events.append(f"closes, {app.state.task_manager.get_task_count()} tasks")

    return lifespan_of_the_user


def test_work_outlives_its_request_and_ends_before_the_resources(events, inner):
    """A task runs on after the response of its request; all tasks end before the resources close."""

    async def work(pool, gate):
        await gate.wait()
        events.append(f"work ends, {pool}")

    async def start(request):
        request.app.state.gate = asyncio.Event()
        task_manager(request).create_task(work(request.state.pool, request.app.state.gate), name="work")
        return PlainTextResponse("started")

    async def finish(request):
        events.append(f"{request.app.state.task_manager.get_task_count()} tasks")
        request.app.state.gate.set()
        return PlainTextResponse("finished")

    app = Starlette(
        routes=[Route("/start", start), Route("/finish", finish)],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=lambda request, call_next: call_next(request))],
        lifespan=lifespan(inner, drain_timeout=0.01),
    )
    for _ in range(2):
        with TestClient(app) as client:
            assert client.get("/start").text == "started"
            assert client.get("/finish").text == "finished"
        assert events == ["opens", "2 tasks", "work ends, pool", "closes, 0 tasks"]
        events.clear()


def test_unfinished_tasks_are_named(inner, caplog):
    """The log names the tasks that did not finish within the drain timeout."""
    app = Starlette(lifespan=lifespan(inner, drain_timeout=0.0))
    with TestClient(app):
        pass
    assert "Shutdown cancelled 1 of 1 background task: service (1)" in caplog.text


def test_a_straggler_is_named_once(caplog):
    """With a lifespan inside the manager is shut down before that ends; nothing is said a second time afterwards."""
    release = []

    async def stubborn():
        while not release:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.001)

    @contextlib.asynccontextmanager
    async def own(app):
        app.state.task_manager.create_task(stubborn(), name="stubborn")
        await asyncio.sleep(0)
        yield
        release.append("now")

    app = Starlette(lifespan=lifespan(own, drain_timeout=0.0, default_shutdown_timeout=0.01))
    with TestClient(app):
        pass
    (named,) = [record.getMessage() for record in caplog.records if "stubborn" in record.getMessage()]
    assert named.startswith("Background task 'stubborn' still runs at the end of shutdown, at ")


def test_functions_of_an_executor_do_not_use_the_threads_of_the_framework():
    """Sync endpoints answer while a thousand functions hang in an executor."""
    gate = threading.Event()

    def endpoint(request):
        return PlainTextResponse(threading.current_thread().name)

    app = Starlette(routes=[Route("/", endpoint)], lifespan=lifespan())
    with TestClient(app) as client, BackgroundExecutor(max_concurrency=50, manager=app.state.task_manager) as submit:
        futures = [submit(gate.wait, 30) for _ in range(1000)]
        names = {client.get("/").text for _ in range(100)}
        assert not any(future.done() for future in futures)
        gate.set()
    assert not any(name.startswith("bgtasks") for name in names)
    assert all(future.result() for future in futures)


def test_mounted_applications_and_websockets_find_the_manager():
    """They get the manager of the outer application."""
    found = []

    async def endpoint(request):
        found.append(task_manager(request))
        return PlainTextResponse("")

    async def websocket(connection):
        found.append(task_manager(connection))
        await connection.accept()
        await connection.close()

    mounted = Starlette(routes=[Route("/", endpoint)])
    app = Starlette(routes=[Mount("/mounted", mounted), WebSocketRoute("/ws", websocket)], lifespan=lifespan())
    with TestClient(app) as client:
        client.get("/mounted/")
        with client.websocket_connect("/ws"):
            pass
    assert found == [app.state.task_manager] * 2
    assert isinstance(found[0], BackgroundTaskManager)


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_lifespan_that_raises_does_not_keep_the_manager_open(where, caplog):
    """Whether the user's lifespan raises when it opens or closes, the manager is shut down and the error is raised."""

    @contextlib.asynccontextmanager
    async def raising(app):
        app.state.task_manager.create_task(forever(), name="service")
        await asyncio.sleep(0)
        if where == "before":
            raise ValueError("the user's part")
        yield
        raise ValueError("the user's part")

    app = Starlette(lifespan=lifespan(raising, drain_timeout=0.0))
    with pytest.raises(ValueError, match="the user's part"), TestClient(app):
        pass
    assert app.state.task_manager.get_task_count() == 0
    assert app.state.task_manager._shutdown.phase == "closed"
    assert "service (1)" in caplog.text


def test_new_work_is_refused_at_the_end():
    """While the manager drains, it refuses tasks from outside."""
    refused = []

    @contextlib.asynccontextmanager
    async def with_resource(app):
        yield
        coro = forever()
        with pytest.raises(ManagerClosedError):
            app.state.task_manager.create_task(coro)
        refused.append(coro)

    with TestClient(Starlette(lifespan=lifespan(with_resource))):
        pass
    assert len(refused) == 1


def test_without_the_lifespan_the_error_says_what_to_do():
    """The error of an application that was not started, or has no manager, shows the missing line."""

    async def endpoint(request):
        return PlainTextResponse(str(task_manager(request)))

    client = TestClient(Starlette(routes=[Route("/", endpoint)], lifespan=lifespan()))
    with pytest.raises(NoManagerError, match="with TestClient"):
        client.get("/")


async def generator(app):
    """Be a lifespan without its decorator."""
    yield


@pytest.mark.parametrize("wrong", [generator, "lifespan"])
def test_refuses_a_wrong_lifespan(wrong):
    """The error comes when the application is made."""
    with pytest.raises(InvalidOptionError, match="asynccontextmanager"):
        lifespan(wrong)


def test_refuses_options_outside_their_values():
    """The error comes when the application is made, not when it ends."""
    with pytest.raises(InvalidOptionError, match="drain_timeout"):
        lifespan(drain_timeout=-1)


def test_fastapi_passes_the_manager_to_path_operations(events, inner):
    """The dependency gives the application's manager; its tasks outlive the request's own dependencies."""
    app = fastapi.FastAPI(lifespan=for_fastapi.lifespan(inner, drain_timeout=0.01))

    async def session():
        events.append("session opens")
        yield
        events.append("session closes")

    async def work(gate):
        await gate.wait()
        events.append("work ends")

    @app.post("/start", dependencies=[fastapi.Depends(session)])
    async def start(tasks: for_fastapi.TaskManagerDep) -> int:
        app.state.gate = asyncio.Event()
        tasks.create_task(work(app.state.gate), name="work")
        return tasks.get_task_count()

    @app.post("/finish")
    async def finish(tasks: for_fastapi.TaskManagerDep) -> int:
        app.state.gate.set()
        return tasks.get_task_count()

    @app.websocket("/ws")
    async def websocket(connection: fastapi.WebSocket, tasks: for_fastapi.TaskManagerDep) -> None:
        await connection.accept()
        await connection.send_json(tasks.get_task_count())
        await connection.close()

    with TestClient(app) as client:
        assert client.post("/start").json() == 2
        with client.websocket_connect("/ws") as connection:
            assert connection.receive_json() == 2
        assert client.post("/finish").json() == 2
    assert events == ["opens", "session opens", "session closes", "work ends", "closes, 0 tasks"]
    assert "tasks" not in str(app.openapi()["paths"]["/start"].get("parameters"))
