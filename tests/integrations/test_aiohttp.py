"""The integration with aiohttp, in a real server on the loopback address."""

import asyncio

import pytest
from requirements import need
from work import after, forever

from bgtasks import InvalidOptionError, NoManagerError

need("aiohttp")

from aiohttp import web  # noqa: E402
from aiohttp.test_utils import TestClient, TestServer  # noqa: E402

from bgtasks.integrations.aiohttp import TASK_MANAGER, cleanup_context, task_manager  # noqa: E402

GATE = web.AppKey("gate", asyncio.Event)


def application(events, *, options):
    """Return an application with a resource, a manager and a subapplication that starts tasks."""

    async def resource(app):
        events.append("opens")
        yield
        events.append(f"closes, {app[TASK_MANAGER].get_task_count()} tasks")

    async def start(request):
        task_manager(request).create_task(after(request.config_dict[GATE]), name="work")
        return web.Response(text=str(task_manager(request).get_task_count()))

    sub = web.Application()
    sub.router.add_get("/start", start)
    app = web.Application()
    app[GATE] = asyncio.Event()
    app.add_subapp("/sub", sub)
    app.cleanup_ctx.append(resource)
    app.cleanup_ctx.append(cleanup_context(**options))
    return app


async def test_work_outlives_its_request_and_ends_before_the_resources():
    """A task started in a request of a subapplication runs on; it ends before the resource closes."""
    events = []
    app = application(events, options={"drain_timeout": 10.0})
    async with TestClient(TestServer(app)) as client:
        assert await (await client.get("/sub/start")).text() == "1"
        assert await (await client.get("/sub/start")).text() == "2"
        asyncio.get_running_loop().call_soon(app[GATE].set)
    assert events == ["opens", "closes, 0 tasks"]
    assert app[TASK_MANAGER].stats()["completed"] == 2


async def test_unfinished_tasks_are_named(caplog):
    """The log names the tasks that did not finish within the drain timeout."""
    app = application([], options={"drain_timeout": 0.0})
    async with TestClient(TestServer(app)) as client:
        await client.get("/sub/start")
    assert "Shutdown cancelled 1 of 1 background task: work (1)" in caplog.text


async def start_and_stop(runner):
    """Start a server and stop it."""
    try:
        await runner.setup()
    finally:
        await runner.cleanup()


async def test_a_context_that_raises_does_not_keep_the_manager_open():
    """The manager is shut down whether another context raises when it opens or when it closes."""

    async def raises_at_start(app):
        app[TASK_MANAGER].create_task(forever())
        raise ValueError("the user's part")
        yield

    async def raises_at_end(app):
        app[TASK_MANAGER].create_task(forever())
        yield
        raise ValueError("the user's part")

    for context in (raises_at_start, raises_at_end):
        app = web.Application()
        app.cleanup_ctx.append(cleanup_context(drain_timeout=0.0))
        app.cleanup_ctx.append(context)
        runner = web.AppRunner(app)
        with pytest.raises(ValueError, match="the user's part"):
            await start_and_stop(runner)
        assert app[TASK_MANAGER]._shutdown.phase == "closed"
        assert app[TASK_MANAGER].get_task_count() == 0


async def test_without_the_context_the_error_says_what_to_do():
    """In a handler of an application without a manager, the error shows the missing line."""
    errors = []

    async def handler(request):
        try:
            task_manager(request)
        except NoManagerError as error:
            errors.append(str(error))
        return web.Response()

    app = web.Application()
    app.router.add_get("/", handler)
    async with TestClient(TestServer(app)) as client:
        await client.get("/")
    assert "app.cleanup_ctx.append(cleanup_context())" in errors[0]


def test_refuses_options_outside_their_values():
    """The error comes when the application is made."""
    with pytest.raises(InvalidOptionError, match="max_pending_tasks"):
        cleanup_context(max_pending_tasks=-1)
