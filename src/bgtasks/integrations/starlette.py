"""A task manager for a Starlette application: it ends after the last request, before the application's resources.

::

    app = Starlette(routes=routes, lifespan=lifespan(my_lifespan))

    async def endpoint(request):
        request.app.state.task_manager.create_task(send_mail(), name="send_mail")
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar, Unpack

from bgtasks import errors
from bgtasks._options import ManagerOptions
from bgtasks.integrations._extra import extra
from bgtasks.integrations._starlette_background import BackgroundTasks, install, uninstall
from bgtasks.manager import BackgroundTaskManager
from bgtasks.program._draining import check_program_options, running

with extra("starlette", "Starlette"):
    from starlette import background
    from starlette.applications import Starlette
    from starlette.requests import HTTPConnection

__all__ = ["BackgroundTasks", "background_tasks", "install", "lifespan", "task_manager", "uninstall"]

App = TypeVar("App", bound=Starlette)


def lifespan(
    inner: Callable[[App], AbstractAsyncContextManager[Mapping[str, Any] | None]] | None = None,
    *,
    shutdown_deadline: float | None = None,
    **options: Unpack[ManagerOptions],
) -> Callable[[App], AbstractAsyncContextManager[Mapping[str, Any]]]:
    """Return a lifespan that gives the application a manager, which ends before ``inner`` does.

    The manager is in ``app.state.task_manager`` when ``inner`` begins, and in ``request.state.task_manager``, also for
    mounted applications. At the end it refuses new work, drains, cancels, and names unfinished tasks in the log; only
    then does ``inner`` close its resources. If ``inner`` raises, the manager is shut down all the same. Each start of
    the application makes a new manager.

    Args:
        inner: the application's own lifespan: a function that takes the application and returns an async context
            manager, as ``@asynccontextmanager`` makes them.
        shutdown_deadline: seconds from the signal that ends the server to the end of the shutdown, the requests' time
            included; both timeouts are shortened in proportion. None for their sum.
        options: those of ``BackgroundTaskManager``; by default ``drain_timeout`` is 20 and
            ``default_shutdown_timeout`` 5.

    Raises:
        InvalidOptionError: ``inner`` is not such a function, or an option has an invalid value.

    """
    if inner is not None and (not callable(inner) or inspect.isasyncgenfunction(inner)):
        raise errors.InvalidOptionError(
            "a lifespan is a function that takes the application and returns an async context manager: decorate it "
            f"with @contextlib.asynccontextmanager; got {errors.describe(inner)}"
        )
    check_program_options(options, shutdown_deadline)

    @contextlib.asynccontextmanager
    async def with_manager(app: App) -> AsyncIterator[Mapping[str, Any]]:
        async with running(options, shutdown_deadline) as ending:
            manager = ending.manager
            app.state.task_manager = manager
            async with contextlib.nullcontext() if inner is None else inner(app) as state:
                try:
                    yield {"task_manager": manager, **(state or {})}
                finally:
                    await ending.close()

    return with_manager


def task_manager(connection: HTTPConnection) -> BackgroundTaskManager:
    """Return the manager of the application that serves a request or a websocket, a mounted one included.

    Raises:
        NoManagerError: the application was started without ``lifespan()``, or not started at all.

    """
    manager: BackgroundTaskManager | None = getattr(connection.state, "task_manager", None)
    if manager is None:
        raise errors.NoManagerError(
            "this application has no task manager: make it with lifespan=lifespan(), and start it; in tests, "
            "'with TestClient(app) as client' starts it"
        )
    return manager


def background_tasks(connection: HTTPConnection, tasks: background.BackgroundTasks) -> BackgroundTasks:
    """Return the background tasks of a response that run on the application's manager; a dependency of FastAPI.

    Args:
        connection: the request; FastAPI passes it.
        tasks: FastAPI's own background tasks, which begin the returned ones.

    Raises:
        NoManagerError: the application was started without ``lifespan()``, or not started at all.

    Example:
        >>> @app.post("/mails", status_code=202)
        ... async def post(tasks: Annotated[BackgroundTasks, Depends(background_tasks)]):
        ...     tasks.add_task(send, "hello")

    """
    own = BackgroundTasks(task_manager(connection))
    tasks.add_task(own)
    return own
