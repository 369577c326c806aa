"""The hot half of a manager's bookkeeping in pure Python: records, timeouts and counters. No logging and no policy.

The same names, signatures, errors and behaviour as ``_registry.pyx``; used where that file was not compiled. Its rules
on threads and ownership apply here, too.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from asyncio import AbstractEventLoop, BaseEventLoop, CancelledError, Task, current_task, iscoroutine
from asyncio.events import _get_running_loop
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Generator, Hashable, Iterator, Mapping
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from time import monotonic
from types import CoroutineType
from typing import Any, Final, TypeVar, Unpack, final
from weakref import ref

from bgtasks import errors
from bgtasks._arguments import check_context, check_timeout, refuse_contextvars_context, refuse_retry
from bgtasks._coroutines import coroutine_of, next_attempt, refuse_function
from bgtasks._fork import at_fork
from bgtasks._hooks import RegistryHooks
from bgtasks._implementation import choose_wrapper
from bgtasks._locks import Lock
from bgtasks._origin import describe_loop, origin
from bgtasks._statistics import MAX_NAMES, OUTCOMES, Measured, Snapshot, with_values
from bgtasks._submit import OnDuplicate, RetryPolicy, typed_fire, typed_submit
from bgtasks._task import (
    SharedTask,
    TrackedTask,
    close_quietly,
    dismiss,
    do_nothing,
    drive,
    finish_unentered,
    foreign_record,
    grant_turn,
    is_running,
    record_of,
    retrieve_failure,
    run,
    run_queued,
    run_submitted,
    task_in_constructor,
)
from bgtasks.info import TaskFactoryOptions, TaskInfo

__all__ = ["LoopRecords", "NameStats", "Record", "RegistryCore", "Slots", "Submission", "TaskSet", "TrackedTask"]

Result = TypeVar("Result")

# All tasks step native coroutines here; an unknown value is an error all the same.
choose_wrapper()

RUNNING, COMPLETED, FAILED, CANCELLED, TIMED_OUT, ABANDONED = range(6)

IDS_AT_ONCE: Final = 1024
VALUES_AT_ONCE: Final = 64
# Shared: histograms are replaced, never changed.
NOTHING: Final[Measured] = ({}, 0.0, 0.0)
TICKS_PER_SECOND: Final = 1000.0
SHORTEST_WAIT: Final = 1e-6
MAX_TICK: Final = 1 << 62

# Every LoopRecords that holds a record: neither it nor its manager may be collected while a task runs.
_in_use: set[LoopRecords] = set()
# Guards the records of functions, which several threads share; the compiled registry relies on the GIL there.
# Re-entrant: the ``__str__`` of an error, called for the history, may submit a function.
_calls_lock = Lock()


# Guards concurrency slots, which tasks of several loops may share. Re-entrant for the same reason.
_slots_lock = Lock()


def _renew_locks() -> None:
    global _calls_lock, _slots_lock
    _calls_lock = Lock()
    _slots_lock = Lock()


at_fork(in_child=_renew_locks)


@final
class NameStats:
    """The counters of all tasks of one name, and the histograms of their durations and of their waits."""

    # Only one thread at a time counts, and any thread may ask for a snapshot.
    __slots__ = ("counts", "durations", "last_error", "started", "waits")

    def __init__(self) -> None:
        self.started: int = 0
        self.counts: list[int] = [0] * len(OUTCOMES)
        # A histogram, and values that are not in it yet: to count many at once costs half. Both change as one.
        self.durations: tuple[Measured, list[float]] = (NOTHING, [])
        self.waits: tuple[Measured, list[float]] = (NOTHING, [])
        # The type of the last failure, None before the first.
        self.last_error: str | None = None

    def count_end(self, outcome: int, duration: float) -> None:
        self.counts[outcome] += 1
        durations = self.durations
        measured, new = durations
        new.append(duration)
        if len(new) >= VALUES_AT_ONCE:
            measured = with_values(measured, new[:VALUES_AT_ONCE])
            # A finalizer that ran meanwhile may have counted, too.
            if self.durations is durations:
                self.durations = measured, new[VALUES_AT_ONCE:]

    def count_wait(self, wait: float) -> None:
        waits = self.waits
        measured, new = waits
        new.append(wait)
        if len(new) >= VALUES_AT_ONCE:
            measured = with_values(measured, new[:VALUES_AT_ONCE])
            if self.waits is waits:
                self.waits = measured, new[VALUES_AT_ONCE:]

    def snapshot(self) -> Snapshot:
        """Return the counters, see ``Snapshot``."""
        durations, new_durations = self.durations
        waits, new_waits = self.waits
        measured = with_values(durations, new_durations.copy()), with_values(waits, new_waits.copy())
        counts = list(self.counts)
        # Read last: the end of a task that starts and ends meanwhile must not be counted without its start.
        return self.started, counts, *measured, self.last_error


@final
class Record:
    """The bookkeeping of one live task.

    Its ``LoopRecords`` owns it from creation to the end of the task; the task and the coroutine around the user's hold
    references, too. ``_release`` cuts every reference at the end.
    """

    __slots__ = (
        "coro",
        "created",
        "entered",
        "expired",
        "flags",
        "given_context",
        "given_name",
        "name_stats",
        "noted",
        "observed",
        "parent_id",
        "paused",
        "queued",
        "records",
        "seconds",
        "service",
        "slots",
        "slots_held",
        "state",
        "submission",
        "task",
        "task_id",
        "task_set",
        "tick",
        "took",
        "turn",
        "waiting",
    )

    # Both are None once the record is released.
    records: LoopRecords
    name_stats: NameStats
    # The user's coroutine, or the ``Call`` of a function.
    coro: Any
    # None before the task is built and after its end.
    task: Any
    task_id: int
    # The id of the task of the same manager and loop that created this one; 0 if none did.
    parent_id: int
    # The set of its executor; None for a task of no executor, and after its end.
    task_set: TaskSet | None
    # The function of a submitted task, and what is to be done at its end; None for any other task.
    submission: Any
    # The future of a queued or waiting task, resolved when it may run; of a task that fire() deferred, the Context to
    # run in.
    turn: Any
    # Where it needs its first concurrency slot, None if no limit applies to it; and how many slots it holds.
    slots: Slots | None
    slots_held: int
    given_name: str
    given_context: Mapping[str, Any] | None
    # A time on the loop's clock, and two durations, in seconds.
    created: float
    seconds: float
    took: float
    # The tick of the wheel at which its timeout expires; -1 while it is not armed.
    tick: int
    state: int
    # Built by the task factory: counted and shown, not owned.
    observed: bool
    queued: bool
    # Between two attempts; until the next one begins.
    waiting: bool
    # Cancelled before its first step: suspended in ``_task.pause``, the user's coroutine not entered.
    paused: bool
    # Its timeout has expired.
    expired: bool
    # A task that runs as long as the program: counted and shown, waited for only after its cancellation.
    service: bool
    # How its executor treats it at the end of the block, as bits.
    flags: int
    # Its wait for the first step has been counted.
    entered: bool
    # ``records.notes`` has facts about it.
    noted: bool

    def __init__(self) -> None:
        raise TypeError("a Record is made by its registry")

    @property
    def name(self) -> str:
        """The given name; for a task that the task factory built without a name, that of its coroutine."""
        return self.given_name

    @property
    def context(self) -> Mapping[str, Any]:
        """The mapping for log records, an empty dict if none was given."""
        context = self.given_context
        return {} if context is None else context

    @property
    def timeout(self) -> float | None:
        """The timeout in seconds, or None."""
        return self.seconds if self.seconds > 0 else None

    @property
    def duration(self) -> float:
        """Seconds that the task ran, or has run so far."""
        # ``records`` is read once: the task may end in its own thread meanwhile.
        records: LoopRecords | None = self.records
        return self.took if self.state != RUNNING or records is None else records.now() - self.created

    @property
    def outcome(self) -> str:
        """One of ``OUTCOMES``."""
        return OUTCOMES[self.state]

    @property
    def loop(self) -> AbstractEventLoop | None:
        """The loop of the task, None after its end."""
        records: LoopRecords | None = self.records
        return None if records is None else records.loop

    @property
    def registry(self) -> RegistryCore | None:
        """The registry that keeps this record, None after the end of the task."""
        records: LoopRecords | None = self.records
        return None if records is None else records.registry

    @property
    def coroutine_name(self) -> str:
        """The qualified name of the user's coroutine."""
        return _name_of(self.coro)

    def info(self) -> TaskInfo:
        """Return a ``TaskInfo``; only until the end of the task is reported."""
        records: LoopRecords | None = self.records
        info: TaskInfo = {
            "task_id": self.task_id,
            "name": self.name,
            "coroutine": _name_of(self.coro),
            "state": "queued" if self.queued else "waiting" if self.waiting else OUTCOMES[self.state],
            "age_seconds": self.duration,
            "timeout": self.timeout,
            "context": self.context,
            "attempt": 1,
            "next_attempt_seconds": None,
            "done": self.state != RUNNING,
            "cancelled": self.state in (CANCELLED, TIMED_OUT),
            "service": self.service,
            "time_left_seconds": _time_left(self),
            "parent_id": self.parent_id or None,
            "loop": None if records is None else records.label,
            "thread": None if records is None else records.thread,
            "origin": _noted_as(self, "origin"),
            "progress": _noted_as(self, "progress"),
        }
        if self.submission is not None and records is not None:
            records.registry._describe_submission(self, info)
        return info

    def rename(self, name: str) -> None:
        """Give a task that the task factory built, and that has not ended, another name: loops may name it late."""
        records = self.records
        if not self.observed or self.state != RUNNING:
            return
        old, old_name = self.name_stats, self.given_name
        self.given_name = name
        self.name_stats = records.names.get(name) or records.stats_of(name)
        self.name_stats.started += 1
        old.started -= 1
        if not old.started and records.names.get(old_name) is old:
            del records.names[old_name]

    def note(self, key: str, fact: Any) -> None:
        """Keep a fact about the task for ``info`` until its end; do nothing if it has ended."""
        if self.state != RUNNING:
            return
        notes = self.records.notes
        self.noted = True
        if self in notes:
            notes[self][key] = fact
        else:
            notes[self] = {key: fact}

    def count_start(self) -> None:
        """Count the wait of a task that takes its first step."""
        if self.entered:
            return
        records = self.records
        # As the loop starts tasks in the order of their creation, the neighbour's end is this one's start.
        is_next = records.last_ended == self.task_id - 1 and records.last_end >= self.created
        self.name_stats.count_wait((records.last_end if is_next else records.now()) - self.created)
        self.entered = True

    def complete(self, result: Result) -> Result:
        """Finish the record of a task whose coroutine returned ``result``; return ``result``."""
        if self.state != RUNNING:
            return result
        if self.submission is not None:
            self.submission.result = result
        try:
            self.records.finish(self, COMPLETED, None)
            _report(self, None)
        finally:
            _release(self)
        return result

    def fail(self, error: BaseException) -> BaseException | None:
        """Finish the record of a task whose coroutine raised ``error``; return what to raise instead, or None."""
        if self.state != RUNNING:
            return None
        records = self.records
        task = self.task
        if task is None:
            # An eager task that has not left its constructor.
            task = self.task = current_task(records.loop)
        if self.paused or not self.entered:
            self.coro.close()
        try:
            if isinstance(error, GeneratorExit) and not is_running(task):
                # Closed from outside: nothing runs this coroutine any more.
                records.finish(self, ABANDONED, None)
            elif not isinstance(error, CancelledError):
                records.finish(self, FAILED, error)
                _retrieve(self, task)
            elif self.expired and task.cancelling() <= 1:
                records.finish(self, TIMED_OUT, None)
                # The report may have the task raise.
                _retrieve(self, task)
            else:
                records.finish(self, CANCELLED, None)
            return _report(self, error)
        finally:
            _release(self)

    def finish_unentered(self, task: Task[Any]) -> None:
        """Finish the record of a task that ended without entering its coroutine; do nothing for any other task."""
        if self.state != RUNNING:
            return
        self.coro.close()
        if not task.cancelled():
            error = task.exception()
            if error is not None:
                self.fail(error)
                return
            # A task of a foreign factory that never ran its coroutine.
            self.records.finish(self, ABANDONED, None)
        else:
            self.records.finish(self, TIMED_OUT if self.expired and task.cancelling() <= 1 else CANCELLED, None)
        _report(self, None)
        _release(self)

    def abandon(self) -> None:
        """Finish the record of a task whose loop was closed, close its coroutine and release the task."""
        task = self.task
        if self.state != RUNNING:
            return
        self.records.finish(self, ABANDONED, None)
        if task is not None:
            task._log_destroy_pending = False
            if isinstance(task, TrackedTask):
                close_quietly(Task.get_coro(task))
        close_quietly(self.coro)
        _release(self)

    def cancel(self, message: Any = None) -> bool:
        """Request cancellation, also of a task that ``fire`` has not started yet; return False if it has ended."""
        task = self.task
        if self.state != RUNNING:
            return False
        if task is None and isinstance(self.turn, Context):
            self.coro.close()
            self.records.finish(self, CANCELLED, None)
            _report(self, None)
            _release(self)
            return True
        if task is None:
            task = task_in_constructor(self, self.records.loop)
        return task is not None and bool(task.cancel(message))

    # -- attempts of a submitted function -------------------------------------------------------------------------

    def retry(self, error: BaseException) -> bool:
        """Have another attempt follow the one that raised ``error``, if its policy says so; return whether it does."""
        records = self.records
        task = self.task
        if self.submission is None or self.submission.retry is None or self.state != RUNNING:
            return False
        if task is None:
            # An eager task that has not left its constructor.
            task = self.task = current_task(records.loop)
        if task.cancelling() > self.expired:
            return False
        seconds: float | None = records.registry._wait_after(self, error)
        if seconds is None or self.state != RUNNING:
            return False
        if self.expired:
            self.expired = False
            task.uncancel()
        records.suspend(self, seconds)
        return True

    def proceed(self) -> None:
        """Let a task run that was held or waited: at once, or when it has its concurrency slots."""
        records = self.records
        records.disarm(self)
        if records.acquire_slots(self):
            grant_turn(records.loop, self.turn)
        elif not self.queued:
            self.queued = True
            records.queued += 1
            records.waiting -= 1

    def begin_attempt(self) -> Any:
        """Mark a waiting task as running, and return the coroutine of its next attempt."""
        records = self.records
        self.waiting = False
        self.turn = None
        if self.queued:
            self.queued = False
            records.queued -= 1
        else:
            records.waiting -= 1
        self.submission.attempt += 1
        self.submission.failures.last = None
        self.submission.failures.next_at = records.now()
        self.coro = next_attempt(self.submission.function, self.submission.args, self.submission.kwargs or {})
        if self.seconds > 0:
            records.arm_after(self, records.now(), self.seconds)
            records.want_timer(self)
        return self.coro

    # -- queued tasks, and functions in threads -------------------------------------------------------------------

    def begin(self) -> None:
        """Mark a queued task as running: its timeout and its duration count from now."""
        records = self.records
        now = records.now()
        waited = now - self.created
        self.created = now
        queued = records.queued - (not self.service)
        # What can fail comes first: of a task that could not begin the coroutine is closed as one that still waits.
        records.arm(self)
        records.want_timer(self)
        self.name_stats.count_wait(waited)
        self.entered = True
        self.queued = False
        records.queued = queued
        self.turn = None

    def begin_call(self) -> bool:
        """Mark a queued function as running; return False if it was finished before. Safe from any thread."""
        with _calls_lock:
            if self.state != RUNNING:
                return False
            records = self.records
            now = records.now()
            queued = records.queued - 1
            if self.waiting:
                self.waiting = self.queued = False
                records.queued = queued
                self.submission.attempt += 1
                self.submission.failures.last = None
                self.submission.failures.next_at = now
                return True
            self.name_stats.count_wait(now - self.created)
            self.entered = True
            self.created = now
            records.queued = queued
            self.queued = False
        return True

    def finish_call(
        self, outcome: str, error: BaseException | None = None, if_queued: bool = False, attempt: int = 0
    ) -> bool:
        """Finish the record of a function; return whether it did. Safe from any thread.

        Args:
            outcome: how it ended.
            error: the error of a failed one.
            if_queued: finish it only if it does not run.
            attempt: finish it only if it runs its attempt of this number; 0 for a function that has one attempt.

        """
        with _calls_lock:
            if self.state != RUNNING or (if_queued and not self.queued and not self.waiting):
                return False
            if attempt and (self.waiting or self.submission.attempt != attempt):
                return False
            self.records.finish(self, OUTCOMES.index(outcome), error)
        return True

    def suspend_call(self, attempt: int) -> bool:
        """Have a function wait that runs its attempt of this number; return False if it does not. From any thread."""
        with _calls_lock:
            if self.state != RUNNING or self.waiting or self.queued or self.submission.attempt != attempt:
                return False
            self.waiting = True
            self.records.waiting += 1
        return True

    def queue_call(self) -> bool:
        """Mark a function that waits for its next attempt as queued; return False if it does not. From any thread."""
        with _calls_lock:
            if self.state != RUNNING or not self.waiting or self.queued:
                return False
            self.queued = True
            self.records.queued += 1
            self.records.waiting -= 1
        return True

    def report_call(self, error: BaseException | None = None) -> None:
        """Report the end of a function; called once, after ``finish_call`` returned True."""
        try:
            _report(self, error)
        finally:
            _release(self)
            # The call refers to its record.
            self.coro = None


