"""Batches that have left the queue and are not accounted for; they outlive the flusher that popped them."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Any

from bgtasks._notifier import Notifier
from bgtasks.events._batches import Batch, Batcher, Unfit
from bgtasks.events._durable import Receipt
from bgtasks.events._event_queue import EventQueue
from bgtasks.events._linger import Linger

__all__ = ["Pending"]


class Pending:
    """The batches that have left the queue and are not accounted for, oldest first.

    Args:
        queue: the events and their counters.
        batcher: makes batches of the events.
        in_order: whether each batch is accounted for before the next one is written.

    """

    def __init__(self, queue: EventQueue, batcher: Batcher, in_order: bool) -> None:
        self._queue = queue
        self._batcher = batcher
        self._in_order = in_order
        self.after_fork()

    def after_fork(self) -> None:
        """Start empty in the child of a fork: the parent keeps the batches."""
        self._batcher.renew_ids()
        # Notified when counters have changed, and when the queue has capacity again. New before batches are destroyed,
        # which would wake the parent's coroutines.
        self.progress = Notifier()
        self.capacity = Notifier()
        self.batches: deque[Batch] = deque()
        # Out of the queue and not encoded, because that was interrupted; and what is to be dropped of those that were.
        self._unencoded: list[Any] = []
        self._unfit: list[Unfit] = []

    def __bool__(self) -> bool:
        """Return True if a batch is not accounted for."""
        return bool(self.batches)

    @property
    def is_needed(self) -> bool:
        """Whether a flusher has work to do."""
        return self.has_rest or bool(len(self._queue))

    @property
    def has_rest(self) -> bool:
        """Whether events are out of the queue and not accounted for."""
        return bool(self.batches) or self.has_unencoded

    @property
    def has_unencoded(self) -> bool:
        """Whether there are events that are in no batch, because encoding them was interrupted."""
        return bool(self._unencoded or self._unfit)

    @property
    def queued(self) -> int:
        """The number of events in the queue."""
        return len(self._queue)

    def is_crowded(self, share: float) -> bool:
        """Return whether the queue is filled to more than a share of its capacity."""
        return self._queue.is_over(share)

    def fill(self, linger: Linger, most: int = 1) -> None:
        """Move up to ``most`` batches out of the queue."""
        for _ in range(most):
            at, since = linger.now, linger.since
            position = 0 if self._in_order else self._left_queue()
            if not self.has_unencoded:
                self._unencoded = self._batcher.pop()
            count = len(self._unencoded)
            if not self.has_unencoded:
                break
            if not len(self._queue):
                linger.set_empty(at)
            if self.capacity:
                self.capacity.notify(count)
            self._encode(position, since)
            if count < self._batcher.events:
                break

    def _encode(self, position: int = 0, since: float = 0.0) -> None:
        """Make batches of the events that were removed from the queue.

        Encoding may run code of the events, which may raise what ends the program. Until it has ended, nothing changes
        here, so a later call begins again with the same events.
        """
        if self._unencoded:
            batches, unfit = self._batcher.encode(self._unencoded, position, since)
            together, all_unfit = self.batches + deque(batches), self._unfit + unfit
            self.batches, self._unfit, self._unencoded = together, all_unfit, []
        while self._unfit:
            unfit_events = self._unfit[-1]
            self._batcher.count_dropped(unfit_events)
            self._unfit.pop()
            self._batcher.bury(unfit_events)

    def _left_queue(self) -> int:
        """Return the number of events that have left the queue."""
        counters = self._queue.counters()
        return counters["accepted"] - counters["queue_events"] + counters["in_flight"]

    def account(self, count: int, outcome: str) -> None:
        """Count the outcome of events."""
        self._queue.account(count, outcome)

    def remove_finished(self) -> None:
        """Remove batches that are accounted for, from the oldest up to the first that is not."""
        while self.batches and not self.batches[0].parts:
            self.batches.popleft()

    def remove(self, batch: Batch) -> None:
        """Remove a batch, whatever its position, if it is accounted for."""
        if not batch.parts and batch in self.batches:
            self.batches.remove(batch)

    def oldest(self) -> Batch | None:
        """Return the oldest batch, None if there is none or batches keep their order. Safe from any thread."""
        if not self._in_order:
            with suppress(IndexError):
                return self.batches[0]
        return None

    def since(self) -> float | None:
        """Return a time, on the loop's clock, before which no pending event was emitted; None if there is none."""
        with suppress(IndexError):
            return self.batches[0].since or None
        return None

    def in_order(self, count: int) -> int:
        """Return how many events, from the first accepted on, have all left, if ``count`` have left in any order.

        Args:
            count: the queue's ``finished``, read before this call.

        """
        oldest = self.oldest()
        return count if oldest is None else min(count, oldest.position)

    def expect_durable(self) -> Receipt:
        """Return the receipt for an event that is about to be emitted."""
        self._batcher.has_receipts = True
        return Receipt(self.on_progress)

    def on_progress(self) -> None:
        """Wake the coroutines that wait for the counters to change."""
        if self.progress:
            self.progress.notify()

    # -- the end --------------------------------------------------------------------------------------------------

    def encode_rest(self) -> bool:
        """Move one more batch out of the queue, without a flusher; return False if the queue is empty."""
        if not self.has_unencoded:
            self._unencoded = self._batcher.pop()
        if not self.has_unencoded:
            return False
        self._encode()
        return True

    def drop_rest(self) -> list[Batch]:
        """Drop all remaining events with the reason ``timeout``; return the batches, for the dead letters."""
        left, self.batches = list(self.batches), deque()
        for batch in left:
            self._queue.account(batch.events(), "timeout")
            for _, payloads in batch.parts:
                batch.set_outcomes(payloads, "timeout")
        unencoded, self._unencoded = self._unencoded, []
        if unencoded:
            self._queue.account(len(unencoded), "timeout")
        while self._unfit:
            self._batcher.count_dropped(self._unfit.pop())
        while events := self._batcher.pop():
            self._queue.account(len(events), "timeout")
        self.on_progress()
        return left
