"""Managers with the lifetime of a server or a program: they drain, and log the tasks that did not end."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator
from typing import Final

from bgtasks._options import ManagerOptions
from bgtasks._reporting import listed
from bgtasks.info import ManagerStats
from bgtasks.manager import BackgroundTaskManager

__all__ = ["close", "new_manager", "running"]

logger = logging.getLogger("bgtasks")

# Their sum stays below the 30 s that container runtimes leave between SIGTERM and SIGKILL.
DRAIN_TIMEOUT: Final = 20.0
SHUTDOWN_TIMEOUT: Final = 5.0


def new_manager(options: ManagerOptions) -> BackgroundTaskManager:
    """Return a manager that drains for 20 s and waits 5 s for cancelled tasks, unless ``options`` say otherwise."""
    usual: ManagerOptions = {"drain_timeout": DRAIN_TIMEOUT, "default_shutdown_timeout": SHUTDOWN_TIMEOUT}
    usual.update(options)
    return BackgroundTaskManager(**usual)


@contextlib.asynccontextmanager
async def running(options: ManagerOptions) -> AsyncIterator[BackgroundTaskManager]:
    """Make a manager with ``new_manager``, and close it at the end, also after an exception of the body."""
    async with new_manager(options) as manager:
        try:
            yield manager
        finally:
            await close(manager)


async def close(manager: BackgroundTaskManager, *, drain: float | None = None) -> None:
    """Shut a manager down, and name in the log the tasks that did not end by themselves.

    Args:
        manager: the manager.
        drain: seconds to let tasks finish, >= 0; the manager's ``drain_timeout`` by default.

    """
    before = manager.stats()
    remaining: list[str] = []
    try:
        remaining = (await manager.shutdown(drain=drain))["remaining_names"]
    finally:
        _report(before, manager.stats(), remaining)


def _report(before: ManagerStats, after: ManagerStats, remaining: list[str]) -> None:
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
