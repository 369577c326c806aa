"""Bookkeeping of background tasks: records, timeouts, counters. No logging and no policy.

The Python twin of ``_registry.pyx``: the same names, signatures, errors and behaviour where no compiler was at hand.
What that file says of threads and ownership holds here, too.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import os
import threading
from asyncio import BaseEventLoop, CancelledError, Task, current_task, iscoroutine
from asyncio.events import _get_running_loop
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from time import monotonic
from time import time as wall_clock
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Final, TypeVar, final

from bgtasks import errors
from bgtasks._task import TrackedTask, drive, record_of, run, run_queued, starts_eagerly

if TYPE_CHECKING:
    from bgtasks.info import FinishedTask, ManagerStats, TaskInfo
    from bgtasks.info import NameStats as NameCounters

Result = TypeVar("Result")

DEFAULT_NAME: Final = "background_task"
MAX_NAMES: Final = 1000
OTHER_NAMES: Final = "(other)"
CANCEL_ON_EXIT: Final = 1
RERAISE_ON_EXIT: Final = 2
OUTCOMES: Final = ("running", "completed", "failed", "cancelled", "timed_out", "abandoned")

RUNNING, COMPLETED, FAILED, CANCELLED, TIMED_OUT, ABANDONED = range(6)

# One bucket below a microsecond, then eight to a power of two, up to 2**41 microseconds (25 days).
BUCKETS: Final = 329
IDS_AT_ONCE: Final = 1024
TICKS_A_SECOND: Final = 1000.0
SHORTEST_WAIT: Final = 1e-6
MAX_TICK: Final = 1 << 62

# Every LoopRecords that holds a record: neither it nor its manager may be collected under a running task.
_in_use: set[LoopRecords] = set()
# Guards the records of functions: their threads share them. The compiled twin does all this in one go under the GIL.
# Re-entrant, for the text of an error that goes into the history may submit.
_calls_lock = threading.RLock()


def _renew_lock() -> None:
    global _calls_lock
    _calls_lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    # Another thread of the parent may hold it, and there is none in the child to let it go.
    os.register_at_fork(after_in_child=_renew_lock)


@final
class NameStats:
    """Counters and the histogram of durations of all tasks of one name."""

    __slots__ = ("buckets", "counts", "started")

    def __init__(self) -> None:
        self.started = 0
        self.counts = [0] * len(OUTCOMES)
        # Bucket -> number: most names use a few of the 329.
        self.buckets: dict[int, int] = {}

    def count_end(self, outcome: int, duration: float) -> None:
        self.counts[outcome] += 1
        bucket = _bucket_of(duration)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1

    def add(self, other: NameStats) -> None:
        for outcome, number in enumerate(other.counts):
            self.counts[outcome] += number
        for bucket, number in list(other.buckets.items()):
            self.buckets[bucket] = self.buckets.get(bucket, 0) + number
        # Last: of a task that starts and ends while this reads, the end must not be seen without the start.
        self.started += other.started

    def ended(self) -> int:
        return sum(self.counts[1:])

    def percentile(self, share: float) -> float | None:
        # Nearest rank over the buckets; the middle of a bucket is at most 6.25 % off.
        total = sum(self.buckets.values())
        seen = 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= share * total:
                return _middle_of(bucket)
        return None

    def as_dict(self) -> NameCounters:
        """Return the counters and the 50th and 99th percentile of the durations, in seconds (None before the first)."""
        return {
            "started": self.started,
            "in_flight": self.started - self.ended(),
            "completed": self.counts[COMPLETED],
            "failed": self.counts[FAILED],
            "cancelled": self.counts[CANCELLED],
            "timed_out": self.counts[TIMED_OUT],
            "abandoned": self.counts[ABANDONED],
            "p50_seconds": self.percentile(0.50),
            "p99_seconds": self.percentile(0.99),
        }


def _bucket_of(seconds: float) -> int:
    microseconds = seconds * 1e6
    if not microseconds >= 1.0:
        return 0
    mantissa, exponent = math.frexp(microseconds)
    return min((exponent - 1) * 8 + int(mantissa * 16.0) - 7, BUCKETS - 1)


def _middle_of(bucket: int) -> float:
    if bucket == 0:
        return 0.5e-6
    octave, part = divmod(bucket - 1, 8)
    return (8.5 + part) / 16.0 * 2.0 ** (octave + 1) * 1e-6


@final
class Record:
    """What the registry keeps on one task while it lives.

    Its ``LoopRecords`` owns it from creation to the end of the task; the task's slot and the coroutine around the
    user's share it. ``release`` cuts every reference at the end.
    """

    __slots__ = (
        "_context",
        "_coro",
        "_created",
        "_duration",
        "_group",
        "_marks",
        "_name",
        "_outcome",
        "_place",
        "_task",
        "_task_id",
        "_timeout",
        "expired",
        "holds_group_place",
        "holds_place",
        "name_stats",
        "observed",
        "paused",
        "queued",
        "records",
        "tick",
    )

    # Both are set by ``enroll``; None once the record is released.
    records: LoopRecords
    name_stats: NameStats
    _coro: Any
    _task: Any
    _name: str | None
    _context: Mapping[str, Any] | None
    # The contextvars.Context of a task that fire() has not started yet, then the future of a queued one.
    _place: Any
    # The tasks of the executor that started this one, None for any other task.
    _group: Group | None
    _created: float
    _timeout: float
    _duration: float
    # When its timeout is over, as a tick of the wheel; -1 while it is not armed.
    tick: int
    _task_id: int
    _outcome: int
    observed: bool
    expired: bool
    queued: bool
    # Cancelled before its first step: stands in _task.pause, the user's coroutine was not entered.
    paused: bool
    holds_place: bool
    holds_group_place: bool
    _marks: int

    def __init__(self) -> None:
        raise TypeError("a Record is made by its registry")

    @property
    def coro(self) -> Any:
        """The user's coroutine."""
        return self._coro

    @property
    def place(self) -> Any:
        """The future that a queued task waits on, resolved when it may run."""
        return self._place

    @property
    def task(self) -> Any:
        """The task, or None before it is built and after its end."""
        return self._task

    @property
    def task_id(self) -> int:
        """The number that tells this task from all others of its manager."""
        return self._task_id

    @property
    def name(self) -> str:
        """The name given, or the task's own for one that came through a task factory."""
        if self._name is None:
            task = self._task
            return "" if task is None else str(task.get_name())
        return self._name

    @property
    def context(self) -> Mapping[str, Any]:
        """The mapping for log records, an empty dict if none was given."""
        context = self._context
        return {} if context is None else context

    @property
    def timeout(self) -> float | None:
        """The timeout in seconds, or None."""
        return self._timeout if self._timeout > 0 else None

    @property
    def duration(self) -> float:
        """How long the task ran, in seconds, or has run if it still does."""
        # One look at ``records``: the task may end in its own thread while this one asks.
        records: LoopRecords | None = self.records
        return self._duration if self._outcome != RUNNING or records is None else records.now() - self._created

    @property
    def outcome(self) -> str:
        """One of ``OUTCOMES``."""
        return OUTCOMES[self._outcome]

    @property
    def is_observed(self) -> bool:
        """True for a task that came through a task factory: counted and shown, not owned."""
        return self.observed

    @property
    def group(self) -> Group | None:
        """The tasks of the executor that started this one, None for any other task and after its end."""
        return self._group

    @property
    def marks(self) -> int:
        """What its executor is to do with it at its exit: a sum of CANCEL_ON_EXIT and RERAISE_ON_EXIT."""
        return self._marks

    @property
    def coroutine_name(self) -> str:
        """The qualified name of the user's coroutine."""
        return _name_of(self._coro)

    def info(self) -> TaskInfo:
        """Return what there is to tell about the task as a ``TaskInfo``."""
        return {
            "task_id": self._task_id,
            "name": self.name,
            "coroutine": _name_of(self._coro),
            "state": "queued" if self.queued else OUTCOMES[self._outcome],
            "age_seconds": self.duration,
            "timeout": self.timeout,
            "context": self.context,
            "done": self._outcome != RUNNING,
            "cancelled": self._outcome in (CANCELLED, TIMED_OUT),
        }

    def complete(self, result: Result) -> Result:
        """Settle the record of a task whose coroutine returned ``result``, and return that."""
        if self._outcome != RUNNING:
            return result
        self.records.finish(self, COMPLETED, None)
        registry = self.records.registry
        if registry._muted is None or registry._muted.get(registry._muted_level) is not False:
            self.report(None)
        self.release()
        return result

    def fail(self, error: BaseException) -> None:
        """Settle the record of a task whose coroutine raised ``error``."""
        if self._outcome != RUNNING:
            return
        records = self.records
        task = self._task
        if task is None:
            # An eager task that has not left its constructor.
            task = self._task = current_task(records.loop)
        if self.queued or self.paused:
            self._coro.close()
        if isinstance(error, GeneratorExit) and not _is_running(task):
            # Closed from outside: nobody runs this coroutine any more.
            records.finish(self, ABANDONED, None)
        elif not isinstance(error, CancelledError):
            records.finish(self, FAILED, error)
            if not self.observed and task is not None:
                task.add_done_callback(_retrieve)
        elif self.expired and task.cancelling() <= 1:
            records.finish(self, TIMED_OUT, None)
        else:
            records.finish(self, CANCELLED, None)
        self.report(error)
        self.release()

    def settle(self, task: Task[Any]) -> None:
        """Settle the record of a task that ended without entering its coroutine; do nothing for any other."""
        if self._outcome != RUNNING:
            return
        self._coro.close()
        if not task.cancelled():
            error = task.exception()
            if error is not None:
                self.fail(error)
                return
            # A task of a foreign factory that never ran what it was given.
            self.records.finish(self, ABANDONED, None)
        else:
            self.records.finish(self, TIMED_OUT if self.expired and task.cancelling() <= 1 else CANCELLED, None)
        self.report(None)
        self.release()

    def cancel(self, message: Any = None) -> bool:
        """Ask the task to cancel, also one that ``fire`` has not started yet; return False if it has ended."""
        if self._outcome != RUNNING:
            return False
        if self._task is not None:
            return bool(self._task.cancel(message))
        if isinstance(self._place, Context):
            self._coro.close()
            self.records.finish(self, CANCELLED, None)
            self.report(None)
            self.release()
            return True
        # An eager task that has not left its constructor.
        task = current_task(self.records.loop)
        return task is not None and task.cancel(message)

    def begin(self) -> None:
        """Mark a queued task as running: its timeout and its duration count from here."""
        self.queued = False
        self.records.queued -= 1
        self._place = None
        self._created = self.records.now()
        self.records.arm(self)

    def begin_call(self) -> bool:
        """Mark a queued function as running; return False if it was settled before. Safe from any thread."""
        with _calls_lock:
            if self._outcome != RUNNING:
                return False
            self.queued = False
            self.records.queued -= 1
            self._created = self.records.now()
        return True

    def finish_call(self, outcome: str, error: BaseException | None = None, if_queued: bool = False) -> bool:
        """Settle the record of a function, or only a queued one; return whether that was done. Safe from any thread."""
        with _calls_lock:
            if self._outcome != RUNNING or (if_queued and not self.queued):
                return False
            self.records.finish(self, OUTCOMES.index(outcome), error)
        return True

    def report_call(self, error: BaseException | None = None) -> None:
        """Report the end of a function that ``finish_call`` settled; called once, by whoever settled it."""
        registry = self.records.registry
        try:
            if (
                self._outcome != COMPLETED
                or registry._muted is None
                or registry._muted.get(registry._muted_level) is not False
            ):
                self.report(error)
        finally:
            self.release()
            # The call refers to its record.
            self._coro = None

    def report(self, error: BaseException | None) -> None:
        try:
            self.records.registry._report(self, error)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        self._task = None
        self._context = None
        self._place = None
        self._group = None
        self.records = None  # type: ignore[assignment]
        self.name_stats = None  # type: ignore[assignment]


