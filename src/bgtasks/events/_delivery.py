"""Writes batches to the sink until each event of them is delivered or dropped."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from bgtasks._notifier import Notifier
from bgtasks.errors import text_of
from bgtasks.events._batches import Batch
from bgtasks.events._dead_letters import DeadLetters
from bgtasks.events._health import Health
from bgtasks.events.errors import Reject, Retry
from bgtasks.events.sink import Sink

__all__ = ["Account", "Delivery"]

logger = logging.getLogger("bgtasks.events")

FIRST_DELAY: Final = 0.05
LONGEST_DELAY: Final = 30.0
# Seconds that a client has to release its connection; after that it is left to the garbage collector.
CLOSE_TIMEOUT: Final = 1.0

# Called with a number of events and their outcome.
Account = Callable[[int, str], None]


class _Client:
    """The open client of the sink; ``users`` is the number of writes that use it."""

    __slots__ = ("users",)

    def __init__(self) -> None:
        self.users = 0


class Delivery:
    """Drives a sink: opens it, writes, retries, and finds the events that it will never accept.

    Several batches may be delivered at once. A client that a write has broken is closed when no other write uses it;
    new writes wait for that, and open the sink again.

    Retries follow exponential back-off with full jitter (Brooker, "Exponential Backoff And Jitter", AWS Architecture
    Blog, 2015): a random part of a delay that doubles from 50 ms to 30 s. ``Retry(after=...)`` sets the delay itself.

    Args:
        sink: the destination of the batches.
        name: the publisher's name, for log records.
        retry_for: seconds of failed tries after which a batch is given up; None for no limit.
        dead_letters: keeps the events that are given up.
        health: records the errors of the sink.

    """

    _client: _Client | None

    def __init__(
        self, sink: Sink, name: str, retry_for: float | None, dead_letters: DeadLetters, health: Health
    ) -> None:
        self._sink = sink
        self._name = name
        self._retry_for = retry_for
        self._dead_letters = dead_letters
        self._health = health
        self.forget_client()
        self.retried = 0
        self.is_failing = False

    def forget_client(self) -> None:
        """Treat the sink as never opened: its client belongs to another process or to a closed loop."""
        self._client = None
        # Held while the sink is opened, and while its client waits to be closed.
        self._opening = asyncio.Lock()
        # Notified when no write uses the client any more.
        self._unused = Notifier()
        self._under_way: set[Batch] = set()

    async def open(self) -> _Client:
        """Open the sink unless it is open.

        Raises:
            Exception: an error of the sink's ``open``.

        """
        # The flusher and ``start`` may open the sink at the same time.
        async with self._opening:
            if self._client is None:
                await self._sink.open()
                self._client = _Client()
            return self._client

    async def close(self) -> None:
        """Close the sink if it is open, in use or not; errors are logged."""
        if self._client is None:
            return
        self._client = None
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._sink.close()
        except Exception as error:
            logger.warning("Publisher %r could not close its sink: %s", self._name, text_of(error))

    async def deliver(self, batch: Batch, account: Account) -> None:
        """Write a batch until every event of it is accounted for.

        Args:
            batch: the batch; events that are accounted for leave it.
            account: called with a number of events and their outcome.

        Raises:
            asyncio.CancelledError: from outside; events that are left in the batch are to be delivered again.

        """
        self._under_way.add(batch)
        try:
            while batch.parts:
                await self._dead_letters.wait_written()
                delay = await self.attempt(batch, account)
                if delay is not None:
                    await asyncio.sleep(delay)
        finally:
            self._under_way.discard(batch)

    async def attempt(self, batch: Batch, account: Account) -> float | None:
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
            self._reject(batch, error, account)
        except Retry as error:
            return self._fail(batch, error, error.after, account)
        except Exception as error:
            delay = self._fail(batch, error, None, account)
            # Any error may mean a broken connection.
            await self._close_unused(client)
            return delay
        else:
            _account_part(batch, account, (len(payloads), "delivered"))
            self._succeed(batch)
        return None

    async def _write(self, client: _Client, payloads: Sequence[Any], part_id: str) -> None:
        client.users += 1
        try:
            await self._sink.write(payloads, part_id)
        finally:
            client.users -= 1
            if not client.users and self._unused:
                self._unused.notify()

    async def _close_unused(self, client: _Client | None) -> None:
        """Close a client when no write uses it, unless it is closed already."""
        async with self._opening:
            if client is not None and client is self._client:
                if client.users:
                    await self._unused.wait_until(lambda: not client.users, None)
                await self.close()

    def _succeed(self, batch: Batch) -> None:
        batch.tries = 0
        batch.failing_since = None
        if self.is_failing:
            if any(other.tries for other in self._under_way):
                return
            self.is_failing = False
            logger.info("Publisher %r writes again", self._name)
        self._health.sink_error = None

    def _fail(self, batch: Batch, error: Exception, after: float | None, account: Account) -> float | None:
        self._health.sink_error = text_of(error)
        if not self.is_failing:
            self.is_failing = True
            logger.warning("Publisher %r cannot write and tries again: %s", self._name, self._health.sink_error)
        now = time.monotonic()
        if batch.failing_since is None:
            batch.failing_since = now
        if self._retry_for is not None and now - batch.failing_since >= self._retry_for:
            self._give_up(batch, "retries_exhausted", error, account)
            return None
        self.retried += 1
        batch.tries += 1
        if after is not None:
            return after
        return random.uniform(0, min(FIRST_DELAY * 2 ** min(batch.tries - 1, 20), LONGEST_DELAY))

    def _give_up(self, batch: Batch, reason: str, error: BaseException | None, account: Account) -> None:
        """Drop the remaining events of a batch."""
        while batch.parts:
            part_id, payloads = batch.parts[-1]
            _account_part(batch, account, (len(payloads), reason))
            self._dead_letters.add(payloads, part_id, reason, error)

    def _reject(self, batch: Batch, error: Reject, account: Account) -> None:
        part_id, payloads = batch.parts[-1]
        bad = {index for index in error.indexes if 0 <= index < len(payloads)}
        self._health.sink_error = text_of(error)
        if not bad and len(payloads) > 1:
            middle = len(payloads) // 2
            # Always the same halves with the same ids, so the sink can detect duplicates.
            batch.parts[-1:] = [(f"{part_id}.1", payloads[middle:]), (f"{part_id}.0", payloads[:middle])]
            return
        rejected = [payloads[index] for index in sorted(bad)] if bad else list(payloads)
        outcomes = [(len(payloads) - len(rejected), "delivered"), (len(rejected), "rejected")]
        _account_part(batch, account, *(outcome for outcome in outcomes if outcome[0]))
        self._dead_letters.add(rejected, part_id, "rejected", error)


def _account_part(batch: Batch, account: Account, *outcomes: tuple[int, str]) -> None:
    """Remove the next part of a batch and count what became of it; if that fails, it is not removed."""
    part = batch.parts.pop()
    try:
        for count, outcome in outcomes:
            account(count, outcome)
    except BaseException:
        batch.parts.append(part)
        raise
