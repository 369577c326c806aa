"""The spool of a publisher: batches are committed to the disk first and sent from there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, Protocol

from bgtasks.errors import text_of
from bgtasks.events._batches import Batch
from bgtasks.events._delivery import Account, Delivery
from bgtasks.events._event_queue import EventQueue
from bgtasks.events._health import Health
from bgtasks.events._thread import WorkerThread
from bgtasks.events.info import SpoolStats

__all__ = ["AnySpool", "Store"]

logger = logging.getLogger("bgtasks.events")

# Batches read or deleted per call in the thread.
READ_AT_ONCE: Final = 4
DELAY_AFTER_ERROR: Final = 0.5
# Seconds that a commit may still take after its flusher was cancelled.
DISK_GRACE: Final = 1.0


class AnySpool(Protocol):
    """A queue of batches that outlives the process. Its methods are called in one thread."""

    def append(self, batch: Sequence[bytes], batch_id: str, /) -> None:
        """Commit a batch after all others, or raise and leave nothing of it."""
        ...

    def oldest(self, count: int, /) -> list[tuple[str, list[bytes]]]:
        """Return up to ``count`` batches that are not done, oldest first."""
        ...

    def done(self, batch_id: str, /) -> None:
        """Delete a batch; if that is impossible, never return it again."""
        ...

    def stats(self) -> SpoolStats:
        """Return the contents and losses of the spool."""
        ...

    def close(self) -> None:
        """Release the file."""
        ...


class _Passing:
    """A try to write a batch without the disk. It works on a copy: the batch itself may be committed meanwhile."""

    def __init__(self, delivery: Delivery, batch: Batch) -> None:
        self.batch = batch
        self.part_id, _ = batch.parts[-1]
        self.copy = replace(batch, parts=list(batch.parts))
        self.outcomes: list[tuple[int, str]] = []
        self.task = asyncio.create_task(delivery.attempt(self.copy, self._account))

    def _account(self, count: int, outcome: str) -> None:
        self.outcomes.append((count, outcome))


class _Commit:
    """Batches to commit; after a cancellation no further one is begun. ``events`` is the number of committed events."""

    __slots__ = ("batches", "events", "has_ended", "is_cancelled")

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.events = 0
        self.has_ended = False
        self.is_cancelled = False


class Store:
    """Commits batches to a spool and sends them from there, oldest first, until the sink has them.

    Args:
        spool: keeps the batches.
        queue: keeps the counters.
        delivery: sends a batch, without a time limit.
        name: the publisher's name.
        health: records the errors of the spool.
        on_progress: called when counters have changed.

    """

    def __init__(
        self,
        spool: AnySpool,
        queue: EventQueue,
        delivery: Delivery,
        name: str,
        health: Health,
        on_progress: Callable[[], None],
    ) -> None:
        self._spool = spool
        self._name = name
        self._thread = WorkerThread(f"spool of {name}")
        self._queue = queue
        self._delivery = delivery
        self._health = health
        self._on_progress = on_progress
        self.after_fork()

    def after_fork(self) -> None:
        """Reset in the child of a fork, where the spool resets itself."""
        self._more = asyncio.Event()
        self._recovered = 0
        self._dropped: dict[str, int] = {}
        # Commits whose events are not counted yet.
        self._commits: list[_Commit] = []
        # Both outlive a cancelled flusher: the batch that is being sent may be accounted for in part, and batches that
        # were sent are still on the disk.
        self._in_hand: Batch | None = None
        self._sent: list[str] = []
        self._idle = False
        # A write that bypasses the disk. Its batch may have been committed since, because the write takes long.
        self._passing: _Passing | None = None
        self.errors = 0

    @property
    def is_empty(self) -> bool:
        """Whether no batch is known to be on the disk, and none is on its way from there or bypasses it."""
        return self._idle and not self._more.is_set() and self._passing is None

    @property
    def recovered(self) -> int:
        """The number of events recovered from earlier processes."""
        return self._recovered

    def may_pass(self, batch: Batch) -> bool:
        """Return whether a batch may bypass the disk: it would overtake no other, or bypasses it already."""
        return self.is_empty if self._passing is None else self._passing.batch is batch

    async def pass_by(
        self, batch: Batch, account: Account, patience: float, enough: asyncio.Future[None] | None = None
    ) -> float | None:
        """Try to write a batch without the disk; events that are accounted for leave it. Only if it ``may_pass``.

        A write that takes longer than ``patience`` goes on. If the batch is then committed, ``forward`` waits for the
        outcome before it sends anything; if not, the next call continues to wait.

        Args:
            batch: the batch to write.
            account: called with a number of events and their outcome.
            patience: seconds to wait for the write.
            enough: a future that ends the wait earlier.

        Returns:
            As ``Delivery.attempt``; 0 if the write goes on.

        """
        passing = self._passing
        if passing is None:
            passing = self._passing = _Passing(self._delivery, batch)
        try:
            awaited = (passing.task,) if enough is None else (passing.task, enough)
            await asyncio.wait(awaited, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self.stop_passing()
            raise
        if not passing.task.done():
            return 0.0
        self._passing = None
        copy = passing.copy
        batch.parts, batch.tries, batch.failing_since = copy.parts, copy.tries, copy.failing_since
        batch.attempts, batch.is_held = copy.attempts, copy.is_held
        for count, outcome in passing.outcomes:
            account(count, outcome)
        return passing.task.result()

    async def stop_passing(self) -> None:
        """Cancel the write that bypasses the disk, if there is one."""
        passing, self._passing = self._passing, None
        if passing is not None:
            passing.task.cancel()
            await asyncio.wait((passing.task,))

    async def append(self, batches: Sequence[Batch], grace: float = DISK_GRACE) -> bool:
        """Commit batches in order; events that are committed leave them.

        Args:
            batches: the batches.
            grace: the maximum number of seconds that a commit under way may take after a cancellation.

        Returns:
            Whether all events were committed.

        Raises:
            asyncio.CancelledError: from outside, after the commit has ended and its events are counted, or the grace.
                What a hanging disk commits later is counted with the next call.

        """
        commit = _Commit(batches)
        self._commits.append(commit)
        future = self._thread.run(self._append, commit)
        try:
            stats = await asyncio.shield(future)
        except asyncio.CancelledError:
            commit.is_cancelled = True
            await asyncio.wait((future,), timeout=grace)
            self._count(self._spool.stats())
            raise
        self._count(stats)
        return not any(batch.parts for batch in batches)

    def _append(self, commit: _Commit) -> SpoolStats:
        try:
            for batch in commit.batches:
                while batch.parts and not commit.is_cancelled:
                    part_id, payloads = batch.parts[-1]
                    self._spool.append(payloads, part_id)
                    batch.parts.pop()
                    batch.set_outcomes(payloads, "spooled")
                    commit.events += len(payloads)
            self._health.spool_error = None
        except Exception as error:
            self._fail(error)
        finally:
            commit.has_ended = True
        return self._spool.stats()

    def _count(self, stats: SpoolStats) -> None:
        """Count the events of the commits that have ended, earlier ones that were not waited for among them."""
        ended = [commit for commit in self._commits if commit.has_ended]
        self._commits = [commit for commit in self._commits if commit not in ended]
        committed = sum(commit.events for commit in ended)
        if committed:
            self._queue.account(committed, "spooled")
            self._more.set()
        self._balance(stats)
        self._on_progress()

    def _fail(self, error: Exception) -> None:
        self.errors += 1
        if self._health.spool_error is None:
            logger.warning("The spool of publisher %r fails: %s", self._name, text_of(error))
        self._health.spool_error = text_of(error)

    async def forward(self) -> None:
        """Send the batches of the spool until cancelled.

        Raises:
            asyncio.CancelledError: from outside; unsent batches stay in the spool.

        """
        self._idle = False
        # An asyncio.Event belongs to the loop on which it was first awaited.
        self._more = asyncio.Event()
        if self._passing is not None and self._passing.task.get_loop() is not asyncio.get_running_loop():
            self._passing = None
        while True:
            if self._more.is_set():
                self._idle = False
                self._more.clear()
            batches, stats = await self._thread.run(self._turn_over, tuple(self._sent))
            self._balance(stats)
            if batches is None:
                # Later batches may bypass a spool that fails and is not known to hold events.
                self._idle = not stats["events"]
                self._on_progress()
                await asyncio.sleep(DELAY_AFTER_ERROR)
                continue
            self._sent.clear()
            if not batches:
                self._idle = True
                self._on_progress()
                await self._more.wait()
                continue
            self._idle = False
            await self._catch_up()
            for batch_id, payloads in batches:
                if batch_id not in self._sent:
                    await self._send(batch_id, payloads)
                    self._sent.append(batch_id)
                    self._on_progress()

    async def _catch_up(self) -> None:
        """Wait for the write that bypasses the disk, and count its outcome if the batch was committed meanwhile."""
        passing = self._passing
        if passing is None:
            return
        await asyncio.wait((passing.task,))
        # Otherwise it was stopped, or the batch was not committed and the flusher counts its outcome.
        if self._passing is passing and not passing.batch.parts:
            self._passing = None
            passing.task.result()
            if passing.outcomes:
                self._sent.append(passing.part_id)
            for count, outcome in passing.outcomes:
                self._queue.account_spooled(count, outcome)
            self._on_progress()

    async def _send(self, batch_id: str, payloads: list[bytes]) -> None:
        if self._in_hand is None or self._in_hand.batch_id != batch_id:
            self._in_hand = Batch.of(batch_id, payloads)
        await self._delivery.deliver(self._in_hand, self._queue.account_spooled)

    def _turn_over(self, sent: Sequence[str]) -> tuple[list[tuple[str, list[bytes]]] | None, SpoolStats]:
        """Delete sent batches and return the next ones, None if the spool failed."""
        try:
            for batch_id in sent:
                self._spool.done(batch_id)
            return self._spool.oldest(READ_AT_ONCE), self._spool.stats()
        except Exception as error:
            self._fail(error)
            return None, self._spool.stats()

    def _balance(self, stats: SpoolStats) -> None:
        """Count the events that the spool itself recovered and dropped."""
        if stats["recovered"] > self._recovered:
            self._queue.recover(stats["recovered"] - self._recovered)
            self._recovered = stats["recovered"]
        for reason, count in stats["dropped"].items():
            more = count - self._dropped.get(reason, 0)
            if more:
                self._dropped[reason] = count
                self._queue.account_spooled(more, reason)

    def _close(self) -> None:
        for batch_id in self._sent:
            self._spool.done(batch_id)
        self._spool.close()

    def close(self) -> asyncio.Future[None]:
        """Have the thread delete sent batches, release the file and end, even if the future is not awaited."""
        future = self._thread.run(self._close)
        self._thread.stop()
        return future
