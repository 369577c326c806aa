"""The publisher: queue, batches, retries, counters and spool of the events for one sink."""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, Self, final, get_args

from bgtasks._checks import check_choice, check_count, check_limit, check_seconds
from bgtasks._fork import follow_forks
from bgtasks._notifier import outcome_of
from bgtasks.errors import InvalidOptionError, describe, text_of
from bgtasks.events._base import BasePublisher
from bgtasks.events._batches import Batcher, BatchLimits
from bgtasks.events._dead_letters import DeadLetters
from bgtasks.events._delivery import Delivery
from bgtasks.events._durable import DurableEvent, Receipt
from bgtasks.events._encoding import Encoder, JsonEncoder, NoEncoder
from bgtasks.events._event_queue import EventQueue, QueueStats, footprints
from bgtasks.events._exit import close_at_exit
from bgtasks.events._flusher import Flusher
from bgtasks.events._health import Health
from bgtasks.events._linger import Linger
from bgtasks.events._losses import LossReporter
from bgtasks.events._pending import Pending
from bgtasks.events._routes import InOrderRoute, ParallelRoute, Route, RouteParts, SpoolRoute
from bgtasks.events._store import AnySpool, Store
from bgtasks.events.errors import EncodeError
from bgtasks.events.info import EventOverflow, FlushReport, PublisherState, PublisherStats
from bgtasks.events.sink import Sink

if TYPE_CHECKING:
    from bgtasks.manager import BackgroundTaskManager

__all__ = ["Publisher"]

# Seconds for which sinks remember batch ids if retries are unlimited, perhaps after a restart.
ENDLESS_WINDOW: Final = 3600.0
# The share of its timeout that close reserves for spooling the rest and closing the sink, and its maximum in seconds.
KEPT_SHARE: Final = 0.2
MOST_KEPT: Final = 1.0
# Seconds for which close waits for a commit under way, though its time is up.
LEAST_GRACE: Final = 0.05

# After how many calls without a wait ``publish`` lets the loop take a turn: half a millisecond or so.
TURN_EVERY: Final = 256

# The publisher that each sink belongs to, by the sink's id: an author's class may be unhashable. A publisher keeps its
# sink alive, so an id means this sink for as long as the publisher exists.
_owners: dict[int, weakref.ref[Publisher]] = {}


