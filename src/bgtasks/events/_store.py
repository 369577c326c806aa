"""The way through the spool: batches are committed to the disk first and sent from there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from bgtasks.errors import text_of
from bgtasks.events._delivery import Batch, Delivery, Settle
from bgtasks.events._thread import OwnThread
from bgtasks.events.ring import Ring

__all__ = ["Spool", "SpoolStats", "Store"]

logger = logging.getLogger("bgtasks.events")

# Read, and deleted again, in one visit of the thread.
READ_AT_ONCE: Final = 4
DELAY_AFTER_ERROR: Final = 0.5
# What a commit may still take once its flusher was cancelled, in seconds.
DISK_GRACE: Final = 1.0


class SpoolStats(Protocol):
    """What a spool says of itself; counts are events."""

    @property
    def events(self) -> int:
        """How many wait."""
        ...

    @property
    def recovered(self) -> int:
        """How many were found at opening."""
        ...

    @property
    def dropped(self) -> Mapping[str, int]:
        """How many it dropped itself, by reason."""
        ...


class Spool(Protocol):
    """A queue of batches that outlives the process. Its methods are called on the publisher's own thread."""

    def append(self, batch: Sequence[bytes], batch_id: str, /) -> None:
        """Commit a batch behind all others, or raise and leave nothing of it."""
        ...

    def oldest(self, count: int, /) -> list[tuple[str, list[bytes]]]:
        """Return up to ``count`` batches, oldest first, that are not done."""
        ...

    def done(self, batch_id: str, /) -> None:
        """Delete a batch; where that is impossible, at least never return it again."""
        ...

    def stats(self) -> SpoolStats:
        """Return what it holds and what became of the rest."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


class _Passing:
    """A try to write a batch past the disk, on a copy of what is to be written: the batch itself may be committed."""

    def __init__(self, delivery: Delivery, batch: Batch) -> None:
        self.batch = batch
        self.part_id, _ = batch.parts[-1]
        self.copy = Batch(batch.batch_id, list(batch.parts), batch.tries, batch.retried_since)
        self.outcomes: list[tuple[int, str]] = []
        self.task = asyncio.create_task(delivery.attempt(self.copy, self._settle))

    def _settle(self, number: int, outcome: str) -> None:
        self.outcomes.append((number, outcome))


class Store:
    """Commits batches to a spool and sends what it holds, oldest first, until the sink has all of it.

    Args:
        spool: where batches wait.
        thread: where the spool's methods run.
        ring: whose books are kept.
        delivery: sends a batch, without a time limit.
        name: the publisher's name.
        on_progress: called when books changed.

    """

    def __init__(
        self,
        spool: Spool,
        thread: OwnThread,
        ring: Ring,
        delivery: Delivery,
        name: str,
        on_progress: Callable[[], None],
    ) -> None:
        self._spool = spool
        self._name = name
        self._thread = thread
        self._ring = ring
        self._delivery = delivery
        self._on_progress = on_progress
        self.forget()

    def forget(self) -> None:
        """Begin anew in the child of a fork, where the spool does so by itself."""
        self._more = asyncio.Event()
        self._recovered = 0
        self._dropped: dict[str, int] = {}
        # Both outlive a cancelled flusher: the batch that is being sent may be half settled, and those that were sent
        # are still on the disk.
        self._in_hand: Batch | None = None
        self._sent: list[str] = []
        self._idle = False
        # A batch that is written past the disk, and may have been committed since because that takes long.
        self._passing: _Passing | None = None
        self.errors = 0
        self.last_error: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known to wait on the disk, nor is on its way from there or past it."""
        return self._idle and not self._more.is_set() and self._passing is None

    @property
    def recovered(self) -> int:
        """How many events were found that earlier processes had left."""
        return self._recovered

    def may_pass(self, batch: Batch) -> bool:
        """Say whether a batch would overtake nothing, or is on its way past the disk already."""
        return self.is_empty if self._passing is None else self._passing.batch is batch

    async def pass_by(self, batch: Batch, settle: Settle, patience: float) -> float | None:
        """Try to write a batch past the disk; what is settled leaves it. Only where it ``may_pass``.

        A write that takes longer than ``patience`` goes on. If the batch is committed then, ``forward`` waits for the
        outcome before it sends anything; if not, a further call goes on waiting.

        Args:
            batch: what to write.
            settle: called with a number of events and their outcome.
            patience: seconds.

        Returns:
            As ``Delivery.attempt``; 0 if the write goes on.

        """
        passing = self._passing
        if passing is None:
            passing = self._passing = _Passing(self._delivery, batch)
        try:
            await asyncio.wait((passing.task,), timeout=patience)
        except asyncio.CancelledError:
            await self.stop_passing()
            raise
        if not passing.task.done():
            return 0.0
        self._passing = None
        copy = passing.copy
        batch.parts, batch.tries, batch.retried_since = copy.parts, copy.tries, copy.retried_since
        for number, outcome in passing.outcomes:
            settle(number, outcome)
        return passing.task.result()

    async def stop_passing(self) -> None:
        """Cancel the write that goes past the disk, if there is one."""
        passing, self._passing = self._passing, None
        if passing is not None:
            passing.task.cancel()
            await asyncio.wait((passing.task,))

    async def append(self, batches: Sequence[Batch]) -> bool:
        """Commit batches, in order; what is committed leaves them.

        Returns:
            Whether all of it was committed; if not, ``last_error`` says why.

        Raises:
            asyncio.CancelledError: from outside, once the disk is done and the books are kept; a disk that hangs is
                waited for a second.

        """
        future = self._thread.run(self._append, batches)
        try:
            committed, stats = await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait((future,), timeout=DISK_GRACE)
            if future.done():
                self._enter(*future.result())
            raise
        self._enter(committed, stats)
        return not any(batch.parts for batch in batches)

    def _append(self, batches: Sequence[Batch]) -> tuple[int, SpoolStats]:
        committed = 0
        try:
            for batch in batches:
                while batch.parts:
                    part_id, payloads = batch.parts[-1]
                    self._spool.append(payloads, part_id)
                    batch.parts.pop()
                    committed += len(payloads)
            self.last_error = None
        except Exception as error:
            self._note(error)
        return committed, self._spool.stats()

    def _enter(self, committed: int, stats: SpoolStats) -> None:
        if committed:
            self._ring.settle(committed, "spooled")
            self._more.set()
        self._balance(stats)
        self._on_progress()

    def _note(self, error: Exception) -> None:
        self.errors += 1
        if self.last_error is None:
            logger.warning("The spool of publisher %r fails: %s", self._name, text_of(error))
        self.last_error = text_of(error)

    async def forward(self) -> None:
        """Send what the spool holds, for ever.

        Raises:
            asyncio.CancelledError: from outside; what is not sent stays in the spool.

        """
        self._idle = False
        # An event belongs to the loop that it was first awaited on.
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
                # A spool that fails, and is not known to hold anything, is in nobody's way.
                self._idle = not stats.events
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
        """Wait for the write that goes past the disk, and enter its outcome if the batch was committed meanwhile."""
        passing = self._passing
        if passing is None:
            return
        await asyncio.wait((passing.task,))
        # Otherwise it was stopped, or whoever could not commit it sees to it.
        if self._passing is passing and not passing.batch.parts:
            self._passing = None
            passing.task.result()
            if passing.outcomes:
                self._sent.append(passing.part_id)
            for number, outcome in passing.outcomes:
                self._ring.settle_spooled(number, outcome)
            self._on_progress()

    async def _send(self, batch_id: str, payloads: list[bytes]) -> None:
        if self._in_hand is None or self._in_hand.batch_id != batch_id:
            self._in_hand = Batch.of(batch_id, payloads)
        await self._delivery.deliver(self._in_hand, self._ring.settle_spooled)

    def _turn_over(self, sent: Sequence[str]) -> tuple[list[tuple[str, list[bytes]]] | None, SpoolStats]:
        """Delete what was sent and return what comes next, None if the spool failed."""
        try:
            for batch_id in sent:
                self._spool.done(batch_id)
            return self._spool.oldest(READ_AT_ONCE), self._spool.stats()
        except Exception as error:
            self._note(error)
            return None, self._spool.stats()

    def _balance(self, stats: SpoolStats) -> None:
        """Enter what the spool found and dropped by itself."""
        if stats.recovered > self._recovered:
            self._ring.recover(stats.recovered - self._recovered)
            self._recovered = stats.recovered
        for reason, count in stats.dropped.items():
            more = count - self._dropped.get(reason, 0)
            if more:
                self._dropped[reason] = count
                self._ring.settle_spooled(more, reason)

    def _close(self) -> None:
        for batch_id in self._sent:
            self._spool.done(batch_id)
        self._spool.close()

    def close(self) -> asyncio.Future[None]:
        """Have the thread delete what was sent and let go of the file, whether or not anybody waits for it."""
        return self._thread.run(self._close)