def _time_left(record: Record) -> float | None:
    if record.seconds <= 0:
        return None
    records: LoopRecords | None = record.records
    if record.queued or record.waiting:
        return record.seconds
    failures = None if record.submission is None else record.submission.failures
    if failures is None or records is None:
        return max(record.seconds - record.duration, 0.0)
    # Each attempt has the whole timeout.
    begun: float = failures.next_at
    return max(record.seconds - (records.now() - begun), 0.0)


def _noted_as(record: Record, key: str) -> Any:
    records: LoopRecords | None = record.records
    return None if not record.noted or records is None else records.notes.get(record, {}).get(key)


def _retrieve(record: Record, task: Any) -> None:
    if not record.observed and task is not None:
        task.add_done_callback(retrieve_failure)


def _report(record: Record, error: BaseException | None) -> BaseException | None:
    registry = record.records.registry
    if (
        record.state not in (FAILED, TIMED_OUT)
        and registry._muted is not None
        and registry._muted.get(registry._muted_level) is False
    ):
        return None
    try:
        return registry._report(record, error)
    except BaseException:
        _release(record)
        raise


def _release(record: Record) -> None:
    if record.noted and record.records is not None:
        record.records.notes.pop(record, None)
    record.task = None
    record.given_context = None
    record.turn = None
    record.submission = None
    record.task_set = None
    record.slots = None
    record.records = None  # type: ignore[assignment]
    record.name_stats = None  # type: ignore[assignment]


