"""Writes batches to the sink until each event of them is delivered or dropped."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from bgtasks._notifier import Notifier
from bgtasks.errors import text_of
from bgtasks.events._dead_letters import DeadLetters
from bgtasks.events.errors import Reject, Retry

__all__ = ["Batch", "Delivery", "Settle", "Sink"]

logger = logging.getLogger("bgtasks.events")

FIRST_DELAY: Final = 0.05
LONGEST_DELAY: Final = 30.0
# A client that does not let go of a broken connection is left to the collector.
RELEASE_TIMEOUT: Final = 1.0

Settle = Callable[[int, str], None]


class Sink(Protocol):
    """What a publisher's author writes."""

    async def open(self) -> None:
        """Connect."""

    async def write(self, batch: Sequence[Any], batch_id: str) -> None:
        """Write a batch."""

    async def release(self) -> None:
        """Disconnect."""


@dataclass(slots=True, eq=False)
class Batch:
    """A batch on its way; what is settled leaves it, so that a later flusher can go on where one was cancelled.

    ``parts`` are what is still to be written, the next one last: (id, payloads). ``retried_since`` is the time of the
    first failed try, on the monotonic clock. ``place`` is how many events had left the queue before it, and ``since`` a
    point on the loop's clock that none of its events was emitted before; both only where batches overtake each other.
    """

    batch_id: str
    parts: list[tuple[str, Sequence[Any]]]
    tries: int = 0
    retried_since: float | None = field(default=None)
    place: int = 0
    since: float = 0.0

    @classmethod
    def of(cls, batch_id: str, payloads: Sequence[Any], place: int = 0, since: float = 0.0) -> Batch:
        """Return a new batch of one part."""
        return cls(batch_id, [(batch_id, payloads)], place=place, since=since)

    def events(self) -> int:
        """Return how many events are not settled yet."""
        return sum(len(payloads) for _, payloads in self.parts)


class _Client:
    """What the sink opened, and how many writes are using it."""

    __slots__ = ("users",)

    def __init__(self) -> None:
        self.users = 0