def _wrap(record: Record, function: Callable[[Any, Record], Coroutine[Any, Any, Any]]) -> Coroutine[Any, Any, Any]:
    """Return the native coroutine around the user's."""
    coro = record._coro
    return function(coro if type(coro) is CoroutineType else drive(coro), record)


def _is_running(task: Task[Any]) -> bool:
    """Tell whether the current step is one of this task."""
    loop = _get_running_loop()
    return loop is not None and current_task(loop) is task


def _nothing() -> None:
    """Do nothing."""


def _name_of(coro: Any) -> str:
    name: str | None = getattr(coro, "__qualname__", None)
    return type(coro).__qualname__ if name is None else name


def _retrieve(task: Task[Any]) -> None:
    """Mark a failure as seen: it was reported, the loop's "never retrieved" must not follow."""
    if not task.cancelled():
        task.exception()


def _settle_around(record: Record, wrapper: Coroutine[Any, Any, Any], task: Task[Any]) -> None:
    """Settle the record of a task that a foreign factory built, which may never have entered the coroutine it got."""
    wrapper.close()
    record.settle(task)


@final
class TimerWheel:
    """Timeouts by the millisecond: O(1) to arm and to disarm, O(log n) in the number of different ticks to advance.

    A tick is a number of milliseconds since the wheel's start. The compiled twin has a hierarchical wheel; here a dict
    of slots, with a heap of their ticks, does the same work faster. A slot that empties is forgotten at once, its tick
    when the heap is twice as large as it needs to be.
    """

    __slots__ = ("_due", "_heap", "_slots", "armed", "now")

    def __init__(self) -> None:
        self.armed = 0
        self.now = 0
        self._slots: dict[int, dict[Record, None]] = {}
        self._heap: list[int] = []
        self._due: dict[Record, None] = {}

    def arm(self, record: Record, tick: int) -> None:
        record.tick = tick = max(tick, self.now + 1)
        slot = self._slots.get(tick)
        if slot is None:
            slot = self._slots[tick] = {}
            if len(self._heap) > 64 and len(self._heap) > 2 * len(self._slots):
                self._heap = list(self._slots)
                heapq.heapify(self._heap)
            else:
                heapq.heappush(self._heap, tick)
        slot[record] = None
        self.armed += 1

    def disarm(self, record: Record) -> None:
        slot = self._slots.get(record.tick)
        if slot is not None and record in slot:
            del slot[record]
            if not slot:
                del self._slots[record.tick]
        else:
            del self._due[record]
        record.tick = -1
        self.armed -= 1
        if self.armed == 0:
            # Emptied, a dict keeps the room it once needed; a new one does not.
            self._slots = {}
            self._heap = []

    def next_tick(self) -> int:
        while self._heap and self._heap[0] not in self._slots:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else MAX_TICK

    def advance(self, tick: int) -> None:
        while self.next_tick() <= tick:
            self._due.update(self._slots.pop(heapq.heappop(self._heap)))
        self.now = max(tick, self.now)

    def pop_due(self) -> Record | None:
        for record in self._due:
            self.disarm(record)
            return record
        return None