def _wrap(record: Record, function: Callable[[Any, Record], Coroutine[Any, Any, Any]]) -> Coroutine[Any, Any, Any]:
    """Return the native coroutine around the user's."""
    coro = record.coro
    return function(coro if type(coro) is CoroutineType else drive(coro), record)


def _runner_of(record: Record) -> Callable[[Any, Record], Coroutine[Any, Any, Any]]:
    """Return the function of the native coroutine around the user's."""
    if record.submission is not None:
        return run_submitted
    return run_queued if record.queued else run


def _task_type(record: Record) -> type[TrackedTask]:
    return TrackedTask if record.submission is None or not record.submission.shared else SharedTask


def _name_of(coro: Any) -> str:
    name = getattr(coro, "__qualname__", None)
    return name if type(name) is str else type(coro).__qualname__


@final
class Submission:
    """A submitted function with its arguments, which one task runs, once or several times.

    Args:
        function: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        retry: decides on further attempts; None for no further one.
        listener: its ``_ended(record, error)`` is called when the task has ended; None for no call.

    """

    __slots__ = (
        "args",
        "attempt",
        "failures",
        "following",
        "function",
        "keep",
        "key",
        "kwargs",
        "listener",
        "record",
        "result",
        "retry",
        "shared",
    )

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        retry: Any,
        listener: Any,
    ) -> None:
        self.function: Callable[..., Any] = function
        self.args: tuple[Any, ...] = args
        # None instead of an empty dict, to save memory.
        self.kwargs: dict[str, Any] | None = kwargs or None
        self.retry: Any = retry
        self.listener: Any = listener
        # The number of the attempt that runs, or ran last, from 1.
        self.attempt: int = 1
        # What the policies keep: about failed attempts, and for how long the result.
        self.failures: Any = None
        self.keep: float | None = None
        # At most one task of a key runs on each loop, and at most one is held until its end.
        self.key: Any = None
        self.following: Submission | None = None
        # Several coroutines may await its task, and the cancellation of one is not to cancel it.
        self.shared: bool = False
        # Until it is released; None before the start.
        self.record: Any = None
        # What the function returned, set just before the listener is called.
        self.result: Any = None

    def task(self) -> Any:
        """Return its task; an eager one that has not left its constructor is the running one."""
        return current_task(self.record.loop) if self.record.task is None else self.record.task


@final
class Slots:
    """Concurrency slots: ``limit`` tasks run at once, the others wait in order.

    They may be handed out at a rate: the generic cell rate algorithm in its form of virtual scheduling (ITU-T I.371,
    annex A). ``next_start`` is when the next slot is due if all of them come evenly; one may come ``tolerance``
    earlier.

    Args:
        limit: the number of slots; None for no limit.
        next_stage: where a task needs its next slot, None if nowhere. A task that waits here holds no slot there.
        interval: seconds between two slots; 0 for no rate.
        tolerance: seconds that a slot may come early, for bursts.

    """

    __slots__ = (
        "interval",
        "limit",
        "next_stage",
        "next_start",
        "timer",
        "timer_loop",
        "tolerance",
        "used",
        "waiting",
    )

    def __init__(
        self, limit: int | None, next_stage: Slots | None, interval: float = 0.0, tolerance: float = 0.0
    ) -> None:
        self.limit: float = math.inf if limit is None else limit
        self.next_stage: Slots | None = next_stage
        self.interval: float = interval
        self.tolerance: float = tolerance
        self.next_start: float = -math.inf
        # Calls ``wake`` when the next slot is due, on the loop of a task that waits.
        self.timer: Any = None
        self.timer_loop: Any = None
        self.used: int = 0
        # Not a dict: finding its first entry means skipping all entries that were removed before it.
        self.waiting: OrderedDict[Record, None] = OrderedDict()

    def has_slot(self, record: Record) -> bool:
        """Return whether a slot is free, and due at the time of a record's loop."""
        if self.used >= self.limit:
            return False
        return self.interval == 0 or record.records.now() >= self.next_start - self.tolerance

    def take(self, record: Record) -> None:
        """Give a slot to a record."""
        if self.interval > 0:
            self.next_start = max(record.records.now(), self.next_start) + self.interval
        self.used += 1
        record.slots_held += 1

    def see_to_timer(self) -> None:
        """Have ``wake`` called when the next slot is due, if a task waits for that."""
        if self.interval == 0 or self.used >= self.limit:
            return
        if not self.waiting:
            self.drop_timer()
            return
        records = next(iter(self.waiting)).records
        # Not on that of another task: its loop may end before.
        loop: Any = records.held_loop
        if self.timer is not None and self.timer_loop is loop:
            return
        self.drop_timer()
        running: Any = _get_running_loop()
        if loop is not running:
            # If its loop is closed, the release of its slots sees to the timer of the next one.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self.wake)
            return
        wait = self.next_start - self.tolerance - records.now()
        self.timer = loop.call_later(max(wait, SHORTEST_WAIT), self.wake)
        self.timer_loop = loop

    def drop_timer(self) -> None:
        """Forget the timer; one of another thread's loop fires, and finds nothing to do."""
        if self.timer is not None and self.timer_loop is _get_running_loop():
            self.timer.cancel()
        self.timer = self.timer_loop = None

    def wake(self) -> None:
        """Pass on the slots that are due."""
        with _slots_lock:
            self.drop_timer()
            self.hand_on()

    def acquire(self, record: Record) -> bool:
        """Acquire a slot of this and of every later stage; return False if the task has to wait for one."""
        stage: Slots | None = self
        with _slots_lock:
            while stage is not None:
                # First come, first served.
                if stage.waiting and stage.used < stage.limit:
                    # A turn could not be granted when the slot became free.
                    stage.hand_on()
                if stage.waiting or not stage.has_slot(record):
                    if record.turn is None:
                        # Before a thread can grant it. Another one may have freed a slot meanwhile: look again.
                        record.records.queue(record)
                        continue
                    stage.waiting[record] = None
                    stage.see_to_timer()
                    return False
                stage.take(record)
                stage = stage.next_stage
        return True

    def release(self, record: Record) -> None:
        """Free the slots that a task holds from this stage on, end its wait, and pass the slots on."""
        stage: Slots | None = self
        with _slots_lock:
            held, record.slots_held = record.slots_held, 0
            while stage is not None and held > 0:
                held -= 1
                stage.used -= 1
                stage.hand_on()
                stage = stage.next_stage
            if stage is not None:
                stage.waiting.pop(record, None)
                stage.see_to_timer()

    def hand_on(self) -> None:
        """Pass free slots on to the tasks that wait for them."""
        while self.waiting:
            record = next(iter(self.waiting))
            if not self.has_slot(record):
                break
            del self.waiting[record]
            self.take(record)
            if self.next_stage is not None and not self.next_stage.acquire(record):
                continue
            try:
                if grant_turn(record.records.held_loop, record.turn):
                    continue
            except BaseException:
                # It stays the next one.
                give_up(record)
                first = record.slots
                assert first is not None, "it waits there"
                first.waiting[record] = None
                first.waiting.move_to_end(record, last=False)
                raise
            # Its loop is closed and it will never run: free the slots that it just acquired.
            give_up(record)
        self.see_to_timer()


def give_up(record: Record) -> None:
    """Give back what a record holds, and nothing more."""
    stage: Any = record.slots
    while record.slots_held:
        record.slots_held -= 1
        stage.used -= 1
        stage = stage.next_stage


