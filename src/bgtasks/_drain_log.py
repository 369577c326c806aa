"""What the log says while a manager lets its tasks finish: what is left at the start, and again every few seconds."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Final

from bgtasks._reporting import listed, numbered

__all__ = ["DrainLog"]

# Seconds between two records of what is left.
INTERVAL: Final = 5.0
# Tasks that end within these seconds are no news, unless a signal is the reason to end.
SILENCE: Final = 0.1


class DrainLog:
    """Names the tasks that a manager waits for, from the loop on which it waits.

    Args:
        logger: returns the logger.
        names: returns the names of the tasks that are left, each with their number.

    """

    def __init__(self, logger: Callable[[], logging.Logger], names: Callable[[], Counter[str]]) -> None:
        self._logger = logger
        self._names = names
        self._timer: asyncio.TimerHandle | None = None
        self._begun = 0.0
        self._seconds = 0.0

    def announce(self, cause: str, seconds: float, hint: str = "") -> None:
        """Say what is left, unless nothing is, and why it has to end; and say it again every few seconds.

        Args:
            cause: why the program ends.
            seconds: how long the tasks have to finish.
            hint: what can be done about it.

        """
        names = self._names()
        if not names:
            return
        count = names.total()
        self._logger().warning(
            "%s: %s %s left, with at most %.3g s to finish: %s%s",
            cause,
            numbered(count),
            "is" if count == 1 else "are",
            seconds,
            listed(names),
            hint,
        )
        self._begun = time.monotonic()
        self._seconds = seconds
        self._look_later(INTERVAL, self._say_again)

    def begin(self, seconds: float) -> None:
        """Begin as ``announce`` does, in a moment, unless that was done."""
        if self._timer is None:
            self._look_later(SILENCE, partial(self.announce, "Shutdown", seconds))

    def stop(self) -> None:
        """Say nothing more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_later(self, seconds: float, look: Callable[[], object]) -> None:
        self.stop()
        self._timer = asyncio.get_running_loop().call_later(seconds, look)

    def _say_again(self) -> None:
        names = self._names()
        if names:
            elapsed = time.monotonic() - self._begun
            self._logger().warning(
                "%s left after %.0f s, with %.0f s to go: %s",
                numbered(names.total()),
                elapsed,
                max(self._seconds - elapsed, 0),
                listed(names),
            )
            self._look_later(INTERVAL, self._say_again)
