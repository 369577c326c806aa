"""Writes batches to the sink until each event of them is delivered or dropped."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from bgtasks._notifier import Notifier
from bgtasks._statistics import Distribution
from bgtasks.errors import text_of
from bgtasks.events._batches import Batch
from bgtasks.events._dead_letters import DeadLetters
from bgtasks.events._durable import as_bytes
from bgtasks.events._health import Health
from bgtasks.events.errors import Reject, Retry
from bgtasks.events.sink import Sink

__all__ = ["Account", "Delivery"]

logger = logging.getLogger("bgtasks.events")

FIRST_DELAY: Final = 0.05
LONGEST_DELAY: Final = 5.0
# After a failed ``open``. To open the sink again is cheaper than to write, so it is the probe that ends an outage.
LONGEST_OPEN_DELAY: Final = 1.0
# While a ``flush`` or ``close`` waits.
LONGEST_URGENT_DELAY: Final = 0.3
# Seconds that a client has to release its connection; after that it is left to the garbage collector.
CLOSE_TIMEOUT: Final = 1.0
# Seconds after which a call of the sink that has not returned is shown in the statistics.
STALLED_AFTER: Final = 5.0

# Called with a number of events and their outcome.
Account = Callable[[int, str], None]


class _Client:
    """The open client of the sink; ``users`` is the number of writes that use it."""

    __slots__ = ("users",)

    def __init__(self) -> None:
        self.users = 0


class _Call:
    """A call of the sink, and the time of its begin on the monotonic clock."""

    __slots__ = ("_calls", "begun", "method")

    def __init__(self, method: str, calls: set[_Call]) -> None:
        self.method = method
        self.begun = time.monotonic()
        # A fork or another loop replaces the set of the delivery.
        self._calls = calls

    def end(self) -> None:
        self._calls.discard(self)


class Delivery:
    """Drives a sink: opens it, writes, retries, and finds the events that it will never accept.

    Several batches may be delivered at once. A client that a write has broken is closed when no other write uses it;
    new writes wait for that, and open the sink again.

    Retries follow exponential back-off with full jitter (Brooker, "Exponential Backoff And Jitter", AWS Architecture
    Blog, 2015): a random part of a delay that doubles from 50 ms to 5 s, or to 1 s while the sink cannot even be
    opened. ``Retry(after=...)`` sets the delay itself. ``hurry`` ends any other delay.

    Args:
        sink: the destination of the batches.
        name: the publisher's name, for log records.
        retry_for: seconds of failed tries after which a batch is given up; None for no limit.
        max_attempts: failed writes to an open sink after which a batch is halved, or its only event given up; None for
            no limit.
        dead_letters: keeps the events that are given up.
        health: records the errors of the sink.

    """

    _client: _Client | None

    def __init__(
        self,
        sink: Sink,
        name: str,
        retry_for: float | None,
        max_attempts: int | None,
        dead_letters: DeadLetters,
        health: Health,
    ) -> None:
        self._sink = sink
        self._name = name
        self._retry_for = retry_for
        self._max_attempts = max_attempts
        self._dead_letters = dead_letters
        self._health = health
        self.forget_client()
        self.retried = 0
        # From emit to delivery, per event: the lag of the oldest event of its batch. Batches out of a spool have none.
        self.lag = Distribution()
        self.is_failing = False
        self.is_urgent = False

    def forget_client(self) -> None:
        """Treat the sink as never opened: its client belongs to another process or to a closed loop."""
        self._client = None
        # Held while the sink is opened, and while its client waits to be closed.
        self._opening = asyncio.Lock()
        # Notified when no write uses the client any more.
        self._unused = Notifier()
        self._under_way: set[Batch] = set()
        # The calls of the sink that have not returned.
        self._calls: set[_Call] = set()
        # Ends the pauses between tries.
        self._hurries = 0
        self._hurried = Notifier()

    async def open(self) -> _Client:
        """Open the sink unless it is open.

        Raises:
            Exception: an error of the sink's ``open``.

        """
        # The flusher and ``start`` may open the sink at the same time.
        async with self._opening:
            if self._client is None:
                call = self._begin("open")
                try:
                    await self._sink.open()
                finally:
                    call.end()
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
                    await self.pause(delay, batch)
        finally:
            self._under_way.discard(batch)

    def hurry(self, urgent: bool) -> None:
        """Try again at once, and keep the delays short until ``hurry(False)``; from any thread."""
        self.is_urgent = urgent
        if urgent:
            self._hurries += 1
            self._hurried.notify()

    async def pause(self, delay: float, batch: Batch) -> None:
        """Wait between two tries; a flush or close that begins meanwhile ends the wait, unless the sink set it."""
        if batch.is_held:
            await asyncio.sleep(delay)
            return
        # Not at once, if there was a try just now: a program may call flush again and again.
        least = min(delay, FIRST_DELAY)
        before = self._hurries
        await asyncio.sleep(least)
        await self._hurried.wait_until(lambda: self._hurries != before, delay - least)

    async def attempt(self, batch: Batch, account: Account) -> float | None:
        """Try to write the next part of a batch.

        Returns:
            None if there was progress; otherwise the seconds to wait before the next try.

        """
        part_id, payloads = batch.parts[-1]
        client: _Client | None = None
        try:
            client = await self.open()
            await self._write(client, as_bytes(payloads) if batch.has_durable else payloads, part_id)
        except Reject as error:
            self._reject(batch, error, account)
        except Retry as error:
            return self._fail(batch, error, error.after, LONGEST_DELAY, account)
        except Exception as error:
            longest = LONGEST_OPEN_DELAY if client is None else LONGEST_DELAY
            delay = self._fail(batch, error, None, longest, account)
            # Any error may mean a broken connection.
            await self._close_unused(client)
            if client is not None and batch.parts and self._blames(batch):
                self._isolate(batch, error, account)
                return None
            return delay
        else:
            batch.attempts = 0
            _account_part(batch, account, (payloads, "delivered"))
            self._succeed(batch)
        return None

    async def _write(self, client: _Client, payloads: Sequence[Any], part_id: str) -> None:
        call = self._begin("write")
        client.users += 1
        try:
            await self._sink.write(payloads, part_id)
        finally:
            call.end()
            client.users -= 1
            if not client.users and self._unused:
                self._unused.notify()

    def _begin(self, method: str) -> _Call:
        call = _Call(method, self._calls)
        self._calls.add(call)
        return call

    def stalled(self) -> str | None:
        """Return what the sink has not returned from for long, None if there is nothing. Safe from any thread."""
        now = time.monotonic()
        for call in list(self._calls):
            age = now - call.begun
            if age >= STALLED_AFTER:
                return f"{call.method} of {type(self._sink).__name__} has not returned for {age:.0f} seconds"
        return None

    async def _close_unused(self, client: _Client | None) -> None:
        """Close a client when no write uses it, unless it is closed already."""
        async with self._opening:
            if client is not None and client is self._client:
                if client.users:
                    await self._unused.wait_until(lambda: not client.users, None)
                await self.close()

    def count_lag(self, batch: Batch, delivered: int) -> None:
        """Count the lag of delivered events of a batch."""
        if batch.since:
            self.lag.count(max(asyncio.get_running_loop().time() - batch.since, 0.0), delivered)

    def _succeed(self, batch: Batch) -> None:
        batch.tries = 0
        batch.failing_since = None
        if self.is_failing:
            if any(other.tries for other in self._under_way):
                return
            self.is_failing = False
            logger.info("Publisher %r writes again", self._name)
        self._health.sink_error = None

    def _fail(
        self, batch: Batch, error: Exception, after: float | None, longest: float, account: Account
    ) -> float | None:
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
        batch.is_held = after is not None
        if after is not None:
            return after
        if self.is_urgent:
            longest = min(longest, LONGEST_URGENT_DELAY)
        return random.uniform(0, min(FIRST_DELAY * 2 ** min(batch.tries - 1, 20), longest))

    def _blames(self, batch: Batch) -> bool:
        """Count a failed write to an open sink; return whether the batch itself may be the cause."""
        batch.attempts += 1
        return self._max_attempts is not None and batch.attempts >= self._max_attempts

    def _isolate(self, batch: Batch, error: Exception, account: Account) -> None:
        """Halve the next part of a batch, or give up its only event."""
        part_id, payloads = batch.parts[-1]
        if len(payloads) > 1:
            batch.halve()
            return
        batch.attempts = 0
        self.account_written(batch, account)
        if batch.parts and batch.parts[-1][0] == part_id:
            _account_part(batch, account, (payloads, "retries_exhausted"))
            self._dead_letters.add(payloads, part_id, "retries_exhausted", error)

    def account_written(self, batch: Batch, account: Account) -> None:
        """Count those events of a batch as delivered of which the sink knows that they are in, and remove them."""
        left: list[tuple[str, Sequence[Any]]] = []
        count = 0
        for part_id, payloads in batch.parts:
            written = self._written(part_id, len(payloads))
            count += len(written)
            batch.set_outcomes([payloads[index] for index in written], "delivered")
            rest = [payload for index, payload in enumerate(payloads) if index not in written]
            if rest:
                left.append((part_id, rest))
        if count:
            before, batch.parts = batch.parts, left
            try:
                account(count, "delivered")
            except BaseException:
                batch.parts = before
                raise

    def _written(self, part_id: str, count: int) -> set[int]:
        try:
            return {index for index in self._sink.written(part_id) if 0 <= index < count}
        except Exception:
            logger.exception("Publisher %r cannot ask its sink what it has written", self._name)
            return set()

    def _give_up(self, batch: Batch, reason: str, error: BaseException | None, account: Account) -> None:
        """Drop the remaining events of a batch, except those that are known to be in the sink."""
        self.account_written(batch, account)
        while batch.parts:
            part_id, payloads = batch.parts[-1]
            _account_part(batch, account, (payloads, reason))
            self._dead_letters.add(payloads, part_id, reason, error)

    def _reject(self, batch: Batch, error: Reject, account: Account) -> None:
        part_id, payloads = batch.parts[-1]
        bad = {index for index in error.indexes if 0 <= index < len(payloads)}
        self._health.sink_error = text_of(error)
        if not bad and len(payloads) > 1:
            batch.halve()
            return
        rejected = [payloads[index] for index in sorted(bad)] if bad else list(payloads)
        accepted = [payload for index, payload in enumerate(payloads) if index not in bad] if bad else []
        _account_part(batch, account, (accepted, "delivered"), (rejected, "rejected"))
        self._dead_letters.add(rejected, part_id, "rejected", error)


def _account_part(batch: Batch, account: Account, *outcomes: tuple[Sequence[Any], str]) -> None:
    """Remove the next part of a batch and count what became of its events; if that fails, it is not removed."""
    part = batch.parts.pop()
    try:
        for payloads, outcome in outcomes:
            if payloads:
                batch.set_outcomes(payloads, outcome)
                account(len(payloads), outcome)
    except BaseException:
        batch.parts.append(part)
        raise