@final
class TimerWheel:
    """Timeouts by the millisecond: O(1) to arm and to disarm, O(log n) in the number of different ticks to advance.

    A tick is a number of milliseconds since the wheel's start. The compiled registry has a hierarchical wheel; here a
    dict of slots, with a heap of their ticks, does the same work faster. An empty slot is removed at once, its tick
    when the heap is twice as large as needed.
    """

    __slots__ = ("_due", "_heap", "_slots", "armed", "now")

    def __init__(self) -> None:
        self.armed: int = 0
        self.now: int = 0
        self._slots: dict[int, dict[Record, None]] = {}
        self._heap: list[int] = []
        self._due: dict[Record, None] = {}

    def arm(self, record: Record, tick: int) -> None:
        tick = max(tick, self.now + 1)
        armed = self.armed + 1
        slot = self._slots.get(tick)
        if slot is None:
            if len(self._heap) > 64 and len(self._heap) > 2 * len(self._slots):
                heap = [tick, *self._slots]
                heapq.heapify(heap)
                self._heap = heap
            else:
                heapq.heappush(self._heap, tick)
            # After the heap, which may have ticks without a slot; a slot without a tick would never be due.
            slot = self._slots[tick] = {}
        slot[record] = None
        record.tick = tick
        self.armed = armed

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
            # An emptied dict keeps its memory; a new one has none to keep.
            self._slots = {}
            self._heap = []

    def next_tick(self) -> int:
        while self._heap and self._heap[0] not in self._slots:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else MAX_TICK

    def advance(self, tick: int) -> None:
        while (following := self.next_tick()) <= tick:
            # Twice rather than nowhere: what is due is disarmed before it is handed out.
            self._due.update(self._slots[following])
            del self._slots[following]
            heapq.heappop(self._heap)
        self.now = max(tick, self.now)

    def has_due(self) -> bool:
        return bool(self._due)

    def pop_due(self) -> Record | None:
        for record in self._due:
            self.disarm(record)
            return record
        return None