@final
class Publisher(BasePublisher):
    """Accepts events from any thread; one task writes them to a sink, in batches and in order.

    Everything is bounded, and every event is accounted for: see ``stats``.

    Args:
        sink: the destination. It is closed with this publisher and must not belong to another one.
        max_events: the capacity of the queue in events.
        max_bytes: the capacity of the queue in bytes. Events that are not encoded yet count with the mean length, or
            with three quarters of their memory, estimated from some of them, if that is more.
        max_event_bytes: the maximum length of an encoded event.
        batch: the maximum number of events in a batch.
        batch_bytes: the maximum number of bytes in a batch.
        linger: seconds that an event waits for others before a batch is sent that is not full.
        inflight: the maximum number of batches that are written at once. More than 1 gives up the order of events,
            holds further batches in memory beside the queue, and excludes a spool.
        overflow: what a full queue does: ``"drop_newest"`` refuses the new event, ``"drop_oldest"`` drops the oldest,
            ``"block"`` has ``publish`` wait for capacity (``emit``, which cannot wait, refuses). ``"spool"`` writes to
            the sink first, and commits to the spool while the sink does not keep up: it fails, takes long, or the
            queue is half full.
        retry_for: seconds for which a batch is retried before it is dropped; None, and always with a spool, for no
            limit.
        max_attempts: the number of failed writes after which a batch is halved, until the events that cause the
            failures are alone; these are dropped after as many. Writes that raise ``Retry``, and a sink that cannot be
            opened, do not count. None for no limit: a batch that its sink can never take stops all behind it, for ever
            if there is a spool.
        spool: a path or a spool; every batch is committed to it before it is sent. See ``bgtasks.events.spool``.
        dead_letters: the path of a file for events that are given up.
        encode: ``"flush"`` encodes in the flusher, ``"now"`` in ``emit``, for events that are changed afterwards.
        name: the name in log records and of the task; by default that of the sink's class.
        manager: the manager that shows the flusher's task and closes the publisher in its ``shutdown``.
        connect: open the sink in ``start`` and ``async with``, and raise its errors there.

    Raises:
        InvalidOptionError: an argument is outside its values, or the sink belongs to another publisher.
        MissingExtraError: msgspec is not installed.

    Example:
        >>> async def main():
        ...     async with Publisher(JsonlSink("events.jsonl"), batch=100) as publisher:
        ...         publisher.emit({"event": "order_paid", "order": 42})
        ...     print(publisher.stats()["delivered"])
        >>> asyncio.run(main())
        1

    """

    # Long, but with few branches: this is the one place where the parts of a publisher meet.
    def __init__(
        self,
        sink: Sink,
        *,
        max_events: int = 200_000,
        max_bytes: int = 64 << 20,
        max_event_bytes: int = 1 << 20,
        batch: int = 500,
        batch_bytes: int = 1 << 20,
        linger: float = 0.02,
        inflight: int = 1,
        overflow: EventOverflow = "drop_newest",
        retry_for: float | None = 60.0,
        max_attempts: int | None = None,
        spool: str | os.PathLike[str] | AnySpool | None = None,
        dead_letters: str | os.PathLike[str] | None = None,
        encode: Literal["flush", "now"] = "flush",
        name: str | None = None,
        manager: BackgroundTaskManager | None = None,
        connect: bool = False,
    ) -> None:
        _check_counts(
            max_events=max_events,
            max_bytes=max_bytes,
            max_event_bytes=max_event_bytes,
            batch=batch,
            batch_bytes=batch_bytes,
            inflight=inflight,
        )
        check_seconds("linger", linger)
        if retry_for is not None:
            check_seconds("retry_for", retry_for)
        check_limit("max_attempts", max_attempts)
        check_choice("overflow", overflow, get_args(EventOverflow))
        check_choice("encode", encode, ("flush", "now"))
        _check_together(sink, inflight, overflow, spool)
        # With a spool, retries are unlimited.
        retry_for = retry_for if spool is None else None
        encoder: Encoder = JsonEncoder() if sink.takes_bytes else NoEncoder()
        _claim(sink, self, retry_for)
        self.name: str = type(sink).__name__ if name is None else name
        self.sink: Sink = sink
        self._blocks = overflow == "block"
        self._max_event_bytes = max_event_bytes
        self._connect = connect
        self._encoder = encoder
        self._health = Health()
        self._queue = EventQueue(
            max_events, max_bytes, max_event_bytes, overflow == "drop_oldest", self._on_due, self._on_loss, footprints
        )
        self._losses = LossReporter(self.name, self._queue, self._health)
        self._dead_letters = DeadLetters(dead_letters, self.name)
        self._delivery = Delivery(sink, self.name, retry_for, max_attempts, self._dead_letters, self._health)
        # A queue smaller than a batch would be full before the flusher is notified.
        limits = BatchLimits(
            min(batch, max(max_events // 2, 1)), min(batch_bytes, max(max_bytes // 2, 1)), linger, max_event_bytes
        )
        batcher = Batcher(self._queue, encoder, limits, self._health, self._dead_letters)
        self._pending = Pending(self._queue, batcher, inflight == 1)
        self._store: Store | None = None
        if spool is not None:
            opened = _open_spool(spool) if isinstance(spool, (str, os.PathLike)) else spool
            on_progress = self._pending.on_progress
            self._store = Store(opened, self._queue, self._delivery, self.name, self._health, on_progress)
        make_route = partial(self._make_route, inflight, overflow == "spool")
        self._flusher = Flusher(self.name, self._queue, limits, self._pending, self._delivery, self._losses, make_route)
        self._flushes = 0
        # Calls of publish() since the loop had a turn.
        self._calls = 0
        self._is_closed = False
        self._closing: asyncio.Future[FlushReport] | None = None
        self._manager: BackgroundTaskManager | None = None
        if manager is not None:
            self.attach(manager)
        if encode == "now":
            self.__dict__["emit"] = self.emit_encoded
        else:
            # The compiled method itself: a Python method around it would cost more than the method.
            self.__dict__["emit"] = self._queue.emit
        follow_forks(self, Publisher._after_fork)
        close_at_exit(self, Publisher._close_at_exit)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self._state()}, {self._queue.counters()['queue_events']} events>"

    def _make_route(self, inflight: int, tries_sink: bool, linger: Linger, is_current: Callable[[], bool]) -> Route:
        """Return the route of batches to the sink for one run of the flusher; called in its task."""
        parts = RouteParts(self.name, self._pending, self._delivery, self._dead_letters, linger, is_current)
        if self._store is not None:
            return SpoolRoute(parts, self._store, tries_sink)
        return InOrderRoute(parts) if inflight == 1 else ParallelRoute(parts, inflight)

    # -- filling --------------------------------------------------------------------------------------------------

    def emit(self, event: object) -> bool:
        """Queue an event for the sink, from any thread; never wait, and never raise because of load.

        The event is encoded later: do not change it after this call, or set ``encode="now"``.

        Args:
            event: a ``msgspec.Struct``, a dataclass, a mapping, a pydantic model, or encoded ``bytes``.

        Returns:
            Whether the event was accepted. Refused events are counted by reason.

        """
        return self._queue.emit(event)

    def emit_encoded(self, event: object) -> bool:
        """Encode an event now, and queue it as ``emit`` does: for an event that is changed afterwards."""
        payload = self._encode(event)
        return payload is not None and self._queue.emit(payload)

    def _encode(self, event: object) -> object:
        """Return the encoded event; if it cannot be encoded, count it as refused and return None."""
        try:
            return self._encoder.encode(event)
        except EncodeError as error:
            self._health.sink_error = text_of(error)
            self._queue.refuse("encode")
            return None

    async def publish(self, event: object, *, durable: bool = False) -> bool:
        """Queue an event as ``emit`` does; with ``overflow="block"``, wait for capacity first.

        However many events a coroutine publishes in one go, the loop has its turn in between: once per 256 events.

        Args:
            event: as for ``emit``.
            durable: wait until the event is committed to the spool or delivered to the sink, without waiting for others
                to fill its batch. See ``is_durable``.

        Returns:
            Whether the event was accepted; with ``durable``, whether it is in the spool or the sink.

        Raises:
            InvalidOptionError: ``durable`` is true, and the publisher has no spool and a sink that keeps no events.

        """
        if durable and not self.is_durable:
            raise InvalidOptionError(
                f"publish(durable=True) needs a spool, since {type(self.sink).__name__} keeps nothing: "
                "make the publisher with spool=PATH, or leave out durable"
            )
        self._flusher.ensure_running()
        self._calls += 1
        if self._calls >= TURN_EVERY:
            self._calls = 0
            await asyncio.sleep(0)
        if self._blocks:
            await self._pending.capacity.wait_until(self._queue.has_capacity, None)
        if not durable:
            return self.emit(event)
        payload = self._encode(event)
        if not isinstance(payload, bytes):
            return False
        if len(payload) > self._max_event_bytes:
            return self._queue.refuse("too_large")
        receipt = self._pending.expect_durable()
        if not self._queue.emit(DurableEvent.of(payload, receipt)):
            return False
        self._flusher.hurry_once()
        await self._pending.progress.wait_until(partial(self._is_known, receipt), None)
        return receipt.outcome == "spooled" or (receipt.outcome == "delivered" and self.sink.is_durable)

    @property
    def is_durable(self) -> bool:
        """Whether ``publish(event, durable=True)`` is possible: there is a spool, or the sink keeps events."""
        return self._store is not None or self.sink.is_durable

    def _is_known(self, receipt: Receipt) -> bool:
        """Return whether the outcome of an event is known; if not, have the flusher run."""
        if receipt.outcome is None:
            self._flusher.ensure_running()
            return False
        return True

    def _has_finished(self, position: int) -> bool:
        return self._has_reached(self._queue.finished, position)

    def _has_reached(self, count: int, position: int) -> bool:
        """Return whether all events up to a position are among ``count`` that left; if not, have the flusher run."""
        if self._pending.in_order(count) - self._recovered() >= position:
            return True
        self._flusher.ensure_running()
        return False

    def _recovered(self) -> int:
        """Return the number of recovered events. They precede all others, and positions do not count them."""
        return 0 if self._store is None else self._store.recovered

    def _on_due(self) -> None:
        self._flusher.notify()

    def _on_loss(self) -> None:
        self._losses.report()

    # -- starting and ending --------------------------------------------------------------------------------------

    @property
    def manager(self) -> BackgroundTaskManager | None:
        """The manager that shows the flusher's task, None if there is none."""
        return self._manager

    def attached(self, manager: BackgroundTaskManager, /) -> None:
        """Note a manager that flushes and closes this publisher; called by ``manager.attach``.

        The first manager shows the flusher's task.
        """
        if self._manager is None:
            self._manager = manager
            self._flusher.manager = manager

    async def start(self) -> Self:
        """Start the flusher on the running loop, before the first event; with ``connect``, open the sink as well.

        Raises:
            Exception: with ``connect``, an error of the sink's ``open``.

        """
        await self._flusher.leave_thread()
        self._flusher.ensure_running()
        if self._connect:
            await self._delivery.open()
        return self

    async def flush(self, timeout: float = 5.0) -> FlushReport:
        """Wait until every event accepted so far is delivered or dropped; batches that are not full are sent at once.

        Args:
            timeout: the maximum number of seconds to wait.

        """
        check_seconds("timeout", timeout)
        begun = time.monotonic()
        before = self._queue.counters()
        target = self._queue.accepted - self._recovered()
        in_time = not self._has_rest()
        if not in_time and not self._is_closed:
            self._flusher.ensure_running()
            try:
                self._hurry(1)
                in_time = await self._pending.progress.wait_until(partial(self._has_finished, target), timeout)
            finally:
                self._hurry(-1)
        return self._report(begun, before, in_time)

    def _hurry(self, step: int) -> None:
        self._flushes += step
        self._flusher.hurry(self._flushes > 0)

    def _report(self, begun: float, before: QueueStats, in_time: bool) -> FlushReport:
        counters = self._queue.counters()
        return {
            "status": "flushed" if in_time else "timeout",
            "delivered": counters["delivered"] - before["delivered"],
            "dropped": sum(counters["dropped"].values()) - sum(before["dropped"].values()),
            "queued": counters["queue_events"],
            "spooled": counters["spooled"],
            "duration_seconds": time.monotonic() - begun,
            "last_error": self._last_error(),
        }

    def _last_error(self) -> str | None:
        return self._delivery.stalled() or self._health.last_error

    async def close(self, timeout: float = 5.0) -> FlushReport:
        """Refuse further events, flush, spool or drop the rest, and close the sink, all within ``timeout`` seconds.

        A second call waits for the first one and returns its report.

        Args:
            timeout: seconds for all steps together.

        Returns:
            A report, with the status ``"timeout"`` if events had to be spooled or dropped for lack of time.

        """
        check_seconds("timeout", timeout)
        self._queue.close()
        # Events that wait for capacity are now refused.
        self._pending.capacity.notify()
        return await self._flusher.run_on_loop(partial(self._close_once, timeout))

    async def _close_once(self, timeout: float) -> FlushReport:
        if self._closing is None or self._closing.get_loop() is not asyncio.get_running_loop():
            coro = self._close(timeout, self._queue.counters())
            try:
                self._closing = asyncio.get_running_loop().create_task(coro)
            except BaseException:
                coro.close()
                raise
        # Cancelling one caller must not lose the events of the others.
        return await outcome_of(self._closing)

    async def _close(self, timeout: float, before: QueueStats) -> FlushReport:
        begun = time.monotonic()
        end = begun + timeout
        kept = min(timeout * KEPT_SHARE, MOST_KEPT)
        await self.flush(max(timeout - kept, 0))
        self._is_closed = True
        # Each step gets a share of the remaining time: its sink or disk may hang.
        await self._flusher.stop(max(end - time.monotonic(), 0) / 3)
        in_time = not self._has_rest()
        await self._save_rest(max(end - time.monotonic(), 0) / 3)
        # Started before the sink is closed: a spool that is not closed for lack of time would stay locked.
        store_closed = None if self._store is None else self._store.close()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + end - time.monotonic()):
                await self._delivery.close()
                await self._dead_letters.close()
                if store_closed is not None:
                    await store_closed
        self._losses.stop()
        if self._manager is not None:
            self._manager.detach(self)
        _owners.pop(id(self.sink), None)
        return self._report(begun, before, in_time)

    async def _save_rest(self, timeout: float) -> None:
        """Spool the remaining events, or drop them with the reason ``timeout``; after the flusher has stopped."""
        if self._store is not None or self._dead_letters.is_kept:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    while self._pending.encode_rest():  # noqa: ASYNC110  lets other tasks run, waits for nothing
                        await asyncio.sleep(0)
                    if self._store is not None:
                        # A slow disk may complete a commit; a dead one must not make close late.
                        await self._store.append(self._pending.batches, grace=max(timeout, LEAST_GRACE))
        for batch in self._pending.batches:
            self._delivery.account_written(batch, self._pending.account)
        for batch in self._pending.drop_rest():
            for part_id, payloads in reversed(batch.parts):
                self._dead_letters.add(payloads, part_id, "timeout", None)

    def _has_rest(self) -> bool:
        """Return whether accepted events are neither delivered nor dropped."""
        return self._queue.finished < self._queue.accepted

    def _close_at_exit(self, timeout: float) -> Coroutine[Any, Any, object] | None:
        return self.close(timeout) if self._has_rest() else None

    def _after_fork(self) -> None:
        """Reset in the child of a fork: an empty queue, new ids, no client. The parent keeps its events."""
        # Before events are destroyed: nobody in the child waits for their outcomes.
        self._pending.after_fork()
        self._queue.reset()
        self._dead_letters.after_fork()
        self._delivery.forget_client()
        self._losses.forget()
        self._flusher.after_fork()
        if self._store is not None:
            self._store.after_fork()
        self._flushes = 0
        self._closing = None

    # -- statistics -----------------------------------------------------------------------------------------------

    def stats(self) -> PublisherStats:
        """Return counters and health. Safe from any thread."""
        counters = self._queue.counters()
        return {
            "name": self.name,
            "state": self._state(),
            "accepted": counters["accepted"],
            "recovered": counters["recovered"],
            "delivered": counters["delivered"],
            "spooled": counters["spooled"],
            "retried": self._delivery.retried,
            "spool_errors": 0 if self._store is None else self._store.errors,
            "queue_events": counters["queue_events"],
            "queue_bytes": counters["queue_bytes"],
            "dropped": counters["dropped"],
            "refused": counters["refused"],
            "oldest_age_seconds": self._flusher.oldest_age() if counters["queue_events"] else 0.0,
            "lag": self._delivery.lag.as_dict(),
            "last_error": self._last_error(),
        }

    def _state(self) -> PublisherState:
        if self._is_closed:
            return "closed"
        if self._losses.is_losing:
            return "dropping"
        if self._delivery.stalled() is not None:
            return "stalled"
        if self._delivery.is_failing:
            return "retrying" if self._store is None else "spooling"
        return "ok"


