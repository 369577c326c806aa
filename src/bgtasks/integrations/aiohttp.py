"""A task manager for an aiohttp application.

::

    app.cleanup_ctx.append(cleanup_context())

    async def handler(request):
        task_manager(request).create_task(send_mail(), name="send_mail")
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final, Unpack

from bgtasks import errors
from bgtasks._options import ManagerOptions
from bgtasks.integrations._extra import extra
from bgtasks.manager import BackgroundTaskManager
from bgtasks.program._draining import check_program_options, running

with extra("aiohttp", "aiohttp"):
    from aiohttp import web

    from bgtasks.integrations._asgi_in_aiohttp import as_handler

if TYPE_CHECKING:
    from bgtasks.watch import Page

__all__ = ["TASK_MANAGER", "add_page", "cleanup_context", "task_manager"]

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


def add_page(app: web.Application, path: str, page: Page) -> None:
    """Show a page that ``bgtasks.watch.app`` made under a path of an application.

    Made without a manager, it shows that of ``cleanup_context()``. Its streams end when the application shuts down.

    Args:
        app: the application, before it starts.
        path: the path, such as ``"/tasks"``.
        page: the page.

    Raises:
        InvalidOptionError: ``path`` does not begin with a slash, or has nothing behind it.

    """
    root = path.rstrip("/") if isinstance(path, str) else ""
    if not root.startswith("/") or "{" in root:
        raise errors.InvalidOptionError(
            f"path must begin with a slash, and be more than that, such as '/tasks'; got {errors.describe(path)}"
        )

    def state_of(request: web.Request) -> dict[str, Any]:
        return {"task_manager": request.config_dict.get(TASK_MANAGER)}

    async def close_page(app: web.Application) -> None:
        page.close()

    handler = as_handler(page, root, state_of)
    app.router.add_route("*", root, handler)
    app.router.add_route("*", root + "/{tail:.*}", handler)
    app.on_shutdown.append(close_page)