@final
class LoopRecords:
    """The live records of one event loop, in order of creation, with their timers and counters.

    Belongs to the thread of its loop. While it holds a record it owns itself and its loop, so that neither it nor its
    manager can be collected under a running task. Without a record it keeps no loop alive.
    """

    def __init__(self, registry: RegistryCore, loop: AbstractEventLoop) -> None:
        self.registry = registry
        self.loop_ref: ref[AbstractEventLoop] = ref(loop)
        # The loop, None without a record.
        self.held_loop: Any = None
        # asyncio's and uvloop's clock is the monotonic one. A loop with another one, such as a test's, is asked.
        stock = getattr(type(loop), "time", None) is BaseEventLoop.time or type(loop).__module__ == "uvloop"
        self.now: Callable[[], float] = monotonic if stock else partial(_time_of, self.loop_ref)
        self.records: dict[int, Record] = {}
        # Tasks that have not ended: those that the manager owns, and those that are observed or services.
        self.owned: int = 0
        self.observed: int = 0
        # Owned tasks that wait for a concurrency slot, and tasks between two attempts that do not.
        self.queued: int = 0
        self.waiting: int = 0
        # ``_on_idle`` is called when a task ends and at most this many owned ones are left; -1 for never.
        self.idle_threshold: int = -1
        self.next_id: int = 0
        self.last_id: int = 0
        # NameStats by name, and those of all names beyond MAX_NAMES together.
        self.names: dict[str, NameStats] = {}
        self.other_names: NameStats = NameStats()
        # Facts about some live tasks: a dict for each of their records.
        self.notes: dict[Record, dict[str, Any]] = {}
        # What ``info`` says of the loop and of the thread that first used it.
        self.label: str
        self.thread: str | None
        self.label, self.thread = describe_loop(loop)
        # The stand-in for a loop of an executor runs no tasks.
        self.current_task: Callable[[Any], Any] = current_task if isinstance(loop, AbstractEventLoop) else _no_task
        # A foreign factory built tasks here.
        self.has_foreign_tasks: bool = False
        self.wheel: TimerWheel = TimerWheel()
        self.wheel_start: float = self.now()
        self.timer: asyncio.TimerHandle | None = None
        self.timer_tick: int = 0
        self.timer_wanted: bool = False
        self.eager: bool | None = None
        # Records of fire() since the batch was scheduled; None if no batch is open.
        self.batch: list[Record] | None = None
        # The current submission of each key.
        self.keys: dict[Any, Submission] = {}
        self.batch_clock: float = 0.0
        # When a task last ended: the next one of a batch starts then.
        self.last_end: float = 0.0
        # The id of the task that last ended in a step of the loop.
        self.last_ended: int = 0

    @property
    def loop(self) -> AbstractEventLoop | None:
        """The loop, None if it is gone."""
        return self.loop_ref()

    def is_of(self, loop: AbstractEventLoop) -> bool:
        return self.held_loop is loop or self.loop_ref() is loop

    def task_factory(self) -> Any:
        return self.held_loop.get_task_factory()

    def builds_tasks(self, factory: Any) -> bool:
        """Return whether tasks are built here: the loop has no factory, asyncio's eager one, or the manager's own."""
        return factory is None or factory is self.registry._eager_factory or factory == self.registry.task_factory

    def can_start_eagerly(self) -> bool:
        if self.eager is None:
            self.eager = self.registry._has_eager_tasks(self.held_loop)
        return self.eager

    def enroll(self, coro: Any, name: str, timeout: float, context: Mapping[str, Any] | None, observed: bool) -> Record:
        """Make the record of a new task and append it to the list."""
        stats = self.names.get(name)
        if stats is None:
            stats = self.stats_of(name)
        record = Record.__new__(Record)
        record.coro = coro
        record.records = self
        record.name_stats = stats
        record.given_context = context
        record.seconds = timeout
        record.tick = -1
        record.observed = observed
        record.given_name = name
        record.task = None
        record.turn = None
        record.slots = None
        record.slots_held = 0
        record.state = RUNNING
        # Set before the list has the record, because other threads read the list.
        record.created = self.now()
        record.expired = False
        record.queued = False
        record.waiting = False
        record.submission = None
        record.paused = False
        record.service = False
        record.task_set = None
        record.flags = 0
        record.entered = False
        record.noted = False
        # None without a record: no task of this manager runs then.
        loop = self.held_loop
        task = None if loop is None else self.current_task(loop)
        record.parent_id = self.id_of(task) if isinstance(task, TrackedTask) or self.has_foreign_tasks else 0
        if self.next_id == self.last_id:
            self.next_id = self.registry._reserve_ids(IDS_AT_ONCE)
            self.last_id = self.next_id + IDS_AT_ONCE
        record.task_id = task_id = self.next_id + 1
        # What can fail comes first, and so do sums: a number is an object that has to be made.
        started = stats.started + 1
        live = (self.observed if observed else self.owned) + 1
        if not self.records:
            _in_use.add(self)
            self.held_loop = self.loop_ref()
        self.next_id = task_id
        if self.registry._tracks_origin:
            record.note("origin", origin())
        self.records[task_id] = record
        if observed:
            self.observed = live
        else:
            self.owned = live
        stats.started = started
        return record

    def make_service(self, record: Record) -> None:
        """Have the manager not wait for a task that was just enrolled."""
        record.service = True
        self.owned -= 1
        self.observed += 1

    def id_of(self, task: Any) -> int:
        """Return the id of a task that runs, 0 if it is none of this manager."""
        if task is None:
            return 0
        record = record_of(task) if isinstance(task, TrackedTask) else foreign_record(task)
        return record.task_id if isinstance(record, Record) and record.records is self else 0

    def stats_of(self, name: str) -> NameStats:
        if len(self.names) >= MAX_NAMES:
            return self.other_names
        stats = self.names[name] = NameStats()
        return stats

    # -- building tasks -------------------------------------------------------------------------------------------

    def launch(self, record: Record, eager: bool, context: Context | None) -> Any:
        """Build and return the task of a record. If that fails, remove the record and close the coroutine."""
        # Close the batch of fire(): it starts before this task, and what fire() defers from now on starts after it.
        self.batch = None
        wrapper = None
        try:
            loop = self.held_loop
            if context is not None or eager or self.registry._slots is not None or loop.get_task_factory() is not None:
                return self.launch_specially(record, eager, context)
            if record.seconds > 0:
                self.arm(record)
            wrapper = _wrap(record, run if record.submission is None else run_submitted)
            task = _task_type(record)(wrapper, loop=loop, name=record.given_name)
        except BaseException:
            self.discard(record, wrapper)
            raise
        task._record = record
        self.follow(record, task)
        if record.seconds > 0 and self.lacks_timer(record):
            self.want_timer_of(record, wrapper)
        return task

    def launch_in_set(self, record: Record, eager: bool, context: Context | None) -> Any:
        self.batch = None
        return self.launch_specially(record, eager, context)

    def launch_held(self, record: Record) -> Any:
        """Build the task of a record that is held until ``proceed``."""
        self.batch = None
        try:
            self.queue(record)
        except BaseException:
            self.discard(record, None)
            raise
        return self.launch_specially(record, False, None)

    def launch_specially(self, record: Record, eager: bool, context: Context | None) -> Any:
        """Launch a task that starts eagerly, runs in a given context, needs a slot or is built by a factory."""
        wrapper = None
        try:
            if self.may_begin(record):
                factory = self.task_factory()
                if record.task_set is None:
                    # An executor decides which of its tasks start eagerly.
                    eager = eager or (factory is not None and factory is self.registry._eager_factory)
            else:
                factory = self.task_factory()
                # It runs up to its wait, cheaper than in a step of the loop; the user's coroutine is not entered.
                eager = context is None
            if not record.queued:
                self.arm(record)
                self.want_timer(record)
            wrapper = _wrap(record, _runner_of(record))
            if not self.builds_tasks(factory):
                task = self.build_by_factory(record, wrapper, context)
            else:
                task = self.build(record, wrapper, eager, context)
                task._record = record
        except BaseException:
            self.discard(record, wrapper)
            raise
        self.follow(record, task)
        try:
            return task
        finally:
            # The error of an eager task keeps this frame through its traceback: the frame must not keep the task.
            del task

    def may_begin(self, record: Record) -> bool:
        """Return whether a task is not held and has its concurrency slots; if it has to wait for one, queue it."""
        if record.queued:
            return False
        if not self.acquire_slots(record):
            return False
        if record.queued:
            # A slot became free while its turn was made.
            record.turn = None
            record.queued = False
            self.queued -= 1
        return True

    def suspend(self, record: Record, seconds: float) -> None:
        """Have a task wait between two attempts; it gives its concurrency slots back."""
        self.disarm(record)
        if record.slots is not None:
            record.slots.release(record)
            record.slots = None
        record.turn = self.held_loop.create_future()
        record.waiting = True
        self.waiting += 1
        if seconds > 0:
            self.arm_after(record, self.now(), seconds)
            self.want_timer(record)
        else:
            record.proceed()

    def acquire_slots(self, record: Record) -> bool:
        """Acquire the concurrency slots that a task needs; return False if it has to wait for one."""
        if record.service:
            return True
        slots = self.registry._slots if record.task_set is None else record.task_set.slots
        limits = self.registry._limits
        if limits is not None and record.task_set is None:
            # A limit of its key or of its name comes first.
            key = None if record.submission is None else record.submission.key
            slots = limits.get(key) or limits.get(record.given_name) or slots
        record.slots = slots
        return slots is None or slots.acquire(record)

    def queue(self, record: Record) -> None:
        """Mark a record as waiting for its slots, or for what holds it."""
        record.turn = self.held_loop.create_future()
        self.queued += not record.service
        record.queued = True

    def build_by_factory(self, record: Record, wrapper: Coroutine[Any, Any, Any], context: Context | None) -> Any:
        """Build a task with the factory of the loop, a foreign one."""
        options: dict[str, Any] = {"name": record.given_name}
        if context is not None:
            options["context"] = context
        self.has_foreign_tasks = True
        # Made before there is a task: what fails later would leave one that nobody knows.
        on_end = partial(finish_unentered, record, wrapper)
        own_context = copy_context()
        task = self.held_loop.create_task(wrapper, **options)
        task.add_done_callback(on_end, context=own_context)
        return task

    def build(self, record: Record, wrapper: Coroutine[Any, Any, Any], eager: bool, context: Context | None) -> Any:
        """Build a task here, eagerly if that is wanted and possible."""
        options: dict[str, Any] = {"loop": self.held_loop, "name": record.given_name, "context": context}
        if eager and context is not None:
            # Raises if the context is entered already: the task's constructor would notice only when half done.
            context.run(do_nothing)
        if eager and self.can_start_eagerly():
            options["eager_start"] = True
        return _task_type(record)(wrapper, **options)

    def follow(self, record: Record, task: Any) -> None:
        """Keep a task that may have run eagerly, unless it has ended."""
        if record.state == RUNNING:
            record.task = task
        if task._source_traceback:
            _hide_own_frames(task)

    def discard(self, record: Record, wrapper: Coroutine[Any, Any, Any] | None) -> None:
        """Remove a record whose task could not be built."""
        if record.state != RUNNING:
            # The first step of an eager task raised an error that stops the loop: it ran, and its end was counted.
            return
        if wrapper is not None:
            dismiss(record, wrapper)
        record.coro.close()
        if record.state == RUNNING:
            record.name_stats.started -= 1
            record.state = ABANDONED
            try:
                self.disarm(record)
            finally:
                try:
                    self.unlink(record)
                finally:
                    _release(record)

    # -- ending tasks ---------------------------------------------------------------------------------------------

    def finish(self, record: Record, outcome: int, error: BaseException | None) -> None:
        """Do the bookkeeping of a task that ended; ``_release`` cuts its references, after the report."""
        end = self.now()
        self.last_end = end
        self.last_ended = record.task_id
        record.took = duration = end - record.created
        record.state = outcome
        # Whatever fails from here on, the record leaves the list.
        try:
            record.name_stats.count_end(outcome, duration)
            if record.tick >= 0:
                self.disarm(record)
            if outcome == FAILED and error is not None:
                record.name_stats.last_error = errors.type_of(error)
            if self.registry._keeps_history:
                self.registry._remember(record, error)
        finally:
            if record.submission is None:
                self.unlink(record)
            else:
                self.unlink_submitted(record, error)

    def unlink_submitted(self, record: Record, error: BaseException | None) -> None:
        """Do as ``unlink``, and have those take note of the end that follow the submission."""
        if record.waiting:
            record.waiting = False
            self.waiting -= not record.queued
        try:
            self.unlink(record)
        finally:
            try:
                if record.submission.key is not None:
                    self.free_key(record.submission)
            finally:
                if record.submission.listener is not None:
                    record.submission.listener._ended(record, error)

    def submission_of(self, key: Any) -> Submission | None:
        """Return the submission of a key whose task has not ended, None if there is none."""
        try:
            return self.keys.get(key)
        except TypeError:
            raise errors.unhashable_key(key) from None

    def free_key(self, submission: Submission) -> None:
        """Free the key of a submission whose task has ended or could not start, for the one that waits for that."""
        current = self.keys.get(submission.key)
        if current is not submission:
            # Held until the end of the current one; or another one took its place meanwhile.
            if current is not None and current.following is submission:
                current.following = None
            return
        following, submission.following = submission.following, None
        if following is None:
            del self.keys[submission.key]
            return
        self.keys[submission.key] = following
        if following.record is not None and following.record.state == RUNNING:
            following.record.proceed()

    def disarm(self, record: Record) -> None:
        """End the timeout of a record, if it is armed, and the loop's timer with the last one."""
        if record.tick < 0:
            return
        self.wheel.disarm(record)
        if self.wheel.armed == 0 and self.timer is not None:
            timer, self.timer = self.timer, None
            timer.cancel()

    def unlink(self, record: Record) -> None:
        """Remove a record from the list and from all counts, then notify those that wait for that."""
        del self.records[record.task_id]
        if record.queued:
            record.queued = False
            self.queued -= not record.service
        if record.observed or record.service:
            self.observed -= 1
        else:
            self.owned -= 1
        if not self.records:
            self.held_loop = None
            _in_use.discard(self)
            # An emptied dict keeps its memory; a new one has none to keep.
            self.records = {}
        if record.slots is not None or record.task_set is not None:
            self.leave(record)
        elif not record.observed:
            self.on_left()

    def leave(self, record: Record) -> None:
        """Have the slots and the executor of a record take note of its end, whatever fails meanwhile."""
        try:
            if record.slots is not None:
                record.slots.release(record)
        finally:
            try:
                if record.task_set is not None:
                    record.task_set.leave()
            finally:
                self.on_left()

    def on_left(self) -> None:
        """Have those look again who wait for the end of owned tasks."""
        try:
            if self.owned <= self.idle_threshold:
                self.registry._on_idle()
        finally:
            if self.registry._capacity_wanted:
                self.registry._on_capacity()

    # -- timeouts -------------------------------------------------------------------------------------------------

    def arm(self, record: Record) -> None:
        """Put a record into the wheel, if it has a timeout; ``want_timer`` sees to the loop's timer."""
        if record.seconds > 0:
            self.arm_after(record, record.created, record.seconds)

    def arm_after(self, record: Record, since: float, seconds: float) -> None:
        """Put a record into the wheel, for a wait or a timeout that began at the time ``since``."""
        deadline = (since + seconds - self.wheel_start) * TICKS_PER_SECOND
        if deadline >= MAX_TICK:
            return
        # The first tick at or after the deadline: never early, less than a tick late.
        self.wheel.arm(record, math.ceil(deadline) if deadline > 0 else 0)

    def lacks_timer(self, record: Record) -> bool:
        """Return whether a record is armed, and no timer of the loop comes in time for it."""
        return record.tick >= 0 and not self.timer_wanted and (self.timer is None or record.tick < self.timer_tick)

    def want_timer(self, record: Record) -> None:
        """Have the loop's timer set in time for a record: in the next iteration, once for all tasks of this one."""
        if self.lacks_timer(record):
            self.held_loop.call_soon(self.set_timer)
            self.timer_wanted = True

    def want_timer_of(self, record: Record, wrapper: Coroutine[Any, Any, Any]) -> None:
        """Do as ``want_timer`` after the first step of a new task: one that ends in it never gets a timer."""
        try:
            self.want_timer(record)
        except BaseException:
            # The loop steps the task all the same, which ends at once then.
            self.discard(record, wrapper)
            raise

    def set_timer(self) -> None:
        """Schedule ``wake`` for the earliest slot in use."""
        self.timer_wanted = False
        if self.wheel.armed == 0:
            return
        if self.wheel.has_due():
            # What ``wake`` raised kept it from the rest.
            self.held_loop.call_soon(self.wake)
            return
        tick = self.wheel.next_tick()
        if self.timer is not None and tick >= self.timer_tick:
            return
        # A clock far from its zero may not resolve less than SHORTEST_WAIT. Without this minimum, wake would be called
        # again and again at the same time.
        wait = tick / TICKS_PER_SECOND + self.wheel_start - self.now()
        before = self.timer
        self.timer = self.held_loop.call_later(max(wait, SHORTEST_WAIT), self.wake)
        self.timer_tick = tick
        if before is not None:
            before.cancel()

    def wake(self) -> None:
        """Report the tasks whose timeout has expired, and set the timer again."""
        self.timer = None
        try:
            self.wheel.advance(int((self.now() - self.wheel_start) * TICKS_PER_SECOND))
            while (record := self.wheel.pop_due()) is not None:
                if record.turn is not None:
                    record.proceed()
                    continue
                record.expired = True
                self.registry._on_timeout(record)
        finally:
            self.set_timer()

    # -- fire: starts that wait for the next iteration ------------------------------------------------------------

    def defers(self) -> bool:
        """Return whether ``fire`` may defer a start: tasks can start eagerly, and no foreign factory builds them."""
        # The answer holds for a whole batch, which starts in the next iteration of the loop.
        return self.batch is not None or self.can_defer()

    def can_defer(self) -> bool:
        return self.registry._slots is None and self.can_start_eagerly() and self.builds_tasks(self.task_factory())

    def start_fired(self, record: Record) -> None:
        """Start a task of ``fire``, in the next iteration of the loop if possible."""
        if self.defers():
            self.defer(record)
        else:
            self.launch(record, False, None)

    def defer(self, record: Record) -> None:
        """Start a task in the next iteration of the loop, in one batch with its neighbours."""
        record.turn = copy_context()
        if self.batch is None:
            batch = [record]
            self.held_loop.call_soon(self.start_batch, batch)
            self.batch_clock = record.created
            self.batch = batch
        else:
            self.batch.append(record)
        record.created = self.batch_clock

    def start_batch(self, batch: list[Record]) -> None:
        """Start the tasks that ``fire`` deferred, each up to its first suspension."""
        if batch is self.batch:
            self.batch = None
        index = 0
        try:
            # Not before the call of fire(), so no timeout comes early; and one clock read per task instead of two.
            self.last_end = self.now()
            for record in batch:
                index += 1
                if record.state == RUNNING:
                    self.start_deferred(record)
        finally:
            if index < len(batch):
                # The error stops the loop, or was raised by bgtasks: the other tasks start when the loop goes on.
                loop: Any = self.loop
                loop.call_soon(self.start_batch, batch[index:])

    def start_deferred(self, record: Record) -> None:
        """Start one task up to its first suspension; what keeps it from being built is its failure."""
        waited = self.last_end - record.created
        record.created = self.last_end
        wrapper = None
        try:
            record.name_stats.count_wait(waited)
            record.entered = True
            options: dict[str, Any] = {"loop": self.held_loop, "eager_start": True}
            wrapper = _wrap(record, run if record.submission is None else run_submitted)
            context = record.turn
            record.turn = None
            task = TrackedTask(wrapper, name=record.given_name, context=context, **options)
        except BaseException as error:
            self.fail_unbuilt(record, wrapper, error)
            if not isinstance(error, Exception):
                raise
            return
        task._record = record
        self.follow(record, task)
        # As in ``launch_specially``: the frame must not keep the task.
        del task
        if record.state == RUNNING and record.seconds > 0:
            self.arm(record)
            self.want_timer(record)

    def fail_unbuilt(self, record: Record, wrapper: Coroutine[Any, Any, Any] | None, error: BaseException) -> None:
        """Finish, as failed, a record that ``fire`` accepted and whose task could not be built."""
        if record.state != RUNNING:
            # Its first step raised what stops the loop: it ran, and its end was counted.
            return
        if wrapper is not None:
            dismiss(record, wrapper)
        record.turn = None
        record.coro.close()
        if record.state == RUNNING:
            record.fail(error)

    def snapshot(self) -> list[Record]:
        """Return the live records; the list is complete before anything else can run."""
        return list(self.records.values())

    def parts(self, count: int) -> Iterator[list[Record]]:
        """Yield the live records in parts of up to ``count``, each copied at once; some may end in between."""
        records = self.snapshot()
        for start in range(0, len(records), count):
            yield records[start : start + count]

    def infos(self) -> list[TaskInfo]:
        """Return a ``TaskInfo`` for each live record."""
        return [record.info() for record in self.snapshot() if record.state == RUNNING and record.records is not None]


