"""What an executor's threads have in the place of an event loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("bgtasks")


class Host:
    """Answers to the registry and the manager for the functions of one executor, as a loop does for its tasks.

    The registry keeps its records by loop, asks the loop for the time and whether it still runs, and lets go of its
    records when it is closed. With that much of a loop, functions in threads are in the manager's info, statistics and
    history, are cancelled by id or name, and are waited for by ``shutdown``, without code of their own for each.
    """

    time = staticmethod(time.monotonic)
    get_task_factory = None

    def __init__(self) -> None:
        self._is_closed = False

    def close(self) -> None:
        """Have the registry let go of the records: the executor has ended."""
        self._is_closed = True

    def is_closed(self) -> bool:
        """Tell whether the executor has ended."""
        return self._is_closed

    def is_running(self) -> bool:
        """Tell whether the executor has not ended."""
        return not self._is_closed

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> None:
        """Call at once: a function can be cancelled from any thread."""
        callback(*args)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Log an error that has nobody else to go to."""
        logger.error("%s", context["message"], exc_info=context["exception"])
