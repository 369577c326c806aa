"""The routes of batches to the sink: one after another, several at once, or through a spool.

Each run of the flusher has its own route, and calls ``step`` repeatedly. Batches that a step leaves stay in
``Pending``, where the route of the next run finds them.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from bgtasks.events._batches import Batch
from bgtasks.events._dead_letters import DeadLetters
from bgtasks.events._delivery import Delivery
from bgtasks.events._linger import Linger
from bgtasks.events._pending import Pending
from bgtasks.events._store import Store
from bgtasks.events._writers import DELAY_AFTER_BUG, Writers

__all__ = ["InOrderRoute", "ParallelRoute", "Route", "RouteParts", "SpoolRoute"]

logger = logging.getLogger("bgtasks.events")

DELAY_AFTER_SPOOL_ERROR: Final = 0.1
# Seconds that a write which bypasses the spool may hold up the events behind it; then they go to the disk.
PATIENCE: Final = 0.25
# The share of the queue's capacity beyond which events go to the disk even though the sink is healthy: it is too slow.
CROWDED: Final = 0.5
# Batches committed to a spool per call in its thread.
SPOOLED_AT_ONCE: Final = 4


@dataclass(frozen=True, slots=True)
class RouteParts:
    """The parts of a publisher that its route uses.

    Args:
        name: the publisher's name.
        pending: the batches to deliver.
        delivery: writes them.
        dead_letters: keeps the events that are given up.
        linger: records when the queue was empty.
        is_current: returns whether this run of the flusher is the current one. A run that was abandoned, because its
            write did not end, must no longer count events.

    """

    name: str
    pending: Pending
    delivery: Delivery
    dead_letters: DeadLetters
    linger: Linger
    is_current: Callable[[], bool]


class Route(ABC):
    """A route of batches to the sink."""

    def __init__(self, parts: RouteParts) -> None:
        self.name = parts.name
        self.pending = parts.pending
        self.delivery = parts.delivery
        self.dead_letters = parts.dead_letters
        self.linger = parts.linger
        self.is_current = parts.is_current

    @property
    def has_waiting(self) -> bool:
        """Whether a pending batch is not being delivered."""
        return self.pending.has_rest

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be sent but what is pending or in the queue."""
        return True

    @abstractmethod
    async def step(self) -> None:
        """Deliver the pending batches or, if there are none, the next batch of the queue."""

    async def wait_idle(self) -> None:  # noqa: B027  only a parallel route writes beside the flusher
        """Wait until no batch is being written beside the flusher."""

    async def interrupt(self) -> None:  # noqa: B027  as above
        """Cancel the writes beside the flusher; steps may follow."""

    async def stop(self) -> None:
        """Stop everything that runs beside the flusher; no step follows."""
        await self.interrupt()

    def fill(self, most: int = 1) -> None:
        """Move up to ``most`` batches out of the queue."""
        self.pending.fill(self.linger, most)
        if self.is_current():
            self.linger.arm_once_a_batch()

    def account(self, batch: Batch, count: int, outcome: str) -> None:
        """Count the outcome of events of a batch."""
        if self.is_current():
            # First: what fails here is delivered again, and must not have been counted as delivered.
            if outcome == "delivered":
                self.delivery.count_lag(batch, count)
            self.pending.account(count, outcome)


class InOrderRoute(Route):
    """Writes one batch after another."""

    async def step(self) -> None:
        """Deliver the pending batches or, if there are none, the next batch of the queue."""
        pending = self.pending
        await self.dead_letters.wait_written()
        if not pending:
            self.fill()
        while pending and self.is_current():
            batch = pending.batches[0]
            await self.delivery.deliver(batch, partial(self.account, batch))
            pending.remove_finished()
            pending.on_progress()
        # Also if no event could be encoded, so that there is no batch.
        pending.on_progress()


