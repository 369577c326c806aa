"""A task manager for a Litestar application.

::

    app = Litestar(
        [order],
        lifespan=[my_lifespan, lifespan()],
        dependencies={"tasks": Provide(task_manager, sync_to_thread=False)},
    )

    @post("/orders")
    async def order(tasks: NamedDependency[BackgroundTaskManager]) -> None:
        tasks.create_task(send_mail(), name="send_mail")
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Unpack

from bgtasks import errors
from bgtasks._options import ManagerOptions
from bgtasks.integrations._extra import extra
from bgtasks.manager import BackgroundTaskManager
from bgtasks.program._draining import check_program_options, running

with extra("litestar", "Litestar"):
    from litestar import Litestar
    from litestar.datastructures import State

__all__ = ["lifespan", "task_manager"]


def lifespan(
    *, shutdown_deadline: float | None = None, **options: Unpack[ManagerOptions]
) -> Callable[[Litestar], AbstractAsyncContextManager[None]]:
    """Return a lifespan that gives the application a manager, in ``app.state.task_manager``.

    Litestar ends lifespans in the reverse order: put this one last, so that its tasks end before the others close their
    resources. At the end the manager refuses new work, drains, cancels, and names unfinished tasks in the log.

    Args:
        shutdown_deadline: seconds from the signal that ends the server to the end of the shutdown, the requests' time
            included; both timeouts are shortened in proportion. None for their sum.
        options: those of ``BackgroundTaskManager``; by default ``drain_timeout`` is 20 and
            ``default_shutdown_timeout`` 5.

    Raises:
        InvalidOptionError: an option has an invalid value.

    """
    check_program_options(options, shutdown_deadline)

    @contextlib.asynccontextmanager
    async def with_manager(app: Litestar) -> AsyncIterator[None]:
        async with running(options, shutdown_deadline) as ending:
            app.state.task_manager = ending.manager
            yield

    return with_manager


def task_manager(state: State) -> BackgroundTaskManager:
    """Return the application's manager, as a dependency.

    Raises:
        NoManagerError: the application was made without ``lifespan()``, or not started.

    """
    manager: BackgroundTaskManager | None = state.get("task_manager")
    if manager is None:
        raise errors.NoManagerError(
            "this application has no task manager: make it with lifespan=[..., lifespan()], and start it; in tests, "
            "'with TestClient(app) as client' starts it"
        )
    return manager
