"""Warnings of lost events in the log: at most one in five seconds, with totals, and never published as events."""

from __future__ import annotations

import asyncio
import logging
from contextvars import Context
from typing import Final

from bgtasks.events._event_queue import EventQueue
from bgtasks.events._guard import at_work
from bgtasks.events._health import Health

__all__ = ["LossReporter"]

logger = logging.getLogger("bgtasks.events")

WARNING_INTERVAL: Final = 5.0


class LossReporter:
    """Warns of refused and dropped events; the queue calls ``report``, from any thread.

    Args:
        name: the publisher's name.
        queue: the queue of the events.
        health: holds the last error.

    """

    def __init__(self, name: str, queue: EventQueue, health: Health) -> None:
        self._name = name
        self._queue = queue
        self._health = health
        self.forget()

    def forget(self) -> None:
        """Forget the loop and the losses reported so far."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reported = 0
        self._is_stopped = False

    def use(self, loop: asyncio.AbstractEventLoop) -> None:
        """Log, and wait between warnings, on the running loop from now on."""
        self._loop = loop
        self._timer = None
        self._queue.arm_loss()

    @property
    def is_losing(self) -> bool:
        """Whether events were lost within the last interval between warnings."""
        return self._timer is not None

    def report(self) -> None:
        """Warn now; the next warning comes an interval later at the earliest."""
        if self._loop is not None:
            try:
                # On the loop: emit must not raise the errors of a logging filter, and must not wait for a handler.
                self._loop.call_soon_threadsafe(self._warn, context=Context())
            except RuntimeError:
                self._loop = None
            except Exception:
                # No more than a warning fails here, whose totals the next one has: emit does not raise that.
                self._queue.arm_loss()
                return
            else:
                return
        self._log()

    def _warn(self) -> None:
        if self._timer is not None:
            return
        if self._lost() > self._reported:
            if not self._is_stopped:
                self._look_again()
            self._log()
        else:
            # ``stop`` has reported them meanwhile.
            self._queue.arm_loss()

    def _look_again(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(WARNING_INTERVAL, self._look, context=Context())

    def _look(self) -> None:
        if self._lost() > self._reported:
            self._look_again()
            self._log()
        else:
            self._timer = None
            self._queue.arm_loss()

    def _lost(self) -> int:
        counters = self._queue.counters()
        return sum(counters["dropped"].values()) + sum(counters["refused"].values())

    def _log(self) -> None:
        counters, last_error = self._queue.counters(), self._health.last_error
        self._reported = sum(counters["dropped"].values()) + sum(counters["refused"].values())
        token = at_work.set(self._queue)
        try:
            logger.warning(
                "Publisher %r loses events: %s dropped, %s refused so far%s; the next warning comes in %.0f s at the "
                "earliest",
                self._name,
                _sum_of(counters["dropped"]),
                _sum_of(counters["refused"]),
                "" if last_error is None else f" (last error: {last_error})",
                WARNING_INTERVAL,
            )
        finally:
            at_work.reset(token)

    def stop(self) -> None:
        """Stop the timer, and warn of losses that were not reported yet."""
        self._is_stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._lost() > self._reported:
            self._log()


def _sum_of(reasons: dict[str, int]) -> str:
    if not reasons:
        return "none"
    parts = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    return f"{sum(reasons.values())} ({parts})"