class Delivery:
    """Drives a sink: opens it, writes, retries, and finds the events that it will never take.

    Several batches may be delivered at once. A write that breaks the client has it closed when no other write uses it;
    those that come meanwhile wait, and open it anew.

    Retries follow exponential back-off with full jitter (Brooker, "Exponential Backoff And Jitter", AWS Architecture
    Blog, 2015): a random part of a delay that doubles from 50 ms to 30 s. A ``Retry(after=...)`` is waited out as it
    is.

    Args:
        sink: where batches go.
        name: the publisher's name, for log records.
        retry_for: seconds of failed tries after which a batch is given up; None for never.
        dead_letters: where events go that are given up.

    """

    _client: _Client | None

    def __init__(self, sink: Sink, name: str, retry_for: float | None, dead_letters: DeadLetters) -> None:
        self._sink = sink
        self._name = name
        self._retry_for = retry_for
        self._dead_letters = dead_letters
        self.forget()
        self.retried = 0
        self.failing = False
        self.last_error: str | None = None

    async def open(self) -> _Client:
        """Open the sink unless it is open.

        Raises:
            Exception: what its ``open`` raises.

        """
        # The flusher and ``start`` may both be the first.
        async with self._opening:
            if self._client is None:
                await self._sink.open()
                self._client = _Client()
            return self._client

    async def release(self) -> None:
        """Close the sink's client if it is open, in use or not; what goes wrong with that is logged."""
        if self._client is None:
            return
        self._client = None
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT):
                await self._sink.release()
        except Exception as error:
            logger.warning("Publisher %r could not close its client: %s", self._name, text_of(error))

    def forget(self) -> None:
        """Treat the sink as one that was never opened: its client belongs to another process or to a closed loop."""
        self._client = None
        # Held while the sink is opened, and while its client waits to be closed.
        self._opening = asyncio.Lock()
        # Rings when nobody uses the client any more.
        self._unused = Notifier()
        self._under_way: set[Batch] = set()

    async def deliver(self, batch: Batch, settle: Settle) -> None:
        """Write a batch until every event of it is settled.

        Args:
            batch: what settles on the way leaves it.
            settle: called with a number of events and their outcome.

        Raises:
            asyncio.CancelledError: from outside; what is left in the batch is to be delivered again.

        """
        self._under_way.add(batch)
        try:
            while batch.parts:
                await self._dead_letters.wait_written()
                delay = await self.attempt(batch, settle)
                if delay is not None:
                    await asyncio.sleep(delay)
        finally:
            self._under_way.discard(batch)

    async def attempt(self, batch: Batch, settle: Settle) -> float | None:
        """Try to write the next part of a batch.

        Returns:
            None if there was progress; otherwise the seconds to wait before the next try.

        """
        part_id, payloads = batch.parts[-1]
        client: _Client | None = None
        try:
            client = await self.open()
            await self._write(client, payloads, part_id)
        except Reject as error:
            self._refused(batch, error, settle)
        except Retry as error:
            return self._failed(batch, error, error.after, settle)
        except Exception as error:
            delay = self._failed(batch, error, None, settle)
            # Whatever broke may have broken the connection.
            await self._let_go(client)
            return delay
        else:
            batch.parts.pop()
            settle(len(payloads), "delivered")
            self._succeeded(batch)
        return None

    async def _write(self, client: _Client, payloads: Sequence[Any], part_id: str) -> None:
        client.users += 1
        try:
            await self._sink.write(payloads, part_id)
        finally:
            client.users -= 1
            if not client.users and self._unused:
                self._unused.notify()

    async def _let_go(self, client: _Client | None) -> None:
        """Close a client once no write uses it, unless that was done."""
        async with self._opening:
            if client is not None and client is self._client:
                if client.users:
                    await self._unused.wait_until(lambda: not client.users, None)
                await self.release()

    def _succeeded(self, batch: Batch) -> None:
        batch.tries = 0
        batch.retried_since = None
        if self.failing:
            if any(other.tries for other in self._under_way):
                return
            self.failing = False
            logger.info("Publisher %r writes again", self._name)
        self.last_error = None

    def _failed(self, batch: Batch, error: Exception, after: float | None, settle: Settle) -> float | None:
        self.last_error = text_of(error)
        if not self.failing:
            self.failing = True
            logger.warning("Publisher %r cannot write and tries again: %s", self._name, self.last_error)
        now = time.monotonic()
        if batch.retried_since is None:
            batch.retried_since = now
        if self._retry_for is not None and now - batch.retried_since >= self._retry_for:
            self._give_up(batch, "retries_exhausted", error, settle)
            return None
        self.retried += 1
        batch.tries += 1
        if after is not None:
            return after
        return random.uniform(0, min(FIRST_DELAY * 2 ** min(batch.tries - 1, 20), LONGEST_DELAY))

    def _give_up(self, batch: Batch, reason: str, error: BaseException | None, settle: Settle) -> None:
        """Drop what is left of a batch."""
        while batch.parts:
            part_id, payloads = batch.parts.pop()
            settle(len(payloads), reason)
            self._dead_letters.add(payloads, part_id, reason, error)

    def _refused(self, batch: Batch, error: Reject, settle: Settle) -> None:
        part_id, payloads = batch.parts.pop()
        bad = {index for index in error.indexes if 0 <= index < len(payloads)}
        self.last_error = text_of(error)
        if not bad and len(payloads) > 1:
            middle = len(payloads) // 2
            # The same halves with the same ids each time, whatever happens in between.
            batch.parts += [(f"{part_id}.1", payloads[middle:]), (f"{part_id}.0", payloads[:middle])]
            return
        refused = [payloads[index] for index in sorted(bad)] if bad else list(payloads)
        if len(payloads) > len(refused):
            settle(len(payloads) - len(refused), "delivered")
        settle(len(refused), "rejected")
        self._dead_letters.add(refused, part_id, "rejected", error)
