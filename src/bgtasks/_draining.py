"""The end of a manager that lives as long as a server or a program: it drains first, and says what it had to cancel."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Final, Literal, TypedDict

from bgtasks.info import ManagerStats, TaskInfo
from bgtasks.manager import BackgroundTaskManager

logger = logging.getLogger("bgtasks")

# Their sum stays below the 30 s that container runtimes leave between SIGTERM and SIGKILL.
DRAIN_TIMEOUT: Final = 20.0
SHUTDOWN_TIMEOUT: Final = 5.0


class ManagerOptions(TypedDict, total=False):
    """The options of ``BackgroundTaskManager``, for functions that make one."""

    default_shutdown_timeout: float
    max_pending_tasks: int
    overflow: Literal["raise", "drop_new"]
    max_concurrency: int | None
    drain_timeout: float
    on_error: Callable[[TaskInfo, BaseException], object] | None
    history: int


def new_manager(options: ManagerOptions) -> BackgroundTaskManager:
    """Return a manager that drains for 20 s and waits 5 s for cancelled tasks, unless ``options`` say otherwise."""
    usual: ManagerOptions = {"drain_timeout": DRAIN_TIMEOUT, "default_shutdown_timeout": SHUTDOWN_TIMEOUT}
    usual.update(options)
    return BackgroundTaskManager(**usual)


@contextlib.asynccontextmanager
async def running(options: ManagerOptions) -> AsyncIterator[BackgroundTaskManager]:
    """Give a manager made by ``new_manager`` and close it at the end, also after an exception of the body."""
    async with new_manager(options) as manager:
        try:
            yield manager
        finally:
            await close(manager)


async def close(manager: BackgroundTaskManager, *, drain: float | None = None) -> None:
    """Shut a manager down and name in the log the tasks that did not end by themselves.

    Args:
        manager: the manager.
        drain: seconds to let tasks finish, >= 0; the manager's ``drain_timeout`` by default.

    """
    before = manager.stats()
    remaining: list[str] = []
    try:
        remaining = (await manager.shutdown(drain=drain))["remaining_names"]
    finally:
        _tell(before, manager.stats(), remaining)


def _tell(before: ManagerStats, after: ManagerStats, remaining: list[str]) -> None:
    cancelled = {
        name: stats["cancelled"] - (before["names"][name]["cancelled"] if name in before["names"] else 0)
        for name, stats in after["names"].items()
    }
    if after["cancelled"] > before["cancelled"]:
        logger.warning(
            "Shutdown cancelled %d of %d background tasks: %s",
            after["cancelled"] - before["cancelled"],
            before["in_flight"],
            listed(cancelled),
        )
    if remaining:
        logger.warning("%d background tasks outlast the shutdown: %s", len(remaining), listed(Counter(remaining)))


def listed(names: dict[str, int]) -> str:
    """Return names as text, each with its number; those with none are left out."""
    return ", ".join(f"{name} ({count})" for name, count in sorted(names.items()) if count)
