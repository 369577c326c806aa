"""Says in the log that events are lost: at most once in five seconds, with totals, and never as an event."""

from __future__ import annotations

import asyncio
import logging
from contextvars import Context
from typing import Final

from bgtasks.events._guard import at_work
from bgtasks.events.ring import Ring

__all__ = ["DropReporter"]

logger = logging.getLogger("bgtasks.events")

WARNING_INTERVAL: Final = 5.0


class DropReporter:
    """Warns of refused and dropped events; the ring calls ``tell``, from any thread.

    Args:
        name: the publisher's name.

    """

    ring: Ring

    def __init__(self, name: str) -> None:
        self._name = name
        self.last_error: str | None = None
        self.forget()

    def forget(self) -> None:
        """Begin anew, without a loop."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._told = 0

    def use(self, loop: asyncio.AbstractEventLoop) -> None:
        """Log and time on this loop from now on, which is the running one."""
        self._loop = loop
        self._timer = None
        self.ring.listen()

    @property
    def is_losing(self) -> bool:
        """Whether events were lost within the interval of the warnings."""
        return self._timer is not None

    def tell(self) -> None:
        """Warn now and have the next warning wait for its interval."""
        if self._loop is not None:
            try:
                # Not here: emit must not raise what a logging filter raises, nor wait for a handler.
                self._loop.call_soon_threadsafe(self._warn, context=Context())
            except RuntimeError:
                self._loop = None
            else:
                return
        self._log()

    def _warn(self) -> None:
        if self._timer is None:
            self._look_again()
            self._log()

    def _look_again(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(WARNING_INTERVAL, self._look, context=Context())

    def _look(self) -> None:
        if self._lost() > self._told:
            self._look_again()
            self._log()
        else:
            self._timer = None
            self.ring.listen()

    def _lost(self) -> int:
        books = self.ring.books()
        return sum(books["dropped"].values()) + sum(books["refused"].values())

    def _log(self) -> None:
        books = self.ring.books()
        self._told = sum(books["dropped"].values()) + sum(books["refused"].values())
        token = at_work.set(self.ring)
        try:
            logger.warning(
                "Publisher %r loses events: %s dropped, %s refused so far%s; the next warning comes in %.0f s at the "
                "earliest",
                self._name,
                _sum_of(books["dropped"]),
                _sum_of(books["refused"]),
                "" if self.last_error is None else f" (last error: {self.last_error})",
                WARNING_INTERVAL,
            )
        finally:
            at_work.reset(token)

    def stop(self) -> None:
        """Stop the timer, and warn of what was not told yet."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._lost() > self._told:
            self._log()


def _sum_of(reasons: dict[str, int]) -> str:
    if not reasons:
        return "none"
    parts = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    return f"{sum(reasons.values())} ({parts})"