@final
class LoopRecords:
    """The live records of one event loop, in order of creation, with their timers and counters.

    Belongs to the thread of its loop. While it holds a record it owns itself, so that neither it nor its manager can be
    collected under a running task.
    """

    def __init__(self, registry: Registry, loop: asyncio.AbstractEventLoop) -> None:
        self.registry = registry
        self.loop = loop
        # A loop with a clock of its own (a test's virtual one) is asked; asyncio's and uvloop's is the monotonic clock.
        stock = getattr(type(loop), "time", None) is BaseEventLoop.time or type(loop).__module__ == "uvloop"
        self.now: Callable[[], float] = monotonic if stock else loop.time
        self.task_factory: Callable[[], Any] = loop.get_task_factory
        self.records: dict[int, Record] = {}
        self.live = 0
        self.observed = 0
        # Those among the live that wait for a place.
        self.queued = 0
        # The owned tasks left when somebody who waits for "all done" wants to hear of it; -1 if nobody does.
        self.wake_at = -1
        self.next_id = 0
        self.last_id = 0
        self.names: dict[str, NameStats] = {}
        self.other_names = NameStats()
        self.wheel = TimerWheel()
        self.wheel_start = self.now()
        self.timer: asyncio.TimerHandle | None = None
        self.timer_tick = 0
        self.timer_wanted = False
        self.eager: bool | None = None
        # Records that fire() took since the batch was scheduled; None if no batch is open.
        self.batch: list[Record] | None = None
        self.batch_clock = 0.0
        # When a task last ended, which is when the next one of a batch starts.
        self.last_end = 0.0

    def builds_itself(self, factory: Any) -> bool:
        """Tell whether tasks are built here: the loop has no factory, asyncio's eager one, or the manager's own."""
        return factory is None or factory is self.registry._eager_factory or factory == self.registry.task_factory

    def can_start_eagerly(self) -> bool:
        if self.eager is None:
            self.eager = self.registry._has_eager_tasks(self.loop)
        return self.eager

    def enroll(self, coro: Any, name: str, timeout: float, context: Mapping[str, Any] | None, observed: bool) -> Record:
        """Make the record of a task to come and put it at the end of the list."""
        stats = self.names.get(name)
        if stats is None:
            stats = self.stats_of(name)
        record = Record.__new__(Record)
        record._coro = coro
        record.records = self
        record.name_stats = stats
        record._context = context
        record._timeout = timeout
        record.tick = -1
        record.observed = observed
        record._name = None if observed else name
        record._task = None
        record._place = None
        record._outcome = RUNNING
        # Before the list has it: other threads look there.
        record._created = self.now()
        record.expired = False
        record.queued = False
        record.paused = False
        record.holds_place = False
        record.holds_group_place = False
        record._group = None
        record._marks = 0
        if self.next_id == self.last_id:
            self.next_id = self.registry._take_ids()
            self.last_id = self.next_id + IDS_AT_ONCE
        self.next_id += 1
        record._task_id = self.next_id
        if not self.records:
            _in_use.add(self)
        self.records[self.next_id] = record
        if observed:
            self.observed += 1
        else:
            self.live += 1
        stats.started += 1
        return record

    def stats_of(self, name: str) -> NameStats:
        if len(self.names) >= MAX_NAMES:
            return self.other_names
        stats = self.names[name] = NameStats()
        return stats

    def launch(self, record: Record, eager: bool, context: Context | None) -> Any:
        """Build and return the task of a record. If that fails the record is gone, the coroutine closed."""
        # A batch of fire() that waits must start before what is created now and after what was created before it.
        self.batch = None
        if context is not None or eager or self.registry._max_running or self.task_factory() is not None:
            return self.launch_specially(record, eager, context)
        wrapper = _wrap(record, run)
        try:
            task = TrackedTask(wrapper, loop=self.loop, name=record._name)
        except BaseException:
            self.discard(record, wrapper)
            raise
        task._record = record
        self.follow(record, task)
        return task

    def launch_in_group(self, record: Record, eager: bool, context: Context | None) -> Any:
        self.batch = None
        return self.launch_specially(record, eager, context)

    def launch_specially(self, record: Record, eager: bool, context: Context | None) -> Any:
        """Do as ``launch`` for a task that starts eagerly, runs in a given context, needs a place or has a factory."""
        registry = self.registry
        options: dict[str, Any] = {"name": record._name}
        if context is not None:
            options["context"] = context
        has_place = record._group is None or record._group.take_place(record)
        if not has_place or (registry._max_running and not registry._take_place(record)):
            record.queued = True
            self.queued += 1
            record._place = self.loop.create_future()
            wrapper = _wrap(record, run_queued)
            # Up to its wait, which costs less than a step by the loop: the user's coroutine is not entered.
            eager = context is None
        else:
            wrapper = _wrap(record, run)
        task: Any
        try:
            factory = self.task_factory()
            ours = self.builds_itself(factory)
            if record._group is None:
                # An executor says for itself which of its tasks start eagerly.
                eager = eager or (factory is not None and factory is registry._eager_factory)
            if eager and context is not None:
                # Raises if the context is entered now: the task's constructor would notice too late, half built.
                context.run(_nothing)
            if not ours:
                task = self.loop.create_task(wrapper, **options)
                task.add_done_callback(partial(_settle_around, record, wrapper))
            else:
                if eager and self.can_start_eagerly():
                    options["eager_start"] = True
                task = TrackedTask(wrapper, loop=self.loop, **options)
        except BaseException:
            self.discard(record, wrapper)
            raise
        if ours:
            task._record = record
        self.follow(record, task)
        try:
            return task
        finally:
            # The error of an eager task keeps this frame through its traceback: the frame must not keep the task.
            del task

    def follow(self, record: Record, task: Any) -> None:
        """Take up a task that may have run eagerly: keep it and start its timeout unless it has ended."""
        if task._source_traceback:
            _hide_own_frames(task)
        if record._outcome == RUNNING:
            record._task = task
            if record._timeout > 0 and not record.queued:
                self.arm(record)

    def discard(self, record: Record, wrapper: Coroutine[Any, Any, Any]) -> None:
        """Take back a record whose task could not be built."""
        if record._outcome != RUNNING:
            # An eager task whose first step raised what stops the loop: it ran, and its end was counted.
            return
        wrapper.close()
        record._coro.close()
        if record._outcome == RUNNING:
            record.name_stats.started -= 1
            self.unlink(record)
            record._outcome = ABANDONED
            record.release()

    def finish(self, record: Record, outcome: int, error: BaseException | None) -> None:
        """Do the bookkeeping of a task that ended; its references are cut by ``release``, after the report."""
        end = self.now()
        self.last_end = end
        record._duration = duration = end - record._created
        record._outcome = outcome
        record.name_stats.count_end(outcome, duration)
        if record.tick >= 0:
            self.wheel.disarm(record)
            if self.wheel.armed == 0 and self.timer is not None:
                self.timer.cancel()
                self.timer = None
        if self.registry._history is not None:
            self.registry._remember(record, error)
        self.unlink(record)

    def unlink(self, record: Record) -> None:
        registry = self.registry
        del self.records[record._task_id]
        if record.queued:
            self.queued -= 1
        if registry._max_running and (record.holds_place or record.queued):
            registry._leave_place(record)
        if record._group is not None:
            record._group.leave(record)
        if record.observed:
            self.observed -= 1
        else:
            self.live -= 1
            if self.live <= self.wake_at:
                registry._on_quiet()
            if registry._room_wanted:
                registry._on_room()
        if not self.records:
            # Emptied, a dict keeps the room it once needed; a new one does not.
            self.records = {}
            _in_use.discard(self)

    def arm(self, record: Record) -> None:
        """Start the timeout of a record, if it has one."""
        if record._timeout <= 0:
            return
        deadline = (record._created + record._timeout - self.wheel_start) * TICKS_A_SECOND
        if deadline >= MAX_TICK:
            return
        # The first tick at or after the deadline: never early, less than a tick late.
        self.wheel.arm(record, math.ceil(deadline) if deadline > 0 else 0)
        if not self.timer_wanted and (self.timer is None or record.tick < self.timer_tick):
            # One loop timer for all: set once an iteration, so tasks that end in it never touch the loop's heap.
            self.timer_wanted = True
            self.loop.call_soon(self.set_timer)

    def set_timer(self) -> None:
        """Have the loop call ``wake`` when the earliest slot in use is due."""
        self.timer_wanted = False
        if self.wheel.armed == 0:
            return
        tick = self.wheel.next_tick()
        if self.timer is not None:
            if tick >= self.timer_tick:
                return
            self.timer.cancel()
        self.timer_tick = tick
        # A clock far from its zero may not tell moments closer than SHORTEST_WAIT apart: without it, wake would be
        # called again and again at the same one.
        wait = tick / TICKS_A_SECOND + self.wheel_start - self.now()
        self.timer = self.loop.call_later(max(wait, SHORTEST_WAIT), self.wake)

    def wake(self) -> None:
        """Cancel the tasks whose timeout is over and set the timer anew."""
        self.timer = None
        self.wheel.advance(int((self.now() - self.wheel_start) * TICKS_A_SECOND))
        try:
            while (record := self.wheel.pop_due()) is not None:
                record.expired = True
                self.registry._on_timeout(record)
        finally:
            self.set_timer()

    def defers(self) -> bool:
        """Tell whether ``fire`` may put off a start: eager tasks are to be had, and no foreign factory has a say."""
        # The answer holds for the whole of a batch: it starts in the next iteration of the loop.
        return self.batch is not None or (
            not self.registry._max_running and self.can_start_eagerly() and self.builds_itself(self.task_factory())
        )

    def defer(self, record: Record) -> None:
        """Have a task start in the next iteration of the loop, in one batch with its neighbours."""
        record._place = copy_context()
        if self.batch is None:
            self.batch = []
            self.batch_clock = record._created
            self.loop.call_soon(self.start_batch, self.batch)
        record._created = self.batch_clock
        self.batch.append(record)

    def start_batch(self, batch: list[Record]) -> None:
        """Start the tasks that ``fire`` put off, each up to its first suspension."""
        if batch is self.batch:
            self.batch = None
        # Not before the call of fire(), so no timeout comes early; and one clock read a task instead of two.
        self.last_end = self.now()
        options: dict[str, Any] = {"eager_start": True}
        index = 0
        try:
            for record in batch:
                index += 1
                if record._outcome != RUNNING:
                    continue
                record._created = self.last_end
                wrapper = _wrap(record, run)
                context = record._place
                record._place = None
                try:
                    task = TrackedTask(wrapper, loop=self.loop, name=record._name, context=context, **options)
                except BaseException:
                    self.discard(record, wrapper)
                    raise
                task._record = record
                self.follow(record, task)
                # As in ``launch_specially``: the frame must not keep the task.
                del task
        finally:
            if index < len(batch):
                # The first step of a task raised what stops the loop: the others start when it goes on.
                self.loop.call_soon(self.start_batch, batch[index:])

    def snapshot(self) -> list[Record]:
        """Return the live records; the list is complete before anything else can run."""
        return list(self.records.values())

    def abandon(self) -> dict[str, int]:
        """Let go of every task of a loop that was closed; return their names, each with the number of tasks."""
        names: dict[str, int] = {}
        for record in self.snapshot():
            if record._outcome != RUNNING:
                continue
            name = record.name
            names[name] = names.get(name, 0) + 1
            task = record._task
            self.finish(record, ABANDONED, None)
            if task is not None:
                task._log_destroy_pending = False
                if isinstance(task, TrackedTask):
                    _close_quietly(Task.get_coro(task))
            _close_quietly(record._coro)
            record.release()
        return names


