"""The base of all publishers: whoever derives from it writes how a batch reaches the sink, the rest is here."""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Self

from bgtasks.errors import InvalidOptionError, describe, text_of
from bgtasks.events import _process
from bgtasks.events._dead_letters import DeadLetters
from bgtasks.events._delivery import Delivery
from bgtasks.events._drops import DropReporter
from bgtasks.events._flusher import BatchLimits, Flusher
from bgtasks.events._store import Spool, Store
from bgtasks.events._thread import OwnThread
from bgtasks.events.encoding import Encoder, JsonEncoder
from bgtasks.events.errors import EncodeError
from bgtasks.events.info import FlushReport, PublisherStats, State
from bgtasks.events.ring import Books, Ring

if TYPE_CHECKING:
    from bgtasks.manager import BackgroundTaskManager

__all__ = ["BasePublisher", "Overflow"]

Overflow = Literal["drop_newest", "drop_oldest", "block", "spool"]

OVERFLOWS: Final = ("drop_newest", "drop_oldest", "block", "spool")
# Of its time, close keeps so much for what comes after flushing: spooling the rest, closing the client.
KEPT_SHARE: Final = 0.2
MOST_KEPT: Final = 1.0


class BasePublisher(ABC):
    r"""Takes events from any thread, and has one task write them to a sink, in batches and in order.

    Derive from it and write one method, ``write``; ``open`` and ``release`` are there for a client that has to be
    connected. Everything is bounded, every event is accounted for: see ``stats``.

    Args:
        max_events: how many events the queue holds.
        max_bytes: how many bytes it holds; what is not encoded yet counts with the mean size of what was.
        max_event_bytes: the size of the largest event, in bytes, encoded.
        batch: how many events go to the sink at once.
        batch_bytes: how many bytes go at once.
        linger: seconds an event waits for others before a batch goes that is not full.
        inflight: how many batches are written at once. More than 1 gives up the order of events, holds so many batches
            in memory beside the queue, and excludes a spool.
        overflow: what a full queue does: ``"drop_newest"`` refuses the new event, ``"drop_oldest"`` gives up the
            oldest, ``"block"`` has ``publish`` wait for room (``emit``, which cannot wait, refuses), ``"spool"`` writes
            to the spool only what the sink does not take at once.
        retry_for: seconds for which a batch is tried again before it is dropped. With a spool there is no such limit.
        spool: a path, or a spool, to commit every batch to before it is sent; see ``bgtasks.events.spool``.
        dead_letters: the path of a file for events that are given up.
        encode: ``"flush"`` encodes in the flusher, ``"now"`` in ``emit``, for events that are changed afterwards.
        name: for log records and the task's name; that of the class by default.
        manager: the manager that shows the flusher's task and closes the publisher in its ``shutdown``.
        connect: have ``start`` and ``async with`` open the sink at once, and raise what that raises.

    Raises:
        InvalidOptionError: an argument is outside its values.
        MissingExtraError: msgspec is not installed.

    Example:
        >>> class HttpPublisher(BasePublisher):
        ...     async def open(self):
        ...         self.client = httpx.AsyncClient()
        ...
        ...     async def write(self, batch, batch_id):
        ...         headers = {"Idempotency-Key": batch_id}
        ...         response = await self.client.post(URL, content=b"\\n".join(batch), headers=headers)
        ...         response.raise_for_status()
        ...
        ...     async def release(self):
        ...         await self.client.aclose()

    """

    # How many calls of ``write`` may run at once, None for any number; 1 for a sink with one connection or one thread.
    max_inflight: ClassVar[int | None] = None

    def __init__(
        self,
        *,
        max_events: int = 200_000,
        max_bytes: int = 64 << 20,
        max_event_bytes: int = 1 << 20,
        batch: int = 500,
        batch_bytes: int = 1 << 20,
        linger: float = 0.02,
        inflight: int = 1,
        overflow: Overflow = "drop_newest",
        retry_for: float = 60.0,
        spool: str | os.PathLike[str] | Spool | None = None,
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
        _check_seconds(linger=linger, retry_for=retry_for)
        if overflow not in OVERFLOWS:
            raise InvalidOptionError(f"overflow must be one of {', '.join(OVERFLOWS)}; got {describe(overflow)}")
        if overflow == "spool" and spool is None:
            raise InvalidOptionError("overflow='spool' needs spool=PATH")
        if inflight > 1 and spool is not None:
            raise InvalidOptionError(
                "inflight must be 1 with a spool, which sends its batches one by one to keep their order; "
                "leave out inflight, or spool"
            )
        if self.max_inflight is not None and inflight > self.max_inflight:
            raise InvalidOptionError(
                f"inflight must be at most {self.max_inflight} for {type(self).__name__}, whose write cannot run more "
                f"often at once; got {inflight}"
            )
        if encode not in ("flush", "now"):
            raise InvalidOptionError(f"encode must be 'flush' or 'now'; got {describe(encode)}")
        self.name = type(self).__name__ if name is None else name
        self._overflow = overflow
        self._connect = connect
        self._encoder = self._make_encoder()
        self._thread = OwnThread(f"publisher {self.name}")
        self._drops = DropReporter(self.name)
        self._ring = Ring(
            max_events, max_bytes, max_event_bytes, overflow == "drop_oldest", self._wake, self._drops.tell
        )
        self._drops.ring = self._ring
        self._dead_letters = DeadLetters(dead_letters, self._thread, self.name)
        self._delivery = Delivery(self, self.name, retry_for if spool is None else None, self._dead_letters)
        # A queue smaller than a batch would be full before the flusher is woken.
        limits = BatchLimits(
            min(batch, max(max_events // 2, 1)),
            min(batch_bytes, max(max_bytes // 2, 1)),
            linger,
            max_event_bytes,
            inflight,
        )
        self._flusher = Flusher(
            self.name,
            self._ring,
            self._encoder,
            limits,
            self._delivery,
            self._dead_letters,
            self._drops,
            overflow == "spool",
        )
        if spool is not None:
            opened = _open_spool(spool) if isinstance(spool, (str, os.PathLike)) else spool
            self._flusher.store = Store(
                opened, self._thread, self._ring, self._delivery, self.name, self._flusher.on_progress
            )
        self._flushes = 0
        self._closed = False
        self._closing: asyncio.Future[FlushReport] | None = None
        self._manager: BackgroundTaskManager | None = None
        if manager is not None:
            self.attach(manager)
        if encode == "now":
            self.__dict__["emit"] = self._emit_encoded
        elif type(self).emit is BasePublisher.emit:
            # The compiled method itself: a Python one in between would cost more than it does.
            self.__dict__["emit"] = self._ring.emit
        _process.follow(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self._state()}, {self._ring.books()['queue_events']} events>"

    # -- what a publisher's author writes -----------------------------------------------------------------------------

    async def open(self) -> None:  # noqa: B027  most sinks have nothing to open
        """Connect to the sink, before the first ``write``; what it raises counts as a failed ``write``.

        It is called again after a fork, on another loop, and when a ``write`` failed other than by ``Retry`` or
        ``Reject``; then not before the other calls of ``write`` have ended.
        """

    @abstractmethod
    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Write a batch to the sink; return when it has it.

        One call runs at a time, or up to ``inflight``. A batch that is written again has the same bytes and the same
        id. Have every call end, by a timeout if need be: a client that broke is closed when no call uses it.

        Args:
            batch: encoded events, at least one.
            batch_id: unique for all time; for a sink that can tell duplicates by it.

        Raises:
            Retry: to be asked again.
            Reject: some or all of the events will never be taken.
            Exception: anything else: ``release``, and another try after ``open``.

        """

    async def release(self) -> None:  # noqa: B027  as above
        """Close what ``open`` opened. It has a second; what it raises is logged."""

    def _make_encoder(self) -> Encoder:
        return JsonEncoder()

    # -- filling ------------------------------------------------------------------------------------------------------

    def emit(self, event: Any) -> bool:
        """Queue an event for the sink; from any thread. Never waits and never raises because of load.

        The event is encoded later: do not change it after this call, or have ``encode="now"``.

        Args:
            event: a ``msgspec.Struct``, a dataclass, a mapping, a pydantic model, or ``bytes`` that are ready.

        Returns:
            Whether the event was accepted. What is refused is counted with its reason.

        """
        return self._ring.emit(event)

    def _emit_encoded(self, event: Any) -> bool:
        payload = self.encoded(event)
        return payload is not None and self._ring.emit(payload)

    def encoded(self, event: Any) -> bytes | None:
        """Return an event encoded as it is now, for ``emit``; None where that fails, which is counted as refused."""
        try:
            return self._encoder.encode(event)
        except EncodeError as error:
            self._drops.last_error = self._delivery.last_error = text_of(error)
            self._ring.refuse("encode")
            return None

    async def publish(self, event: Any, durable: bool = False) -> bool:
        """Queue an event as ``emit`` does; with ``overflow="block"`` wait for room first.

        Args:
            event: as for ``emit``.
            durable: wait until the event is out of memory: committed to the spool or, without one, delivered.

        Returns:
            Whether the event was accepted; with ``durable`` also whether nothing was dropped since.

        """
        self._flusher.ensure_running()
        if self._overflow == "block":
            await self._flusher.room.wait_until(self._ring.has_room, None)
        if not durable:
            return self.emit(event)
        payload = self.encoded(event)
        before = self._dropped()
        if payload is None or not self._ring.emit(payload):
            return False
        place = self._ring.accepted - self._recovered()
        await self._flusher.progress.wait_until(lambda: self._reached(self._ring.left, place), None)
        return self._dropped() == before

    def _reached(self, count: int, place: int) -> bool:
        """Say whether the events up to a place are among ``count`` that left; if not, have the flusher go on."""
        if self._flusher.in_order(count) - self._recovered() >= place:
            return True
        self._flusher.ensure_running()
        return False

    def _recovered(self) -> int:
        """Count what the spool brought along. It stands before all else, so who waits for a place does not count it."""
        return 0 if self._flusher.store is None else self._flusher.store.recovered

    def _dropped(self) -> int:
        return sum(self._ring.books()["dropped"].values())

    def _wake(self) -> None:
        self._flusher.wake()

    # -- starting and ending ------------------------------------------------------------------------------------------

    def attach(self, manager: BackgroundTaskManager) -> None:
        """Have a manager show the flusher's task, and flush and close the publisher in its ``shutdown``.

        The first manager stays; without one the publisher is its own.
        """
        manager.attach(self)

    def attached(self, manager: BackgroundTaskManager) -> None:
        """Take note of the manager that shows the flusher's task; the first one stays."""
        if self._manager is None:
            self._manager = manager
            self._flusher.manager = manager

    @property
    def is_attached(self) -> bool:
        """Whether a manager shows the flusher's task."""
        return self._manager is not None

    @property
    def waits_for_room(self) -> bool:
        """Whether ``publish`` waits for room in a full queue."""
        return self._overflow == "block"

    async def start(self) -> Self:
        """Start the flusher on the running loop instead of at the first event; with ``connect`` open the sink, too.

        Raises:
            Exception: what ``open`` raises, if asked to connect.

        """
        self._flusher.ensure_running()
        if self._connect:
            await self._delivery.open()
        return self

    async def flush(self, deadline: float = 5.0) -> FlushReport:
        """Wait until every event accepted so far is delivered or dropped; batches that are not full go at once.

        Args:
            deadline: seconds to wait at most.

        """
        begun = time.monotonic()
        before = self._ring.books()
        target = self._ring.accepted - self._recovered()
        if self.has_left() and not self._closed:
            self._flusher.ensure_running()
            self._hurry(1)
            try:
                await self._flusher.progress.wait_until(lambda: self._reached(self._ring.finished, target), deadline)
            finally:
                self._hurry(-1)
        return self._report(begun, before["delivered"], sum(before["dropped"].values()))

    def _hurry(self, step: int) -> None:
        self._flushes += step
        self._flusher.hurry(self._flushes > 0)

    def _report(self, begun: float, delivered: int, dropped: int) -> FlushReport:
        books = self._ring.books()
        return {
            "status": "deadline" if books["queue_events"] or books["spooled"] else "flushed",
            "delivered": books["delivered"] - delivered,
            "dropped": sum(books["dropped"].values()) - dropped,
            "queued": books["queue_events"],
            "spooled": books["spooled"],
            "duration_seconds": time.monotonic() - begun,
            "last_error": self._delivery.last_error,
        }

    async def close(self, deadline: float = 5.0) -> FlushReport:
        """Refuse further events, flush, spool or drop the rest, close the client. It returns by the deadline.

        A second call waits for the first one and returns its report.

        Args:
            deadline: seconds for all of it.

        Returns:
            What was done. Its status is ``"deadline"`` if events had to be spooled or dropped for lack of time.

        """
        self._ring.close()
        # Whoever waits for room is refused.
        self._flusher.room.notify()
        here = asyncio.get_running_loop()
        loop = self._flusher.loop
        if loop is not None and loop is not here and loop.is_running():
            there = asyncio.run_coroutine_threadsafe(self._close_once(deadline), loop)
            return await asyncio.wrap_future(there)
        return await self._close_once(deadline)

    async def _close_once(self, deadline: float) -> FlushReport:
        if self._closing is None or self._closing.get_loop() is not asyncio.get_running_loop():
            self._closing = asyncio.ensure_future(self._close(deadline, self._ring.books()))
        # One caller that is cancelled must not keep the events of the others.
        return await asyncio.shield(self._closing)

    async def _close(self, deadline: float, before: Books) -> FlushReport:
        begun = time.monotonic()
        end = begun + deadline
        kept = min(deadline * KEPT_SHARE, MOST_KEPT)
        await self.flush(max(deadline - kept, 0))
        self._closed = True
        # Each step has a part of what is left: each may meet a sink or a disk that hangs.
        await self._flusher.stop((end - time.monotonic()) / 3)
        in_time = not self.has_left()
        await self._flusher.clear((end - time.monotonic()) / 3)
        # Begun before the rest: a spool that nobody had the time to close would stay locked.
        store_closed = None if self._flusher.store is None else self._flusher.store.close()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + end - time.monotonic()):
                await self._delivery.release()
                await self._dead_letters.close()
                if store_closed is not None:
                    await store_closed
        self._thread.stop()
        self._drops.stop()
        if self._manager is not None:
            self._manager.detach(self)
        report = self._report(begun, before["delivered"], sum(before["dropped"].values()))
        report["status"] = "flushed" if in_time else "deadline"
        return report

    async def __aenter__(self) -> Self:
        """Start; see ``start``."""
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close, with the default deadline."""
        await self.close()

    def has_left(self) -> bool:
        """Say whether accepted events are neither delivered nor dropped."""
        return self._ring.finished < self._ring.accepted

    def after_fork(self) -> None:
        """Begin anew in the child of a fork: an empty queue, an id of its own, no client; the parent keeps its own."""
        self._ring.reset()
        self._thread.forget()
        self._dead_letters.forget()
        self._delivery.forget()
        self._drops.forget()
        self._flusher.forget()
        if self._flusher.store is not None:
            self._flusher.store.forget()
        self._flushes = 0
        self._closing = None

    # -- looking at it ------------------------------------------------------------------------------------------------

    def stats(self) -> PublisherStats:
        """Return counters and health. Safe from any thread."""
        books = self._ring.books()
        store = self._flusher.store
        since, loop = self._flusher.since, self._flusher.loop
        age = 0.0 if since is None or loop is None or not books["queue_events"] else max(loop.time() - since, 0.0)
        return {
            "name": self.name,
            "state": self._state(),
            "accepted": books["accepted"],
            "recovered": books["recovered"],
            "delivered": books["delivered"],
            "spooled": books["spooled"],
            "retried": self._delivery.retried,
            "spool_errors": 0 if store is None else store.errors,
            "queue_events": books["queue_events"],
            "queue_bytes": books["queue_bytes"],
            "dropped": books["dropped"],
            "refused": books["refused"],
            "oldest_age": age,
            "last_error": self._delivery.last_error or (None if store is None else store.last_error),
        }

    def _state(self) -> State:
        if self._closed:
            return "closed"
        if self._drops.is_losing:
            return "dropping"
        if self._delivery.failing:
            return "retrying" if self._flusher.store is None else "spooling"
        return "ok"


def _check_counts(**counts: int) -> None:
    for option, number in counts.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InvalidOptionError(f"{option} must be a whole number, 1 or more; got {describe(number)}")


def _check_seconds(**lengths: float) -> None:
    for option, seconds in lengths.items():
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < float("inf"):
            raise InvalidOptionError(f"{option} must be a number of seconds, 0 or more; got {describe(seconds)}")


def _open_spool(path: str | os.PathLike[str]) -> Spool:
    # Late: a publisher without a spool needs no SQLite.
    from bgtasks.events.spool import Spool as SpoolOnDisk

    return SpoolOnDisk(path)
