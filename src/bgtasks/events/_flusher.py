"""The one task of a publisher: takes batches out of the ring, encodes them and has them delivered."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from asyncio.events import _get_running_loop
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Final, Protocol

from bgtasks._notifier import Notifier
from bgtasks.errors import text_of
from bgtasks.events._dead_letters import DeadLetters
from bgtasks.events._delivery import Batch, Delivery, Settle
from bgtasks.events._drops import DropReporter
from bgtasks.events._guard import at_work
from bgtasks.events._store import Store
from bgtasks.events._waker import Waker
from bgtasks.events._writers import Writers
from bgtasks.events.encoding import Encoder
from bgtasks.events.errors import EncodeError
from bgtasks.events.ring import Ring

__all__ = ["BatchLimits", "Flusher", "TaskManager"]

logger = logging.getLogger("bgtasks.events")

# What a flusher that is cancelled by others (a loop that ends, cancel_all) may take to empty its ring, in seconds.
LAST_FLUSH: Final = 1.0
DELAY_AFTER_BUG: Final = 1.0
# One that others cancelled on a loop that goes on is back for what is left after so many seconds.
ABSENCE: Final = 0.1
# The flusher has the loop for so many seconds at a time, or for one batch.
SLICE: Final = 0.001
DELAY_AFTER_SPOOL_ERROR: Final = 0.1
# A write past the spool that takes longer has the events behind it go to the disk, in seconds.
PATIENCE: Final = 0.25
# Into a spool go so many batches in one visit of its thread.
SPOOLED_AT_ONCE: Final = 4

# A task that nobody else refers to is kept here: the loop itself holds only weak references.
_running: set[asyncio.Task[None]] = set()
# Flushers that have events and no loop: those of a publisher that its maker has let go of, too, are sent at exit.
_waiting: set[Flusher] = set()


class TaskManager(Protocol):
    """What the flusher asks of a manager: a task that it shows and does not own."""

    def task_factory(self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, None], **kwargs: Any) -> Any:
        """Return the task for a coroutine."""
        ...


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """When a batch goes: at so many events, so many bytes or so many seconds, whichever is first; how many at once."""

    events: int
    volume: int
    linger: float
    event_volume: int
    inflight: int


class Flusher:
    """Empties a ring into a sink, on one loop at a time.

    It starts with the first event emitted on a loop, and again on another loop when its own is gone. A batch that was
    on its way then is written again, with its id.

    Args:
        name: the publisher's name.
        ring: what it empties.
        encoder: turns events into payloads.
        limits: when a batch goes.
        delivery: writes batches.
        dead_letters: where events go that cannot be encoded.
        drops: told of the loop to log on.
        direct: with a store, try the sink first while the store is empty.

    """

    # None where there is no spool.
    store: Store | None = None
    # The task is shown there; None for a task of the loop alone.
    manager: TaskManager | None = None

    def __init__(
        self,
        name: str,
        ring: Ring,
        encoder: Encoder,
        limits: BatchLimits,
        delivery: Delivery,
        dead_letters: DeadLetters,
        drops: DropReporter,
        direct: bool,
    ) -> None:
        self._name = name
        self._ring = ring
        self._encoder = encoder
        self._limits = limits
        self._delivery = delivery
        self._dead_letters = dead_letters
        self._drops = drops
        self._direct = direct
        # For good; the child of a fork cannot open it again.
        self._stopped = False
        self.forget()

    def forget(self) -> None:
        """Begin anew, with an id of its own and without a task; for the child of a fork, too."""
        _waiting.discard(self)
        self._publisher_id = uuid.uuid4().hex
        self._numbers = count()
        self._start_lock = threading.Lock()
        self._waker: Waker | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        # Taken out and not settled, oldest first.
        self._pending: deque[Batch] = deque()
        # Rings whenever the books have changed, and when the ring has got room.
        self.progress = Notifier()
        self.room = Notifier()

    # -- starting and stopping ----------------------------------------------------------------------------------------

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop it runs on, None while it does not run."""
        return None if self._waker is None else self._loop

    @property
    def since(self) -> float | None:
        """A point on the loop's clock that no queued event was emitted before; None while it does not run."""
        waker, oldest = self._waker, self._oldest()
        if waker is None or oldest is None:
            return None if waker is None else waker.since
        return min(waker.since, oldest.since)

    def in_order(self, count: int) -> int:
        """Return how many of the first ``count`` events to leave are the first that came, none of them overtaken.

        Args:
            count: the ring's ``finished`` or ``left``, read before this call.

        """
        oldest = self._oldest()
        return count if oldest is None else min(count, oldest.place)

    def _oldest(self) -> Batch | None:
        """Return the batch that later ones may have overtaken, None if none can; from any thread."""
        if self._limits.inflight > 1:
            with suppress(IndexError):
                return self._pending[0]
        return None

    def wake(self) -> None:
        """Take a call of the ring, from any thread: pass it on, or start on the loop of this thread."""
        waker = self._waker
        if waker is not None and self._is_alive():
            try:
                waker.wake()
            except RuntimeError:
                # The loop was closed just now.
                pass
            else:
                return
        here = _get_running_loop()
        if here is None:
            # Nobody to do it; the next event asks again.
            self._ask_again()
        else:
            self._start(here)

    def ensure_running(self) -> None:
        """Start on the running loop unless it runs on one that is alive, or was stopped."""
        if self._stopped:
            return
        if self._waker is None or not self._is_alive():
            self._start(asyncio.get_running_loop())

    def _is_alive(self) -> bool:
        """Say whether its loop runs, or may go on running: no other one runs in this thread instead."""
        loop, task = self._loop, self._task
        if loop is None or loop.is_closed() or (task is not None and task.done()):
            return False
        return loop.is_running() or _get_running_loop() is None

    def _is_needed(self) -> bool:
        return bool(self._pending or len(self._ring))

    def _come_back(self) -> None:
        if self._is_needed():
            self.ensure_running()

    def _ask_again(self) -> None:
        if self._is_needed():
            _waiting.add(self)
        while self._ring.arm(len(self._ring) + 1, 0):
            # Another thread emitted in between.
            continue

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._start_lock:
            if self._waker is not None and self._is_alive():
                return
            if self._task is not None:
                # What it opened belongs to its loop, which is gone.
                self._delivery.forget()
                self._task = None
            limits = self._limits
            waker = self._waker = Waker(self._ring, loop, limits.events, limits.volume, limits.linger)
            self._loop = loop
        _waiting.discard(self)
        self._drops.use(loop)
        # In an empty context: neither the task nor its callbacks are to keep that of a request that emitted first.
        Context().run(self._begin, loop, waker)

    def _begin(self, loop: asyncio.AbstractEventLoop, waker: Waker) -> None:
        coro, name = self._run(waker), f"publisher {self._name}"
        if self.manager is None:
            task: asyncio.Task[None] = asyncio.Task(coro, loop=loop, name=name)
        else:
            task = self.manager.task_factory(loop, coro, name=name)
        self._task = task
        _running.add(task)
        task.add_done_callback(partial(self._ended, waker))

    def _ended(self, waker: Waker, task: asyncio.Task[None]) -> None:
        _running.discard(task)
        if waker is self._waker:
            # Cancelled by others; a stopped one has no waker any more.
            self._waker = None
            self._ask_again()
            if self._is_needed():
                # The ring did not call for an event that came after the end of the task and before this. A loop that
                # ends never gets there.
                task.get_loop().call_later(ABSENCE, self._come_back, context=Context())
            # Whoever waits for the books starts the next one: another event may never come.
            self.on_progress()

    def hurry(self, urgent: bool) -> None:
        """Have batches go at once, or linger again; from any thread."""
        waker, loop = self._waker, self._loop
        if waker is not None and loop is not None:
            # A loop that is closed has nothing to hurry.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(waker.hurry, urgent)

    async def stop(self, timeout: float) -> None:
        """Cancel the task and wait for its end; on its loop.

        Args:
            timeout: seconds; a task that is not through by then is left to itself and its books are no longer heard.

        """
        task = self._task
        self._stopped = True
        _waiting.discard(self)
        if task is not None and not task.done() and task.get_loop() is asyncio.get_running_loop():
            task.cancel()
            await asyncio.wait((task,), timeout=timeout)
        self._waker = None

    # -- the task -----------------------------------------------------------------------------------------------------

    async def _run(self, waker: Waker) -> None:
        at_work.set(self._ring)
        courier = None if self.store is None else asyncio.create_task(self._forward(waker))
        writers = Writers(self._delivery, self._limits.inflight, self._name)
        try:
            await self._flush_for_ever(waker, writers)
        except asyncio.CancelledError:
            await writers.stop()
            # A call in flight may have left the connection in the middle of an answer.
            await self._delivery.release()
            if waker is self._waker and not self._stopped:
                await self._flush_once_more(waker, writers)
            raise
        finally:
            await writers.stop()
            if courier is not None:
                courier.cancel()
                await asyncio.wait((courier,))
            if self.store is not None:
                await self.store.stop_passing()
            await self._delivery.release()

    async def _flush_for_ever(self, waker: Waker, writers: Writers) -> None:
        # One that was given up, because a write swallowed its cancellation, ends when that returns.
        resumed = time.perf_counter()
        while waker is self._waker:
            try:
                if self._waiting_for(writers) is None:
                    await waker.wait()
                await self._flush(waker, writers)
            except Exception:
                # A bug of ours, or of a hook: the pipe goes on.
                logger.exception("The flusher of publisher %r failed and goes on", self._name)
                await asyncio.sleep(DELAY_AFTER_BUG)
            # A sink that never suspends must not keep the loop from others, nor a program that emits more than a batch
            # in each iteration fill the ring while there is time. Not the loop's clock: uvloop's stands still here.
            if not self._ring or time.perf_counter() - resumed >= SLICE:
                await asyncio.sleep(0)
                resumed = time.perf_counter()

    async def _flush_once_more(self, waker: Waker, writers: Writers) -> None:
        try:
            async with asyncio.timeout(LAST_FLUSH):
                while self._is_needed():
                    await self._flush(waker, writers)
                    if not len(self._ring):
                        await writers.wait_idle()
        except TimeoutError:
            logger.warning(
                "The loop of publisher %r ends with %d events in the queue; close the publisher first",
                self._name,
                self._ring.books()["queue_events"],
            )

    async def _forward(self, waker: Waker) -> None:
        assert self.store is not None
        while waker is self._waker:
            try:
                await self.store.forward()
            except Exception:
                logger.exception("The spool of publisher %r failed and goes on", self._name)
                await asyncio.sleep(DELAY_AFTER_BUG)

    async def _flush(self, waker: Waker, writers: Writers) -> None:
        if self._limits.inflight == 1:
            await self._flush_batch(waker)
        else:
            await self._hand_out(waker, writers)

    async def _flush_batch(self, waker: Waker) -> None:
        """Deliver what is pending or, if nothing is, the next batch of the ring."""
        await self._dead_letters.wait_written()
        if not self._pending:
            self._take(waker)
        settle = partial(self._settle, waker)
        if self.store is not None:
            await self._spool(self.store, waker, settle)
        while self._pending and waker is self._waker:
            await self._delivery.deliver(self._pending[0], settle)
            self._forget_settled()
            self.on_progress()
        # Also where nothing came of the events, because none could be encoded.
        self.on_progress()

    async def _hand_out(self, waker: Waker, writers: Writers) -> None:
        """Start what is pending or, if nothing is, the next batch of the ring, as far as writers are free."""
        await writers.wait_free()
        await self._dead_letters.wait_written()
        if self._waiting_for(writers) is None:
            self._take(waker)
        while waker is self._waker and (batch := self._waiting_for(writers)) is not None:
            writers.start(batch, partial(self._settle_part, waker, batch))
            await writers.wait_free()
        # Also where nothing came of the events, because none could be encoded.
        self.on_progress()

    def _waiting_for(self, writers: Writers) -> Batch | None:
        """Return the oldest batch that is in no writer's hands."""
        return next((batch for batch in self._pending if batch not in writers), None)

    def _settle_part(self, waker: Waker, batch: Batch, number: int, outcome: str) -> None:
        self._settle(waker, number, outcome)
        if not batch.parts and batch in self._pending:
            self._pending.remove(batch)
        self.on_progress()

    def _forget_settled(self) -> None:
        while self._pending and not self._pending[0].parts:
            self._pending.popleft()

    def _take(self, waker: Waker) -> None:
        limits = self._limits
        for _ in range(1 if self.store is None else SPOOLED_AT_ONCE):
            at, since = waker.now, waker.since
            place = 0 if limits.inflight == 1 else self._taken()
            events = self._ring.take(limits.events, limits.volume)
            if not events:
                break
            if not len(self._ring):
                waker.emptied(at)
            if self.room:
                self.room.notify(len(events))
            self._encode(events, place, since)
            if len(events) < limits.events:
                break

    def _taken(self) -> int:
        """Count the events that have left the queue."""
        books = self._ring.books()
        return books["accepted"] - books["queue_events"] + books["in_flight"]

    def _encode(self, events: list[Any], place: int = 0, since: float = 0.0) -> None:
        payloads, volume, failed = self._encoder.encode_batch(events)
        if payloads and type(events[0]) is not bytes:
            self._ring.measured(volume // len(payloads))
        too_large: list[Any] = []
        if volume > self._limits.event_volume:
            too_large = [payload for payload in payloads if len(payload) > self._limits.event_volume]
            if too_large:
                payloads = [payload for payload in payloads if len(payload) <= self._limits.event_volume]
        for batch in self._batches(payloads, volume):
            self._pending.append(Batch.of(f"{self._publisher_id}-{next(self._numbers)}", batch, place, since))
        if failed:
            error = failed[0][1]
            self._drops.last_error = self._delivery.last_error = text_of(error)
            self._ring.settle(len(failed), "encode")
            self._bury([event for event, _ in failed], "encode", error)
        if too_large:
            self._ring.settle(len(too_large), "too_large")
            self._bury(too_large, "too_large", None)

    def _bury(self, events: list[Any], reason: str, error: EncodeError | None) -> None:
        self._dead_letters.add(events, self._publisher_id, reason, error)

    def _batches(self, payloads: list[Any], volume: int) -> list[list[Any]]:
        """Return payloads in batches that keep to the limit of bytes: sizes were estimates when they were taken."""
        if volume <= self._limits.volume:
            return [payloads] if payloads else []
        batches: list[list[Any]] = []
        room = 0
        for payload in payloads:
            room -= len(payload)
            if room < 0 or not batches:
                batches.append([])
                room = self._limits.volume - len(payload)
            batches[-1].append(payload)
        return batches

    async def _spool(self, store: Store, waker: Waker, settle: Settle) -> None:
        """Commit what is pending, and deliver it past a spool that fails once there is nothing in it to overtake."""
        while self._pending and waker is self._waker:
            first = self._pending[0]
            tries = self._direct and store.may_pass(first)
            passed = tries and await store.pass_by(first, settle, PATIENCE) is None
            if not passed and not await store.append(self._pending):
                delay: float | None = DELAY_AFTER_SPOOL_ERROR
                if first.parts and store.may_pass(first):
                    delay = await store.pass_by(first, settle, DELAY_AFTER_SPOOL_ERROR)
                await asyncio.sleep(delay or 0)
            self._forget_settled()
            self.on_progress()

    def _settle(self, waker: Waker, number: int, outcome: str) -> None:
        # A flusher that was given up, because its write would not end, has no say any more.
        if waker is self._waker:
            self._ring.settle(number, outcome)

    def on_progress(self) -> None:
        """Have those look again who wait for the books to change."""
        if self.progress:
            self.progress.notify()

    # -- the end ------------------------------------------------------------------------------------------------------

    async def clear(self, timeout: float) -> None:
        """Spool what is left, or drop it with the reason ``deadline``; after ``stop``.

        Args:
            timeout: seconds for the disk.

        """
        if self.store is not None or self._dead_letters.is_kept:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._save(self.store)
        left = [part for batch in self._pending for part in reversed(batch.parts)]
        self._pending.clear()
        for _, payloads in left:
            self._ring.settle(len(payloads), "deadline")
        while events := self._ring.take(self._limits.events, self._limits.volume):
            self._ring.settle(len(events), "deadline")
        self.on_progress()
        for part_id, payloads in left:
            self._dead_letters.add(payloads, part_id, "deadline", None)

    async def _save(self, store: Store | None) -> None:
        while events := self._ring.take(self._limits.events, self._limits.volume):
            self._encode(events)
            await asyncio.sleep(0)
        if store is not None:
            await store.append(self._pending)