def _hide_own_frames(task: Any) -> None:
    # In debug mode a task remembers where it was created; the loop's own create_task leaves itself out, too.
    while task._source_traceback and task._source_traceback[-1].filename == __file__:
        del task._source_traceback[-1]


def _close_quietly(coro: Any) -> None:
    # What a coroutine raises while it is closed after the end of its loop has no one left to go to.
    with suppress(BaseException):
        coro.close()


def _seconds(coro: Any, timeout: float | None) -> float:
    """Return a timeout as a float, 0 for none; refuse what is no positive number and close the coroutine."""
    if timeout is None:
        return 0.0
    if type(timeout) is float and timeout > 0.0:
        return timeout
    try:
        seconds = math.fsum((timeout,))
    except (TypeError, ValueError, OverflowError):
        seconds = -1.0
    if not seconds > 0.0 or isinstance(timeout, bool):
        errors.close_refused(coro)
        raise errors.invalid_timeout(timeout)
    return seconds


@final
class Group:
    """The tasks of one executor: how many have not ended, and how many may run at once.

    Belongs to the thread of its loop, as the records of its tasks do. Places are asked for here first, then at the
    registry.

    Args:
        registry: whose tasks they are.
        owner: the executor; its ``_on_quiet`` is called when the last task ends.
        max_running: how many coroutines may run at once; 0 for no limit.

    """

    def __init__(self, registry: Registry, owner: Any, *, max_running: int = 0) -> None:
        self.registry = registry
        self.owner = owner
        self.live = 0
        self.max_running = max_running
        self.running = 0
        # Records that wait for a place; those that ended meanwhile are passed over.
        self.queue: deque[Record] = deque()

    def create_task(
        self,
        coro: Coroutine[Any, Any, Result],
        name: str | None,
        timeout: float | None,
        eager_start: bool,
        contextvars_context: Context | None,
        marks: int,
    ) -> Task[Result] | None:
        """Start a coroutine as ``Registry.create_task`` does, as one of this group."""
        registry = self.registry
        records = registry.records_here(coro)
        if (
            (registry._shut or registry._cap)
            and registry.must_ask(records)
            and not registry._admit(coro, DEFAULT_NAME if name is None else name)
        ):
            return None
        if type(name) is not str:
            name = DEFAULT_NAME if name is None else str(name)
        seconds = _seconds(coro, timeout)
        record = records.enroll(coro, name, seconds, None, False)
        record._group = self
        record._marks = marks
        self.live += 1
        if self.max_running:
            return records.launch_in_group(record, eager_start, contextvars_context)  # type: ignore[no-any-return]
        return records.launch(record, eager_start, contextvars_context)  # type: ignore[no-any-return]

    def take_place(self, record: Record) -> bool:
        """Give a record a place among the running coroutines, or queue it and return False."""
        if self.max_running == 0:
            return True
        if self.running < self.max_running and not self.queue:
            self.running += 1
            record.holds_group_place = True
            return True
        self.queue.append(record)
        return False

    def leave(self, record: Record) -> None:
        """Take a record that ended out of the group and give its place to the next one."""
        self.live -= 1
        if record.holds_group_place:
            record.holds_group_place = False
            self.running -= 1
        while self.queue and self.running < self.max_running:
            following = self.queue.popleft()
            if following._outcome != RUNNING or following.records is None:
                continue
            following.holds_group_place = True
            self.running += 1
            if self.registry._max_running == 0 or self.registry._take_place(following):
                _grant(following)
        if self.live == 0:
            self.owner._on_quiet()