class ParallelRoute(Route):
    """Writes several batches at once, which may overtake each other.

    Args:
        limit: the maximum number of concurrent writes.

    """

    def __init__(self, parts: RouteParts, limit: int) -> None:
        super().__init__(parts)
        self._writers = Writers(parts.delivery, limit, parts.name)

    @property
    def has_waiting(self) -> bool:
        """Whether a pending batch has no writer."""
        return self._next() is not None or self.pending.has_unencoded

    def _next(self) -> Batch | None:
        """Return the oldest pending batch that has no writer."""
        return next((batch for batch in self.pending.batches if batch not in self._writers), None)

    async def step(self) -> None:
        """Start the pending batches or, if there are none, the next batch of the queue, as writers become free."""
        writers = self._writers
        await writers.wait_free()
        await self.dead_letters.wait_written()
        if self._next() is None:
            self.fill()
        while self.is_current() and (batch := self._next()) is not None:
            writers.start(batch, partial(self._account_part, batch))
            await writers.wait_free()
        # Also if no event could be encoded, so that there is no batch.
        self.pending.on_progress()

    def _account_part(self, batch: Batch, count: int, outcome: str) -> None:
        self.account(batch, count, outcome)
        self.pending.remove(batch)
        self.pending.on_progress()

    async def wait_idle(self) -> None:
        """Wait until no batch is being written beside the flusher."""
        await self._writers.wait_idle()

    async def interrupt(self) -> None:
        """Cancel the writes beside the flusher; steps may follow."""
        await self._writers.stop()


class SpoolRoute(Route):
    """Commits batches to a spool; a separate task sends them from there.

    Args:
        store: the spool.
        tries_sink: try the sink first while the spool is empty.

    """

    def __init__(self, parts: RouteParts, store: Store, tries_sink: bool) -> None:
        super().__init__(parts)
        self._store = store
        self._tries_sink = tries_sink
        # Ends the wait for a write that bypasses the disk.
        self._enough: asyncio.Future[None] | None = None
        parts.linger.on_busy = self._look_at_queue
        self._forwarding = asyncio.create_task(self._forward())

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be sent but what is pending or in the queue."""
        return self._store.is_empty

    async def _forward(self) -> None:
        while self.is_current():
            try:
                await self._store.forward()
            except Exception:
                # A bug in bgtasks or in a hook must not stop the other batches.
                logger.exception("The spool of publisher %r failed and goes on", self.name)
                await asyncio.sleep(DELAY_AFTER_BUG)

    async def step(self) -> None:
        """Commit the pending batches or, if there are none, the next ones; bypass an empty spool that fails."""
        pending, store = self.pending, self._store
        await self.dead_letters.wait_written()
        if not pending:
            self.fill(SPOOLED_AT_ONCE)
        while pending and self.is_current():
            first = pending.batches[0]
            has_passed = self._may_pass(first) and await self._pass_by(first) is None
            if not has_passed and not await store.append(pending.batches):
                delay: float | None = DELAY_AFTER_SPOOL_ERROR
                if first.parts and store.may_pass(first):
                    delay = await store.pass_by(first, partial(self.account, first), DELAY_AFTER_SPOOL_ERROR)
                await self.delivery.pause(delay or 0.0, first)
            pending.remove_finished()
            pending.on_progress()
        # Also if no event could be encoded, so that there is no batch.
        pending.on_progress()

    def _may_pass(self, batch: Batch) -> bool:
        return self._tries_sink and self._store.may_pass(batch) and not self.pending.is_crowded(CROWDED)

    async def _pass_by(self, batch: Batch) -> float | None:
        self._enough = asyncio.get_running_loop().create_future()
        try:
            return await self._store.pass_by(batch, partial(self.account, batch), PATIENCE, self._enough)
        finally:
            self._enough = None

    def _look_at_queue(self) -> None:
        enough = self._enough
        if enough is not None and not enough.done() and self.pending.is_crowded(CROWDED):
            enough.set_result(None)

    async def stop(self) -> None:
        """Stop sending; unsent batches stay in the spool."""
        self._forwarding.cancel()
        await asyncio.wait((self._forwarding,))
        await self._store.stop_passing()