def _time_of(loop_ref: ref[AbstractEventLoop]) -> float:
    loop: Any = loop_ref()
    return loop.time()  # type: ignore[no-any-return]


def _no_task(loop: Any) -> None:
    """Stand in for ``asyncio.current_task`` where no tasks run."""


def _hide_own_frames(task: Any) -> None:
    # In debug mode a task remembers where it was created; the loop's own create_task hides its frame, too.
    while task._source_traceback and task._source_traceback[-1].filename == __file__:
        del task._source_traceback[-1]


def _seconds(coro: Any, timeout: float | None) -> float:
    """Return a timeout as a float, 0 for none."""
    if timeout is None:
        return 0.0
    if type(timeout) is float and 0.0 < timeout < math.inf:
        return timeout
    return check_timeout(coro, timeout)


@final
class TaskSet:
    """The tasks or functions of one executor: how many have not ended, and how many may run at once.

    It belongs to the thread of the executor's loop, as do the records of its tasks.

    Args:
        registry: the registry that keeps their records.
        owner: the set calls its ``on_idle()`` when the last one ends, the manager its ``accept_failure``.
        max_running: how many of them may run at once; None for no limit.
        context: the mapping for the log records of its tasks; None for none.

    """

    __slots__ = ("context", "live", "owner", "registry", "slots")

    def __init__(
        self, registry: RegistryCore, owner: Any, max_running: int | None, context: Mapping[str, Any] | None
    ) -> None:
        self.registry: RegistryCore = registry
        self.owner: Any = owner
        self.context: Mapping[str, Any] | None = context
        # The executor's own limit comes first.
        self.slots: Slots | None = registry._slots if max_running is None else Slots(max_running, registry._slots)
        self.live: int = 0

    def create_task(
        self,
        coro: Coroutine[Any, Any, Result],
        name: str | None,
        timeout: float | None,
        eager_start: bool,
        contextvars_context: Context | None,
        flags: int,
        submission: Any = None,
    ) -> Task[Result]:
        """Start a coroutine in this set, as ``RegistryCore.create_task`` does; that of a submission may run again."""
        registry = self.registry
        records = _records_here(registry, coro)
        try:
            if type(name) is not str:
                name = _name_of(coro) if name is None else str(name)
            if (registry._shut or registry._cap) and _must_ask(registry, records):
                registry._admit(coro, name, False)
            seconds = _seconds(coro, timeout)
            live = self.live + 1
            record = records.enroll(coro, name, seconds, self.context, False)
            record.task_set = self
            record.flags = flags
            if submission is not None:
                record.submission = submission
                submission.record = record
            self.live = live
            if self.slots is not None:
                return records.launch_in_set(record, eager_start, contextvars_context)  # type: ignore[no-any-return]
            return records.launch(record, eager_start, contextvars_context)  # type: ignore[no-any-return]
        except BaseException:
            errors.close_refused(coro)
            raise

    def enroll_call(
        self,
        records: LoopRecords,
        call: Any,
        name: str,
        timeout: float | None,
        flags: int,
        future: Any,
        submission: Any = None,
    ) -> Record:
        """Return the record of a queued function, with ``call`` as its coroutine. Safe from any thread."""
        registry = self.registry
        if (registry._shut or registry._cap) and _must_ask(registry, records):
            registry._admit(call, name, False)
        with _calls_lock:
            live, queued = self.live + 1, records.queued + 1
            record = records.enroll(call, name, 0.0 if timeout is None else timeout, self.context, False)
            record.task = future
            record.task_set = self
            record.flags = flags
            if submission is not None:
                record.submission = submission
                submission.record = record
            self.live = live
            record.queued = True
            records.queued = queued
            # Not by the caller: what stops it after this call would leave a record that nobody knows.
            call.record = record
        return record

    def leave(self) -> None:
        self.live -= 1
        if self.live == 0:
            self.owner.on_idle()