class Registry:
    """The records of all event loops of one manager, with what the manager may ask about them.

    A manager derives from it and overrides the methods that begin with ``_on`` and ``_admit`` and ``_report``: they are
    what the registry asks and tells its owner.

    Args:
        history: how many finished tasks to remember as plain values; 0 for none.
        cap: how many tasks it owns before ``create_task`` and ``fire`` ask ``_admit``; 0 for no cap.
        max_running: how many coroutines may run at once; 0 for no limit.
        muted: the cache of a logger: while ``muted.get(muted_level)`` is False a completed task is not reported.
        muted_level: the logging level of that report.

    """

    def __init__(
        self,
        *,
        history: int = 0,
        cap: int = 0,
        max_running: int = 0,
        muted: dict[int, bool] | None = None,
        muted_level: int = 0,
    ) -> None:
        self._current: LoopRecords | None = None
        self._by_loop: dict[asyncio.AbstractEventLoop, LoopRecords] = {}
        # Guards what several threads share: the table of loops, the counters of closed ones, ids, places and the queue.
        self._lock = threading.RLock()
        self._history: deque[tuple[Any, ...]] | None = deque(maxlen=history) if history else None
        self._shut = False
        self._cap = cap
        self._room_wanted = False
        self._max_running = max_running
        self._running = 0
        # Not a dict: the first entry of one that shrinks at the front is found behind all that have gone.
        self._queue: OrderedDict[Record, None] = OrderedDict()
        self._muted = muted
        self._muted_level = muted_level
        self._ids_taken = 0
        self._retired = NameStats()
        self._retired_names: dict[str, NameStats] = {}
        self._eager_tasks: bool | None = None
        self._eager_factory: Any = getattr(asyncio, "eager_task_factory", None)

    # -- starting tasks ------------------------------------------------------------------------------------------

    def create_task(
        self,
        coro: Coroutine[Any, Any, Result],
        *,
        name: str = DEFAULT_NAME,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
        eager_start: bool = False,
        contextvars_context: Context | None = None,
    ) -> Task[Result]:
        """Start a coroutine in the background and keep it until it ends.

        Args:
            coro: a coroutine object.
            name: what the task is called in logs, statistics and ``repr``; need not be unique.
            timeout: seconds after which the task is cancelled, > 0; None for no timeout.
            context: a mapping that goes with the task's log records.
            eager_start: run up to the first suspension before this call returns (from Python 3.12 on; else ignored).
            contextvars_context: the ``contextvars.Context`` to run in; a copy of the current one by default.

        Returns:
            The task; None if the manager drops new tasks at its cap.

        Raises:
            NotACoroutineError: ``coro`` is something else; a coroutine function is to be called first.
            NoRunningLoopError: no event loop runs in this thread.
            ManagerClosedError: the manager was shut down.
            TaskRejectedError: the manager is at its cap.
            InvalidTimeoutError: ``timeout`` is no positive number.
            InvalidContextError: ``context`` is no mapping, or ``contextvars_context`` no ``contextvars.Context``.

        After any of them the coroutine is closed.

        """
        records = self.records_here(coro)
        if (self._shut or self._cap) and self.must_ask(records) and not self._admit(coro, name):
            return None  # type: ignore[return-value]
        if type(name) is not str:
            name = DEFAULT_NAME if name is None else str(name)
        seconds = _seconds(coro, timeout)
        if context is not None and type(context) is not dict:
            _check_context(coro, context)
        if contextvars_context is not None and not isinstance(contextvars_context, Context):
            errors.close_refused(coro)
            raise errors.invalid_contextvars_context(contextvars_context)
        return records.launch(  # type: ignore[no-any-return]
            records.enroll(coro, name, seconds, context, False), eager_start, contextvars_context
        )

    def fire(
        self,
        coro: Coroutine[Any, Any, Any],
        *,
        name: str = DEFAULT_NAME,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> None:
        """Start a coroutine in the background for the least that it can cost, and return nothing.

        The task is known at once and starts in the next iteration of the loop, in the order of the calls.

        Args:
            coro: a coroutine object.
            name: what the task is called in logs, statistics and ``repr``; need not be unique.
            timeout: seconds after which the task is cancelled, > 0; None for no timeout.
            context: a mapping that goes with the task's log records.

        Raises:
            BgtasksError: what ``create_task`` raises, for the same reasons; the coroutine is closed.

        """
        records = self.records_here(coro)
        if (self._shut or self._cap) and self.must_ask(records) and not self._admit(coro, name):
            return
        if type(name) is not str:
            name = DEFAULT_NAME if name is None else str(name)
        seconds = _seconds(coro, timeout)
        if context is not None and type(context) is not dict:
            _check_context(coro, context)
        record = records.enroll(coro, name, seconds, context, False)
        if records.defers():
            records.defer(record)
        else:
            records.launch(record, False, None)

    def task_factory(self, loop: asyncio.AbstractEventLoop, coro: Any, **kwargs: Any) -> Any:
        """Build a task for ``loop.set_task_factory(manager.task_factory)``: every task of the program is tracked.

        Such tasks are observed, not owned: they are counted, timed and shown, and ``cancel`` reaches them by id or
        name. Caps and ``shutdown`` leave them alone, and their exceptions go where they would go without a manager.

        Args:
            loop: the loop that asks.
            coro: the coroutine.
            kwargs: what the loop passes on to the task: ``name``, ``context``, ``eager_start``.

        """
        if not iscoroutine(coro):
            return Task(coro, loop=loop, **kwargs)
        records = self.records_of(loop)
        record = records.enroll(coro, _name_of(coro), 0.0, None, True)
        wrapper = _wrap(record, run)
        try:
            task = TrackedTask(wrapper, loop=loop, **kwargs)
        except BaseException:
            records.discard(record, wrapper)
            raise
        task._record = record
        records.follow(record, task)
        try:
            return task
        finally:
            # As in ``launch_specially``: the frame must not keep the task.
            del task

    def must_ask(self, records: LoopRecords) -> bool:
        # One loop's count is at hand; those of several are for _admit to add up.
        return self._shut or records.live >= self._cap or len(self._by_loop) > 1

    def records_here(self, coro: Any) -> LoopRecords:
        if type(coro) is not CoroutineType and not iscoroutine(coro):
            raise errors.not_a_coroutine(coro)
        loop = _get_running_loop()
        if loop is None:
            errors.close_refused(coro)
            raise errors.no_running_loop()
        records = self._current
        if records is not None and records.loop is loop:
            return records
        return self.records_of(loop)

    def records_of(self, loop: asyncio.AbstractEventLoop) -> LoopRecords:
        """Return the records of a loop, new ones at its first use; let go of loops that were closed."""
        with self._lock:
            records = self._by_loop.get(loop)
            if records is None:
                self._let_go_of_closed_loops()
                records = self._by_loop[loop] = LoopRecords(self, loop)
            self._current = records
        return records

    def _let_go_of_closed_loops(self) -> None:
        """Drop what closed loops left behind, count it as abandoned and tell the owner."""
        with self._lock:
            for records in list(self._by_loop.values()):
                if not records.loop.is_closed():
                    continue
                del self._by_loop[records.loop]
                if self._current is records:
                    self._current = None
                names = records.abandon()
                _merge(self._retired, self._retired_names, records)
                if names:
                    self._on_abandoned(names)

    def _has_eager_tasks(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Tell whether tasks can start eagerly here, by trying it once; ``loop`` runs."""
        if self._eager_tasks is None:
            self._eager_tasks = starts_eagerly(loop)
        return self._eager_tasks

    def _take_ids(self) -> int:
        """Reserve task ids for one loop and return the last one in use."""
        with self._lock:
            self._ids_taken += IDS_AT_ONCE
            return self._ids_taken - IDS_AT_ONCE

    def _renew_lock(self) -> None:
        """Take a new lock in the child of a fork, where no thread is left that could let go of the old one."""
        self._lock = threading.RLock()

    def _make_group(self, owner: Any, max_running: int) -> Group:
        """Return a ``Group`` for the tasks or functions of the executor ``owner``."""
        return Group(self, owner, max_running=max_running)

    # -- functions that an executor runs in threads --------------------------------------------------------------

    def _add_host(self, host: Any) -> LoopRecords:
        """Return the records of an executor's threads; ``host`` answers for them as a loop does for its tasks."""
        with self._lock:
            self._let_go_of_closed_loops()
            records = self._by_loop[host] = LoopRecords(self, host)
        return records

    def _admits_call(self, records: LoopRecords, call: Any, name: str) -> bool:
        """Say whether a function may be taken on; raise to refuse it with an error."""
        return not (self._shut or self._cap) or not self.must_ask(records) or self._admit(call, name)

    def _enroll_call(
        self,
        records: LoopRecords,
        group: Group,
        call: Any,
        name: str,
        timeout: float | None,
        marks: int,
        future: Any,
    ) -> Record:
        """Make the record of a queued function, ``call`` standing for its coroutine. Safe from any thread."""
        with _calls_lock:
            record = records.enroll(call, name, 0.0 if timeout is None else timeout, None, False)
            record._task = future
            record._group = group
            record._marks = marks
            group.live += 1
            record.queued = True
            records.queued += 1
        return record

    # -- places among the running coroutines ---------------------------------------------------------------------

    def _take_place(self, record: Record) -> bool:
        """Give a record a place among the running coroutines, or queue it and return False."""
        with self._lock:
            if self._running < self._max_running and not self._queue:
                self._running += 1
                record.holds_place = True
                return True
            self._queue[record] = None
            return False

    def _leave_place(self, record: Record) -> None:
        """Take back the place of a record, or take it out of the queue, and let the next ones run."""
        with self._lock:
            self._queue.pop(record, None)
            record.queued = False
            if record.holds_place:
                record.holds_place = False
                self._running -= 1
            while self._queue and self._running < self._max_running:
                following = self._queue.popitem(last=False)[0]
                loop = following.records.loop
                try:
                    if loop is _get_running_loop():
                        _grant(following)
                    else:
                        loop.call_soon_threadsafe(_grant, following)
                except RuntimeError:
                    # Its loop is closed: it is counted as abandoned with the rest of that loop.
                    continue
                following.holds_place = True
                self._running += 1

    # -- questions, from any thread ------------------------------------------------------------------------------

    def get_task_count(self) -> int:
        """Return the number of tasks that have not ended, queued ones included."""
        records = self._current
        if records is not None and len(self._by_loop) == 1 and not records.loop.is_closed():
            return records.live + records.observed
        return sum([self._count(records) for records in self._all_records()])

    def _count(self, records: LoopRecords) -> int:
        """Return the number of tasks of one loop."""
        return records.live + records.observed

    def _count_queued(self, records: LoopRecords) -> int:
        """Return the number of tasks of one loop that wait for a place."""
        return records.queued

    def _all_records(self) -> list[LoopRecords]:
        """Return the ``LoopRecords`` of every open loop."""
        with self._lock:
            self._let_go_of_closed_loops()
            return list(self._by_loop.values())

    def _owned(self) -> int:
        """Return how many tasks the manager owns: all but those that came through its task factory."""
        return sum([records.live for records in self._all_records()])

    def _owned_by_loop(self) -> list[tuple[asyncio.AbstractEventLoop, int]]:
        """Return a list of (loop, number of owned tasks)."""
        return [(records.loop, records.live) for records in self._all_records()]

    def _live_records(self) -> list[Record]:
        """Return the records of all tasks that have not ended."""
        found: list[Record] = []
        for records in self._all_records():
            found += records.snapshot()
        return found

    def _record_of(self, task: Task[Any]) -> Record | None:
        """Return the record of a live task of this manager, None for any other."""
        if isinstance(task, TrackedTask):
            record = record_of(task)
            if record is None or record._outcome != RUNNING or record.records.registry is not self:
                return None
            return record
        for record in self._live_records():
            if record._task is task and task is not None:
                return record
        return None

    def _bind_running_loop(self) -> None:
        """Make the running loop known before its first task, so that other threads can hand work over to it."""
        loop = _get_running_loop()
        if loop is None:
            raise errors.no_running_loop()
        self.records_of(loop)

    def _loop_of(self, record: Record) -> asyncio.AbstractEventLoop | None:
        """Return the loop of a live record, None if it has ended."""
        records = record.records
        return None if records is None else records.loop

    def get_task_info(self) -> list[TaskInfo]:
        """Return a ``TaskInfo`` for every task that has not ended, oldest first on each loop."""
        return [
            record.info()
            for record in self._live_records()
            if record._outcome == RUNNING and record.records is not None
        ]

    def get_history(self) -> list[FinishedTask]:
        """Return the finished tasks that are remembered, oldest first; empty unless ``history`` was given."""
        if self._history is None:
            return []
        with self._lock:
            entries = list(self._history)
        return [
            {
                "task_id": task_id,
                "name": name,
                "coroutine": coroutine,
                "outcome": outcome,
                "duration_seconds": duration,
                "ended_at": ended_at,
                "error": error,
            }
            for task_id, name, coroutine, outcome, duration, ended_at, error in entries
        ]

    def _remember(self, record: Record, error: BaseException | None) -> None:
        """Put a finished task into the history as plain values."""
        assert self._history is not None, "asked for only where there is a history"
        entry = (
            record._task_id,
            record.name,
            _name_of(record._coro),
            OUTCOMES[record._outcome],
            record._duration,
            wall_clock(),
            None if error is None else errors.text_of(error),
        )
        with self._lock:
            self._history.append(entry)

    def _counters(self) -> ManagerStats:
        """Return the counters of all loops, the closed ones included, and those of each name."""
        total = NameStats()
        names: dict[str, NameStats] = {}
        with self._lock:
            # First of all: it moves the counters of loops closed meanwhile to the retired ones.
            open_loops = self._all_records()
            total.add(self._retired)
            for name, stats in self._retired_names.items():
                _add_to(names, name, stats)
            for records in open_loops:
                _merge(total, names, records)
            counters: Any = total.as_dict()
            counters["queued"] = sum([self._count_queued(records) for records in open_loops])
            counters["running"] = counters["in_flight"] - counters["queued"]
        del counters["p50_seconds"]
        del counters["p99_seconds"]
        counters["names"] = {name: stats.as_dict() for name, stats in names.items()}
        result: ManagerStats = counters
        return result

    # -- what the owner sets -------------------------------------------------------------------------------------

    def _shut_gate(self) -> None:
        """Have ``create_task`` and ``fire`` ask ``_admit`` for every task from now on."""
        self._shut = True

    def _wake_at(self, loop: asyncio.AbstractEventLoop, count: int) -> None:
        """Have ``_on_quiet`` called each time a task ends and ``loop`` is left with ``count`` owned ones or fewer."""
        records = self._by_loop.get(loop)
        if records is not None:
            records.wake_at = count

    # -- what the owner is asked and told ------------------------------------------------------------------------

    def _admit(self, coro: Coroutine[Any, Any, Any], name: str) -> bool:
        """Say whether a new task may start at the cap or behind a shut gate; raise to refuse it with an error."""
        return True

    def _report(self, record: Record, error: BaseException | None) -> None:
        """Hear that a task ended, after its bookkeeping and before its references are cut."""

    def _on_timeout(self, record: Record) -> None:
        """Hear that the timeout of a task is over, and cancel it."""

    def _on_abandoned(self, names: dict[str, int]) -> None:
        """Hear that a closed loop left tasks behind: a dict of their names with the number of each."""

    def _on_quiet(self) -> None:
        """Hear that a loop is down to the number of tasks given to ``_wake_at``."""

    def _on_room(self) -> None:
        """Hear that a task ended while ``_room_wanted`` is set."""


def _check_context(coro: Any, context: object) -> None:
    if isinstance(context, Context) or not isinstance(context, Mapping):
        errors.close_refused(coro)
        raise errors.invalid_context(context)


def _grant(record: Record) -> None:
    """Let a queued task run."""
    place = record.place
    if place is not None and not place.done():
        place.set_result(None)


def _merge(total: NameStats, names: dict[str, NameStats], records: LoopRecords) -> None:
    for name, stats in list(records.names.items()):
        total.add(stats)
        _add_to(names, name, stats)
    if records.other_names.started:
        total.add(records.other_names)
        _add_to(names, OTHER_NAMES, records.other_names)


def _add_to(names: dict[str, NameStats], name: str, stats: NameStats) -> None:
    if name not in names:
        if len(names) >= MAX_NAMES:
            name = OTHER_NAMES
        names.setdefault(name, NameStats())
    names[name].add(stats)
