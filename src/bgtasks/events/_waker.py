"""Tells the flusher when a batch is due, at the price of one wake-up a batch instead of one an event."""

from __future__ import annotations

import asyncio
import enum
from asyncio.events import _get_running_loop
from contextvars import Context

from bgtasks.events.ring import Ring

__all__ = ["Waker"]


class _Phase(enum.Enum):
    # Nothing is queued; the ring calls at the first event.
    IDLE = enum.auto()
    # Something is; the timer runs, and the ring calls when a batch is full.
    LINGERING = enum.auto()
    # The flusher is at work, or about to; it looks at the ring when it is done.
    BUSY = enum.auto()


class Waker:
    """Waits, on the loop of the flusher, until a batch is full or its oldest event has lingered long enough.

    The ring calls ``wake`` from whatever thread emits: at the first event, once more when a batch is full, and not at
    all in between. A first event from another thread costs one ``call_soon_threadsafe``.

    Args:
        ring: whose batches are awaited.
        loop: the loop of the flusher.
        batch: number of events that make a batch full.
        batch_bytes: number of bytes that do.
        linger: seconds an event waits for others.

    """

    def __init__(
        self, ring: Ring, loop: asyncio.AbstractEventLoop, batch: int, batch_bytes: int, linger: float
    ) -> None:
        self._ring = ring
        self._loop = loop
        self._batch = batch
        self._batch_bytes = batch_bytes
        self._linger = linger
        self._phase = _Phase.BUSY
        self._due: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._urgent = False
        # No event in the queue is older than this, on the loop's clock.
        self._since = loop.time()
        self._arm_once_a_batch()

    def _arm_once_a_batch(self) -> None:
        # While the flusher is busy the ring calls once a batch: enough to notice a loop that was closed under it.
        self._ring.arm(len(self._ring) + self._batch, 0)

    @property
    def since(self) -> float:
        """A point on the loop's clock that no queued event was emitted before."""
        return self._since

    @property
    def now(self) -> float:
        """The loop's clock."""
        return self._loop.time()

    async def wait(self) -> None:
        """Return when a batch is due; to be called again when the queue has been looked at."""
        if self._urgent and len(self._ring):
            return
        self._due = self._loop.create_future()
        self._phase = _Phase.IDLE
        if self._ring.arm(1, 0):
            self._linger_on()
        try:
            await self._due
        finally:
            self._phase = _Phase.BUSY
            self._due = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._arm_once_a_batch()

    def emptied(self, at: float) -> None:
        """Take note that the queue was empty at a point on the loop's clock."""
        self._since = at

    def hurry(self, urgent: bool) -> None:
        """Have every batch go at once, full or not, or let them linger again; on the flusher's loop."""
        self._urgent = urgent
        if urgent and self._phase is _Phase.LINGERING:
            self._finish()

    def wake(self) -> None:
        """Take a call of the ring, from any thread.

        Raises:
            RuntimeError: the loop is closed.

        """
        if _get_running_loop() is self._loop:
            self._woken()
        else:
            self._loop.call_soon_threadsafe(self._woken, context=Context())

    def _woken(self) -> None:
        if self._phase is _Phase.IDLE:
            self._since = self._loop.time()
            self._linger_on()
        elif self._phase is _Phase.LINGERING:
            self._finish()
        else:
            self._arm_once_a_batch()

    def _linger_on(self) -> None:
        self._phase = _Phase.LINGERING
        left = self._since + self._linger - self._loop.time()
        if self._urgent or left <= 0 or self._ring.arm(self._batch, self._batch_bytes):
            self._finish()
        else:
            # An empty context: the timer is not to keep that of the request which happened to emit first.
            self._timer = self._loop.call_later(left, self._finish, context=Context())

    def _finish(self) -> None:
        self._phase = _Phase.BUSY
        if self._due is not None and not self._due.done():
            self._due.set_result(None)
