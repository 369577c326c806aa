"""A task manager for an aiohttp application.

::

    app.cleanup_ctx.append(cleanup_context())

    async def handler(request):
        task_manager(request).create_task(send_mail(), name="send_mail")
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Final, Unpack

from bgtasks import errors
from bgtasks._options import ManagerOptions
from bgtasks.integrations._extra import extra
from bgtasks.manager import BackgroundTaskManager
from bgtasks.program._draining import check_program_options, running

with extra("aiohttp", "aiohttp"):
    from aiohttp import web

__all__ = ["TASK_MANAGER", "cleanup_context", "task_manager"]

TASK_MANAGER: Final = web.AppKey("task_manager", BackgroundTaskManager)


def cleanup_context(
    *, shutdown_deadline: float | None = None, **options: Unpack[ManagerOptions]
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Return a cleanup context that gives the application a manager, in ``app[TASK_MANAGER]``.

    aiohttp ends cleanup contexts in the reverse order: append this one last, so that its tasks end before the others
    close their resources. After the last request the manager refuses new work, drains, cancels, and names unfinished
    tasks in the log.

    Args:
        shutdown_deadline: seconds from the signal that ends the server to the end of the shutdown, the requests' time
            included; both timeouts are shortened in proportion. None for their sum.
        options: those of ``BackgroundTaskManager``; by default ``drain_timeout`` is 20 and
            ``default_shutdown_timeout`` 5.

    Raises:
        InvalidOptionError: an option has an invalid value.

    """
    check_program_options(options, shutdown_deadline)

    async def with_manager(app: web.Application) -> AsyncIterator[None]:
        async with running(options, shutdown_deadline) as ending:
            app[TASK_MANAGER] = ending.manager
            yield

    return with_manager


def task_manager(request: web.Request) -> BackgroundTaskManager:
    """Return the manager of the application that serves a request, or of its parent application.

    Raises:
        NoManagerError: neither has a ``cleanup_context()``, or the application was not started.

    """
    manager = request.config_dict.get(TASK_MANAGER)
    if manager is None:
        raise errors.NoManagerError(
            "this application has no task manager: app.cleanup_ctx.append(cleanup_context()) before it starts"
        )
    return manager
