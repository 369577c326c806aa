"""Starlette's background tasks on a manager: as tasks of their own, which the end of the request does not touch."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from bgtasks import errors
from bgtasks._locks import Lock
from bgtasks.integrations._extra import extra
from bgtasks.manager import BackgroundTaskManager

with extra("starlette", "Starlette"):
    from starlette import background
    from starlette.applications import Starlette

__all__ = ["BackgroundTasks", "install", "uninstall"]

Call = Callable[..., Awaitable[None]]

# How many functions of a response the name of its task names.
MOST_NAMED: Final = 3

# The manager of the application that serves the request.
_of_request: contextvars.ContextVar[BackgroundTaskManager | None] = contextvars.ContextVar("manager", default=None)
# Whether this is the task of a response: the functions of a sequence run inside it, one after another.
_is_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("is_inside", default=False)

_lock = Lock()
_originals: dict[Any, Call] = {}
_manager: BackgroundTaskManager | None = None
_waits = False


def install(*, manager: BackgroundTaskManager | None = None, wait: bool = False) -> None:
    """Have the background tasks of every response run on a manager, those of FastAPI as well, until ``uninstall``.

    Existing code stays as it is: ``BackgroundTask``, ``BackgroundTasks`` and ``background=`` of a response. The
    functions of one response are one task of the manager, which has their names and runs them one after another, after
    the response; plain functions run in threads. The end of the request does not cancel it, the manager logs its
    failure, and the application's shutdown waits for it. What the manager refuses runs as without this call. A second
    call changes only the arguments.

    Args:
        manager: the manager for requests of applications that were started without ``lifespan()``; with None their
            background tasks run as without this call. Other applications use their own.
        wait: True to have the request wait for its background tasks and raise their failure, as Starlette does: for
            tests that look at the result after a call of ``TestClient``.

    Raises:
        InvalidOptionError: ``manager`` is not a manager.

    Example:
        >>> install()
        >>> app = Starlette(routes=routes, lifespan=lifespan())

    """
    global _manager, _waits
    if manager is not None and not isinstance(manager, BackgroundTaskManager):
        raise errors.InvalidOptionError(
            f"manager must be a BackgroundTaskManager or None; got {errors.describe(manager)}"
        )
    with _lock:
        _manager, _waits = manager, wait
        if not _originals:
            _replace(Starlette, _serving(Starlette.__call__))
            for kind in _kinds():
                _replace(kind, _detaching(kind.__call__))


def _kinds() -> list[Any]:
    """Return the classes of background tasks that run them in a way of their own."""
    kinds: list[Any] = [background.BackgroundTask, background.BackgroundTasks]
    with contextlib.suppress(ImportError):
        from fastapi import BackgroundTasks as FastAPITasks

        # Up to some releases it inherits the method of Starlette's.
        kinds += [FastAPITasks] if "__call__" in vars(FastAPITasks) else []
    return kinds


def _replace(kind: Any, call: Call) -> None:
    _originals[kind] = kind.__call__
    kind.__call__ = call


def uninstall() -> None:
    """Undo ``install``; without it, do nothing. Tasks that have begun go on."""
    global _manager, _waits
    with _lock:
        _manager, _waits = None, False
        for kind, call in _originals.items():
            kind.__call__ = call
        _originals.clear()


def _serving(original: Call) -> Call:
    """Return a method that remembers the manager of the application for the background tasks of a request."""

    async def __call__(self: Starlette, scope: Any, receive: Any, send: Any) -> None:  # noqa: N807
        manager = scope.get("state", {}).get("task_manager")
        token = _of_request.set(manager if isinstance(manager, BackgroundTaskManager) else None)
        try:
            await original(self, scope, receive, send)
        finally:
            _of_request.reset(token)

    return __call__


def _detaching(original: Call) -> Call:
    """Return a method that runs background tasks on the manager of the request."""

    async def __call__(self: background.BackgroundTask) -> None:  # noqa: N807
        await _run(self, original, _of_request.get() or _manager, wait=_waits)

    return __call__


async def _run(
    tasks: background.BackgroundTask, original: Call, manager: BackgroundTaskManager | None, *, wait: bool
) -> None:
    """Run the background tasks of one response as a task of the manager, or here if that is not possible."""
    functions = [each.func for each in getattr(tasks, "tasks", (tasks,))]
    if manager is None or not functions or _is_inside.get():
        await original(tasks)
        return
    try:
        task = manager.create_task(_inside(tasks, original), name=_name_of(functions))
    except (errors.ManagerClosedError, errors.TaskRejectedError, errors.NoRunningLoopError):
        # Late, or one too many, or on trio: the request does it itself, as without a manager.
        await original(tasks)
        return
    if wait:
        await asyncio.shield(task)


async def _inside(tasks: background.BackgroundTask, original: Call) -> None:
    # In the context of its own that every task has.
    _is_inside.set(True)
    await original(tasks)


def _name_of(functions: Sequence[object]) -> str:
    names = [getattr(function, "__qualname__", None) or type(function).__qualname__ for function in functions]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


class BackgroundTasks(background.BackgroundTasks):
    """Background tasks of one response that run on a manager, without ``install``.

    They are one task of the manager, which begins after the response and runs them one after another. In Starlette it
    is the ``background`` of a response; in FastAPI the dependency ``background_tasks`` returns one.

    Args:
        manager: the manager.
        tasks: the first tasks.

    Example:
        >>> async def endpoint(request):
        ...     tasks = BackgroundTasks(task_manager(request))
        ...     tasks.add_task(send, "hello")
        ...     return PlainTextResponse("accepted", 202, background=tasks)

    """

    def __init__(
        self, manager: BackgroundTaskManager, tasks: Sequence[background.BackgroundTask] | None = None
    ) -> None:
        if not isinstance(manager, BackgroundTaskManager):
            raise errors.InvalidOptionError(f"manager must be a BackgroundTaskManager; got {errors.describe(manager)}")
        super().__init__(tasks)
        self._manager = manager

    async def __call__(self) -> None:
        """Start them; called after the response."""
        await _run(self, background.BackgroundTasks.__call__, self._manager, wait=False)
