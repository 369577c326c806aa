"""Decides when a batch is due, at the cost of one wake-up per batch instead of one per event."""

from __future__ import annotations

import asyncio
import enum
from asyncio.events import _get_running_loop
from collections.abc import Callable
from contextvars import Context

from bgtasks.events._event_queue import EventQueue

__all__ = ["Linger"]


class _Phase(enum.Enum):
    # The queue is empty, and calls at the first event.
    IDLE = enum.auto()
    # Events are queued. The timer runs, and the queue calls when a batch is full.
    LINGERING = enum.auto()
    # The flusher works, or is about to; it looks at the queue when it is done.
    BUSY = enum.auto()


class Linger:
    """Waits, on the loop of the flusher, until a batch is full or its oldest event has lingered long enough.

    The queue calls ``notify`` in the emitting thread: at the first event and when a batch is full, and never in
    between. A first event from another thread costs one ``call_soon_threadsafe``.

    Args:
        queue: the queue of the events.
        loop: the loop of the flusher.
        batch: the number of events in a full batch.
        batch_bytes: the number of bytes in a full batch.
        linger: seconds that an event waits for others.
        waited: seconds that the oldest event in the queue has waited before.

    """

    def __init__(
        self,
        queue: EventQueue,
        loop: asyncio.AbstractEventLoop,
        batch: int,
        batch_bytes: int,
        linger: float,
        waited: float = 0.0,
    ) -> None:
        self._queue = queue
        self._loop = loop
        self._batch = batch
        self._batch_bytes = batch_bytes
        self._linger = linger
        self._phase = _Phase.BUSY
        self._due: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        # Called on the loop for each further batch of events that comes while the flusher works.
        self.on_busy: Callable[[], None] | None = None
        self._urgent = False
        # Until the queue is empty.
        self._soon = False
        # No event in the queue is older than this, on the loop's clock.
        self._since = loop.time() - waited
        self.arm_once_a_batch()

    def arm_once_a_batch(self) -> None:
        """Have the queue call at the next batch of events, counted from now.

        While the flusher is busy that is enough to notice a loop that was closed meanwhile. Called again when events
        have left the queue: the number at which it calls would be too high by them.
        """
        self._queue.arm(len(self._queue) + self._batch, 0)

    @property
    def since(self) -> float:
        """The earliest time, on the loop's clock, at which a queued event may have been emitted."""
        return self._since

    @property
    def age(self) -> float:
        """How long ago ``since`` is, in seconds."""
        return max(self._loop.time() - self._since, 0.0)

    @property
    def now(self) -> float:
        """The current time on the loop's clock."""
        return self._loop.time()

    async def wait(self) -> None:
        """Wait until a batch is due."""
        if (self._urgent or self._soon) and len(self._queue):
            return
        self._due = self._loop.create_future()
        self._phase = _Phase.IDLE
        if self._queue.arm(1, 0):
            self._linger_on()
        try:
            await self._due
        finally:
            self._phase = _Phase.BUSY
            self._due = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self.arm_once_a_batch()

    def set_empty(self, at: float) -> None:
        """Note that the queue was empty at a time on the loop's clock."""
        self._since = at
        self._soon = False

    def hurry_once(self) -> None:
        """Make what is queued due at once, full or not; on the flusher's loop."""
        self._soon = True
        if self._phase is _Phase.LINGERING:
            self._finish()

    def hurry(self, urgent: bool) -> None:
        """Make every batch due at once, full or not, or let them linger again; on the flusher's loop."""
        self._urgent = urgent
        if urgent and self._phase is _Phase.LINGERING:
            self._finish()

    def notify(self) -> None:
        """Check the queue; called by the queue, in any thread.

        Raises:
            RuntimeError: the loop is closed.

        """
        if _get_running_loop() is self._loop:
            self._look()
        else:
            self._loop.call_soon_threadsafe(self._look, context=Context())

    def _look(self) -> None:
        if self._phase is _Phase.IDLE:
            self._since = self._loop.time()
            self._linger_on()
        elif self._phase is _Phase.LINGERING:
            self._finish()
        else:
            self.arm_once_a_batch()
            if self.on_busy is not None:
                self.on_busy()

    def _linger_on(self) -> None:
        left = self._since + self._linger - self._loop.time()
        if self._urgent or self._soon or left <= 0 or self._queue.arm(self._batch, self._batch_bytes):
            self._finish()
        else:
            # An empty context: the timer must not keep the context of the request that emitted first.
            self._timer = self._loop.call_later(left, self._finish, context=Context())
            self._phase = _Phase.LINGERING

    def _finish(self) -> None:
        if self._due is not None and not self._due.done():
            # By the loop, because a future whose result is set is not asked again: if this fails, the next event tries.
            self._loop.call_soon(_resolve, self._due, context=Context())
        self._phase = _Phase.BUSY
        # The loop may be closed before it resolves the future.
        self.arm_once_a_batch()


def _resolve(due: asyncio.Future[None]) -> None:
    if not due.done():
        due.set_result(None)