class RegistryCore(RegistryHooks):
    """The hot half of a registry: starting tasks, and the records of each event loop.

    ``Registry`` derives from it and adds the cold half. The methods that it calls but does not define are in
    ``_hooks.py``.

    Args:
        cap: the number of owned tasks from which ``create_task`` and ``fire`` ask ``_admit``; 0 for no cap.
        max_running: how many coroutines may run at once; None for no limit.
        keeps_history: whether ``_remember`` is called at the end of each task.
        tracks_origin: whether to note the line that creates each task.
        muted: the cache of a logger; while ``muted.get(muted_level)`` is False, only failures are reported.
        muted_level: the logging level of that report.

    """

    def __init__(
        self,
        cap: int,
        max_running: int | None,
        keeps_history: bool,
        tracks_origin: bool,
        muted: dict[int, bool] | None,
        muted_level: int,
    ) -> None:
        self._current: LoopRecords | None = None
        # By the id of the loop, which this keeps no reference to.
        self._by_loop: dict[int, LoopRecords] = {}
        self._shut = False
        self._cap = cap
        self._capacity_wanted = False
        self._slots = None if max_running is None else Slots(max_running, None)
        # The slots of a name or a key; None if there are none.
        self._limits: dict[Any, Slots] | None = None
        self._keeps_history = keeps_history
        self._tracks_origin = tracks_origin
        self._muted = muted
        self._muted_level = muted_level
        # The option ``retry`` of the last call of ``submit``, and what it means.
        self._last_retry: Any = None
        self._last_policy: Any = None
        self._eager_factory: Any = getattr(asyncio, "eager_task_factory", None)

    def _limit_starts(
        self,
        concurrency: int | None,
        timing: tuple[float, float],
        limits: dict[Any, tuple[int | None, tuple[float, float]]],
    ) -> None:
        """Have tasks wait for a rate, and those of some names and keys for limits of their own.

        Args:
            concurrency: how many tasks may run at once; None for no limit.
            timing: the seconds between two starts, and how many seconds one may come early.
            limits: both by name or key.

        """
        slots = self._slots = Slots(concurrency, None, *timing)
        self._limits = {name: Slots(count, slots, *pace) for name, (count, pace) in limits.items()} or None

    # -- starting tasks ------------------------------------------------------------------------------------------

    def create_task(
        self,
        coro: Coroutine[Any, Any, Result],
        *,
        name: str | None = None,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
        eager_start: bool = False,
        contextvars_context: Context | None = None,
        service: bool = False,
        retry: None = None,
    ) -> Task[Result]:
        """Start a coroutine in the background and keep it until it ends.

        Args:
            coro: a coroutine object.
            name: the name of the task in logs, statistics and ``repr``; need not be unique. By default that of the
                coroutine function.
            timeout: seconds after which the task is cancelled, > 0; None for no timeout.
            context: a mapping for the task's log records.
            eager_start: run up to the first suspension before this call returns (from Python 3.12 on; else ignored).
            contextvars_context: the ``contextvars.Context`` to run in; a copy of the current one by default.
            service: True for a task that runs as long as the program, such as a heartbeat: neither ``wait_for_all`` nor
                draining waits for it, ``shutdown`` cancels it after all others have had their time, and it counts
                neither in ``max_concurrency`` nor in ``max_pending_tasks``.
            retry: always None: a coroutine object cannot run twice. ``submit`` takes a function, and retries it.

        Returns:
            The task.

        Raises:
            NotACoroutineError: ``coro`` is not a coroutine object; call a coroutine function first.
            NoRunningLoopError: no event loop runs in this thread.
            ManagerClosedError: the manager was shut down.
            TaskRejectedError: the manager is at its cap.
            InvalidTimeoutError: ``timeout`` is not a finite number greater than 0.
            InvalidContextError: ``context`` is not a mapping, or ``contextvars_context`` not a ``Context``.
            InvalidOptionError: ``retry`` was given.

        After any of these errors the coroutine is closed.

        """
        records = _records_here(self, coro)
        try:
            if type(name) is not str:
                name = _name_of(coro) if name is None else str(name)
            if (self._shut or (self._cap and not service)) and _must_ask(self, records):
                self._admit(coro, name, False)
            seconds = _seconds(coro, timeout)
            if context is not None and type(context) is not dict:
                check_context(coro, context)
            if contextvars_context is not None and not isinstance(contextvars_context, Context):
                refuse_contextvars_context(coro, contextvars_context)
            if retry is not None:
                refuse_retry(coro)
            record = records.enroll(coro, name, seconds, context, False)
            if service:
                records.make_service(record)
            return records.launch(record, eager_start, contextvars_context)  # type: ignore[no-any-return]
        except BaseException:
            errors.close_refused(coro)
            raise

    @typed_submit
    def submit(
        self,
        function: Callable[..., Awaitable[Result]],
        /,
        *args: Any,
        name: str | None = None,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
        retry: RetryPolicy | None = None,
        key: Hashable = None,
        on_duplicate: OnDuplicate = "join",
        keep_result: float | None = None,
        **kwargs: Any,
    ) -> Task[Result]:
        """Run ``function(*args, **kwargs)`` in the background; unlike a coroutine object, it can run again.

        All attempts are one task with one id. Between two attempts the task is ``"waiting"``, and holds no concurrency
        slot. A failed attempt is logged as a warning if another one follows, the last one as an error. ``shutdown``
        ends the wait: the task then fails with the error of its last attempt.

        Args:
            function: a coroutine function, or a function that returns another awaitable. It is called at once, and
                again for each further attempt.
            args: its positional arguments.
            name: the name of the task; the qualified name of the coroutine by default.
            timeout: seconds after which an attempt is cancelled, > 0; None for no timeout.
            context: a mapping for the task's log records.
            retry: when to run it again after a failure: a ``Retry``, an object with its ``next_wait``, or a retrying
                object of tenacity; None for never.
            key: a hashable object: at most one task of a key runs at once, on each loop; None for no key. Cancelling
                a coroutine that awaits a task with a key does not cancel the task.
            on_duplicate: what to do while a task of the key has not ended: ``"join"`` returns that task, ``"skip"``
                returns None, and neither calls ``function``; ``"replace"`` cancels that task, and the new one begins at
                its end; with ``"queue_latest"`` the new one begins at its end, and takes the place of one that waits.
            keep_result: seconds for which ``result`` returns the outcome after the end of the task, > 0; None for not
                keeping it.
            kwargs: its keyword arguments. A function whose own parameter has the name of one of these options is
                submitted as a ``functools.partial``.

        Returns:
            The task; None if it was skipped.

        Raises:
            InvalidFunctionError: ``function`` is not callable, or its result is not awaitable.
            InvalidOptionError: ``retry`` is none of these objects, or another option has an invalid value.
            BgtasksError: the errors of ``create_task``, for the same reasons.
            BaseException: an error of the first call of ``function``.

        """
        policy = keep = None
        if retry is not None:
            if retry is not self._last_retry:
                self._last_policy = self._policy_of(retry)
                self._last_retry = retry
            policy = self._last_policy
        if keep_result is not None or on_duplicate != "join":
            keep = self._check_submission(key, on_duplicate, keep_result)
        if not callable(function):
            refuse_function(function, "submit")
        records = _records_of_running(self)
        current = None if key is None else records.submission_of(key)
        if current is not None and on_duplicate in ("join", "skip"):
            return current.task() if on_duplicate == "join" else None  # type: ignore[return-value]
        coro: Any = function(*args, **kwargs)
        if type(coro) is not CoroutineType:
            coro = coroutine_of(function, coro, "submit")
        if policy is None and key is None and keep is None:
            return self._launch(coro, name, timeout, context, None)
        submission = Submission(function, args, kwargs, policy, None)
        return _start_submission(  # type: ignore[no-any-return]
            self, records, coro, submission, key, keep, on_duplicate, (name, timeout, context)
        )

    def _make_submission(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], retry: Any, listener: Any
    ) -> Submission:
        """Return a new submission."""
        return Submission(function, args, kwargs, retry, listener)

    def _launch(
        self,
        coro: Coroutine[Any, Any, Result],
        name: str | None,
        timeout: float | None,
        context: Mapping[str, Any] | None,
        submission: Any,
        is_held: bool = False,
        is_service: bool = False,
    ) -> Task[Result]:
        """Start the first attempt of a submission, as ``create_task`` does; a held one waits for ``proceed``."""
        records = _records_here(self, coro)
        try:
            if type(name) is not str:
                name = _name_of(coro) if name is None else str(name)
            if (self._shut or (self._cap and not is_service)) and _must_ask(self, records):
                self._admit(coro, name, False)
            seconds = _seconds(coro, timeout)
            if context is not None and type(context) is not dict:
                check_context(coro, context)
            record = records.enroll(coro, name, seconds, context, False)
            if is_service:
                records.make_service(record)
            if submission is not None:
                record.submission = submission
                submission.record = record
            if is_held:
                return records.launch_held(record)  # type: ignore[no-any-return]
            return records.launch(record, False, None)  # type: ignore[no-any-return]
        except BaseException:
            errors.close_refused(coro)
            raise

    def _fire(
        self,
        coro: Coroutine[Any, Any, Any],
        name: str | None,
        timeout: float | None,
        context: Mapping[str, Any] | None,
        submission: Any,
    ) -> None:
        """Start a submission as ``fire`` does; at its cap the manager raises."""
        _fire_submission(self, coro, name, timeout, context, submission, may_drop=False)

    def _fire_during(self, function: Callable[[Any], object], argument: Any) -> None:
        """Call a function of a callback of the loop, and start what it fires right after it, as one batch."""
        records = _records_of_running(self)
        if records.held_loop is None:
            # Until it has a record again, as it needs the loop now.
            records.held_loop = records.loop
        try:
            is_open = records.can_defer()
        finally:
            if not records.records:
                records.held_loop = None
        if not is_open:
            function(argument)
            return
        batch: list[Record] = []
        records.batch_clock = records.now()
        records.batch = batch
        try:
            function(argument)
        finally:
            if records.batch is batch:
                records.batch = None
            if batch:
                records.start_batch(batch)

    def fire(
        self,
        coro: Coroutine[Any, Any, Any],
        *,
        name: str | None = None,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> bool:
        """Start a coroutine in the background at the lowest cost, and return no task.

        The task is counted and shown at once. It starts in the next iteration of the loop, in the order of the calls.

        Args:
            coro: a coroutine object.
            name: the name of the task in logs, statistics and ``repr``; need not be unique. By default that of the
                coroutine function.
            timeout: seconds after which the task is cancelled, > 0; None for no timeout.
            context: a mapping for the task's log records.

        Returns:
            True; False if the manager was at its cap: the coroutine is dropped and closed.

        Raises:
            BgtasksError: the errors of ``create_task``, for the same reasons; the coroutine is closed.

        """
        return _fire_submission(self, coro, name, timeout, context, None, may_drop=True)

    @typed_fire
    def fire_function(
        self,
        function: Callable[..., Awaitable[Any]],
        /,
        *args: Any,
        name: str | None = None,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
        retry: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> bool:
        """Run ``function(*args, **kwargs)`` in the background at the lowest cost, and return no task.

        It is to ``submit`` what ``fire`` is to ``create_task``: the task is counted and shown at once, and starts in
        the next iteration of the loop. All attempts are one task.

        Args:
            function: a coroutine function, or a function that returns another awaitable. It is called at once, and
                again for each further attempt.
            args: its positional arguments.
            name: the name of the task; the qualified name of the coroutine by default.
            timeout: seconds after which an attempt is cancelled, > 0; None for no timeout.
            context: a mapping for the task's log records.
            retry: when to run it again after a failure, as for ``submit``; None for never.
            kwargs: its keyword arguments.

        Returns:
            True; False if the manager was at its cap: nothing runs.

        Raises:
            InvalidFunctionError: ``function`` is not callable, or its result is not awaitable.
            InvalidOptionError: ``retry`` is not a policy.
            BgtasksError: the errors of ``create_task``, for the same reasons.
            BaseException: an error of the first call of ``function``.

        """
        if retry is not None and retry is not self._last_retry:
            self._last_policy = self._policy_of(retry)
            self._last_retry = retry
        if not callable(function):
            refuse_function(function, "fire_function")
        _records_of_running(self)
        coro: Any = function(*args, **kwargs)
        if type(coro) is not CoroutineType:
            coro = coroutine_of(function, coro, "fire_function")
        submission = None
        if retry is not None and self._last_policy is not None:
            submission = Submission(function, args, kwargs, self._last_policy, None)
        return _fire_submission(self, coro, name, timeout, context, submission, may_drop=True)

    def task_factory(
        self,
        loop: AbstractEventLoop,
        coro: Coroutine[Any, Any, Result] | Generator[Any, None, Result],
        **kwargs: Unpack[TaskFactoryOptions],
    ) -> Task[Result]:
        """Build a task for ``loop.set_task_factory(manager.task_factory)``, which tracks every task of the program.

        Such tasks are observed, not owned: they are counted, timed and shown, and ``cancel`` reaches them by id or
        name, which is that of the coroutine unless the task was given one. Caps and ``shutdown`` leave them alone, and
        their exceptions are handled as without a manager.

        Args:
            loop: the loop of the task.
            coro: the coroutine.
            kwargs: the loop's arguments for the task: ``name``, ``context``, ``eager_start``.

        Returns:
            The task.

        """
        options: Any = kwargs
        if not iscoroutine(coro):
            # A generator, which asyncio takes in 3.11 and refuses later.
            return Task(coro, loop=loop, **options)  # type: ignore[arg-type, unused-ignore]
        try:
            records = _records_of(self, loop)
            name = options.get("name")
            record = records.enroll(coro, _name_of(coro) if name is None else str(name), 0.0, None, True)
        except BaseException:
            errors.close_refused(coro)
            raise
        wrapper = None
        try:
            wrapper = _wrap(record, run)
            task = TrackedTask(wrapper, loop=loop, **options)
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

    def _forget_loop(self, loop_id: int) -> None:
        """Remove a loop that was closed; by the ``id`` that it has or had."""
        if self._current is self._by_loop.pop(loop_id):
            self._current = None


def _must_ask(registry: RegistryCore, records: LoopRecords) -> bool:
    # The count of one loop is known here; _admit adds up those of several.
    return registry._shut or records.owned >= registry._cap or len(registry._by_loop) > 1


def _fire_submission(
    registry: RegistryCore,
    coro: Any,
    name: str | None,
    timeout: float | None,
    context: Mapping[str, Any] | None,
    submission: Submission | None,
    *,
    may_drop: bool,
) -> bool:
    """Do as ``fire`` with a coroutine, or with the first attempt of a submission."""
    records = _records_here(registry, coro)
    record = None
    try:
        if type(name) is not str:
            name = _name_of(coro) if name is None else str(name)
        is_full = (registry._shut or registry._cap) and _must_ask(registry, records)
        if is_full and not registry._admit(coro, name, may_drop):
            return False
        seconds = _seconds(coro, timeout)
        if context is not None and type(context) is not dict:
            check_context(coro, context)
        record = records.enroll(coro, name, seconds, context, False)
        if submission is not None:
            record.submission = submission
            submission.record = record
        records.start_fired(record)
    except BaseException:
        if record is not None:
            records.discard(record, None)
        errors.close_refused(coro)
        raise
    return True


def _start_submission(
    registry: RegistryCore,
    records: LoopRecords,
    coro: Any,
    submission: Submission,
    key: Any,
    keep: float | None,
    on_duplicate: str,
    options: tuple[Any, Any, Any],
) -> Any:
    """Start a submission, unless the call of its function has started another one of its key; return the task."""
    if keep is not None:
        registry._keep_result(submission, keep)
    if key is not None:
        submission.shared = True
        submission.key = key
        current = records.keys.setdefault(key, submission)
        if current is not submission:
            return registry._submit_duplicate(current, coro, submission, on_duplicate, options)
    try:
        task = registry._launch(coro, *options, submission)
    except BaseException:
        if key is not None:
            records.free_key(submission)
        raise
    try:
        if keep is not None:
            registry._follow_result(submission)
        return task
    finally:
        # The error of an eager task keeps this frame through its traceback: the frame must not keep the task.
        del task


def _records_of_running(registry: RegistryCore) -> LoopRecords:
    """Return the records of the running loop."""
    loop = _get_running_loop()
    if loop is None:
        raise errors.no_running_loop()
    records = registry._current
    if records is not None and (records.held_loop is loop or records.loop_ref() is loop):
        return records
    return _records_of(registry, loop)


def _records_here(registry: RegistryCore, coro: Any) -> LoopRecords:
    if type(coro) is not CoroutineType and not iscoroutine(coro):
        raise errors.not_a_coroutine(coro)
    loop = _get_running_loop()
    if loop is None:
        errors.close_refused(coro)
        raise errors.no_running_loop()
    records = registry._current
    if records is not None and (records.held_loop is loop or records.loop_ref() is loop):
        return records
    try:
        return _records_of(registry, loop)
    except BaseException:
        errors.close_refused(coro)
        raise


def _records_of(registry: RegistryCore, loop: AbstractEventLoop) -> LoopRecords:
    """Return the records of a loop, made at its first use."""
    records = registry._by_loop.get(id(loop))
    if records is None or not records.is_of(loop):
        records = registry._add_loop(loop, LoopRecords)
    registry._current = records
    return records
