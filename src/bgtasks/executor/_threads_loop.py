"""The stand-in for an event loop of an executor that runs functions in threads."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

__all__ = ["ThreadsLoop"]

logger = logging.getLogger("bgtasks")


class ThreadsLoop:
    """Stands for an event loop in registry and manager, for the functions of one executor.

    The registry keeps its records by loop, asks the loop for the time and whether it still runs, and releases its
    records when it is closed. With these methods alone, functions in threads are in the manager's info, statistics and
    history, ``cancel`` reaches them by id or name, and ``shutdown`` waits for them.
    """

    time = staticmethod(time.monotonic)
    get_task_factory = None

    def __init__(self) -> None:
        self._is_closed = False

    def close(self) -> None:
        """Mark the executor as ended; the registry then releases its records."""
        self._is_closed = True

    def is_closed(self) -> bool:
        """Return whether the executor has ended."""
        return self._is_closed

    def is_running(self) -> bool:
        """Return whether the executor has not ended."""
        return not self._is_closed

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> None:
        """Call at once: a function can be cancelled from any thread."""
        callback(*args)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Log an error that nothing else handles."""
        logger.error("%s", context["message"], exc_info=context["exception"])