def _check_counts(**counts: int) -> None:
    for option, count in counts.items():
        check_count(option, count, 1)


def _check_together(sink: Sink, inflight: int, overflow: str, spool: object) -> None:
    """Refuse options that exclude each other."""
    if not isinstance(sink, Sink):
        raise InvalidOptionError(
            f"a Publisher needs a Sink, such as JsonlSink('events.jsonl'); got {describe(sink)}. Wrap a publisher of "
            "another package: PublishSink(publisher)"
        )
    if overflow == "spool" and spool is None:
        raise InvalidOptionError("overflow='spool' needs spool=PATH")
    if spool is not None and not sink.takes_bytes:
        raise InvalidOptionError(
            f"a spool keeps bytes, and {type(sink).__name__} takes events as they were emitted; leave out spool"
        )
    if inflight > 1 and spool is not None:
        raise InvalidOptionError(
            "inflight must be 1 with a spool, which sends its batches one by one to keep their order; "
            "leave out inflight, or spool"
        )
    if sink.max_inflight is not None and inflight > sink.max_inflight:
        raise InvalidOptionError(
            f"inflight must be at most {sink.max_inflight} for {type(sink).__name__}, whose write does not support "
            f"more concurrent calls; got {inflight}"
        )


def _claim(sink: Sink, publisher: Publisher, retry_for: float | None) -> None:
    """Assign a sink to a publisher, and set for how long it must remember batch ids."""
    key = id(sink)
    reference = _owners.get(key)
    owner = None if reference is None else reference()
    if owner is not None:
        raise InvalidOptionError(f"{describe(sink)} belongs to {owner!r}: make a sink for each publisher")
    # Bound here: at the interpreter's end the module's names may be gone.
    forget = _owners.pop
    _owners[key] = weakref.ref(publisher, lambda _: forget(key, None))
    # Twice retry_for: it counts from the end of the first try, and the last try takes its time as well. By object's
    # method, for sinks that are frozen dataclasses.
    object.__setattr__(sink, "retry_window", ENDLESS_WINDOW if retry_for is None else 2 * retry_for)


def _open_spool(path: str | os.PathLike[str]) -> AnySpool:
    # Imported on demand: a publisher without a spool needs no SQLite.
    from bgtasks.events.spool import Spool

    return Spool(path)
