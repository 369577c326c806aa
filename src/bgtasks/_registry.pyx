# cython: language_level=3, binding=True, annotation_typing=False
"""The hot half of a manager's bookkeeping, compiled: records, timeouts and counters. No logging and no policy.

Two files define these names, ``_registry.pyx`` (compiled) and ``_registry_py.py`` (pure Python); ``registry.py`` picks
one and adds the cold half. A ``RegistryCore`` keeps one ``LoopRecords`` per event loop. A ``LoopRecords`` belongs to
the thread of its loop; only methods that say so may be called from other threads.
"""

cimport cython
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.object cimport PyObject, PyObject_Call
from cpython.ref cimport Py_INCREF
from libc.stdint cimport uint64_t
from libc.string cimport memcpy

import asyncio
from asyncio import AbstractEventLoop, BaseEventLoop, CancelledError, Task, current_task, iscoroutine
from asyncio.events import _get_running_loop
from collections.abc import Awaitable, Callable, Coroutine, Generator, Hashable, Iterator, Mapping
from contextvars import Context
from functools import partial
from typing import Any, TypeVar, Unpack
from weakref import ref

from bgtasks import _task, errors
from bgtasks._arguments import check_context, check_timeout, refuse_contextvars_context, refuse_retry
from bgtasks._coroutines import coroutine_of, next_attempt, refuse_function
from bgtasks._implementation import Wrapper, choose_wrapper
from bgtasks._origin import describe_loop, origin
from bgtasks._statistics import MAX_NAMES, OUTCOMES, Snapshot
from bgtasks._submit import OnDuplicate, RetryPolicy
from bgtasks._task import (
    close_quietly, dismiss, do_nothing, drive, finish_unentered, foreign_record, grant_turn, is_running, record_of,
    retrieve_failure, run, run_queued, run_submitted, task_in_constructor,
)
from bgtasks.info import TaskFactoryOptions, TaskInfo

# Like some of the imports above only for annotations, which typing.get_type_hints() evaluates in this module.
Result = TypeVar("Result")

cdef extern from "Python.h":
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT

    bint PyCoro_CheckExact(object value)
    object PyContext_CopyCurrent()
    void Py_DECREF(PyObject* value)
    # noexcept, because this file handles the error indicator itself.
    PySendResult PyIter_Send(PyObject* coro, PyObject* sent, PyObject** result) noexcept
    PyObject* PyErr_GetHandledException() noexcept
    void PyErr_SetHandledException(PyObject* error) noexcept
    void Py_XDECREF(PyObject* value)


cdef extern from "_clock.h":
    double bgtasks_monotonic() noexcept
    # Whether the counter of the processor is a few microseconds beyond a value at most; if not, sets it to the counter.
    bint bgtasks_is_recent(uint64_t* ticks) noexcept


cdef extern from "_coroutine.h":
    void bgtasks_set_am_send(object type, PySendResult (*send)(PyObject*, PyObject*, PyObject**) except PYGEN_ERROR)
    object bgtasks_take_error()
    void bgtasks_put_error(object error)


cdef extern from *:
    const Py_ssize_t PY_SSIZE_T_MAX


cdef extern from "_weak.h":
    # What a weak reference refers to, None if that is gone.
    object bgtasks_referent(object reference)
    bint bgtasks_refers_to(object reference, object value) noexcept


cdef extern from "_tracked_task.h":
    # Returns a new type derived from asyncio.Task.
    object bgtasks_make_task_type(object base)
    # The task gets its own reference to the record.
    void bgtasks_set_record(object task, object record)


TrackedTask = bgtasks_make_task_type(Task)
for _name in ("__doc__", "_coro", "cancel", "get_coro", "set_name"):
    setattr(TrackedTask, _name, _task.TrackedTask.__dict__[_name])

SharedTask = type("Task", (TrackedTask,), {
    "__slots__": (),
    **{_name: _task.SharedTask.__dict__[_name] for _name in ("__doc__", "__await__", "__iter__")},
})

# Constants and names of the hot path, as C variables: looking them up in the module's dict costs 4 % of a task.
cdef int _MAX_NAMES = MAX_NAMES
cdef object _TrackedTask = TrackedTask
cdef object _SharedTask = SharedTask
cdef object _run = run
cdef object _running_loop = _get_running_loop
cdef object _Context = Context
cdef object _current_task = current_task
cdef double INFINITY = float("inf")

# Whether tasks step a native coroutine around the user's, or their record, which is faster. From Python 3.14 on,
# ``python -m asyncio pstree`` reads the coroutines of a task from the memory of the process and follows only native
# ones. Every reader inside the process asks TrackedTask, which returns the user's coroutine.
cdef bint _native


def use_wrapper(wrapper: Wrapper) -> None:
    """Choose what new tasks step; the import does, and the tests."""
    global _native
    _native = wrapper == "native"


use_wrapper(choose_wrapper())


cdef enum:
    RUNNING = 0
    COMPLETED = 1
    FAILED = 2
    CANCELLED = 3
    TIMED_OUT = 4
    ABANDONED = 5
    OUTCOME_COUNT = 6

    # One bucket below a microsecond, then eight per power of two, up to 2**41 microseconds (25 days).
    BUCKETS = 329

    # The timer wheel: six levels of 64 slots, each level 64 times as coarse as the one below. The first level has slots
    # of a millisecond; all six cover 2**36 ms, two years.
    LEVELS = 6
    SLOTS = 64
    DUE_SLOT = 384
    NOT_ARMED = -1

    IDS_AT_ONCE = 1024

cdef double TICKS_PER_SECOND = 1000.0
cdef double SHORTEST_WAIT = 1e-6
# From this wait on, what bgtasks_is_recent calls recent is at most 3 % of it.
cdef double LONG_WAIT = 256e-6
cdef uint64_t MAX_TICK = (<uint64_t>1 << 62)
# 63 of the 64 slots of the top level: with all 64, the farthest slot would be the one under the hand.
cdef uint64_t WHEEL_SPAN = (<uint64_t>63 << 30)


@cython.final
cdef class NameStats:
    """The counters of all tasks of one name, and the histograms of their durations and of their waits."""

    cdef uint64_t started
    cdef uint64_t counts[OUTCOME_COUNT]
    cdef double duration_sum
    cdef double duration_max
    cdef double wait_sum
    cdef double wait_max
    # The type of the last failure, None before the first.
    cdef object last_error
    cdef uint64_t durations[BUCKETS]
    cdef uint64_t waits[BUCKETS]

    cdef inline void count_end(self, int outcome, double duration) noexcept:
        self.counts[outcome] += 1
        self.durations[_bucket_of(duration)] += 1
        self.duration_sum += duration
        if duration > self.duration_max:
            self.duration_max = duration

    cdef inline void count_wait(self, double wait) noexcept:
        self.waits[_bucket_of(wait)] += 1
        self.wait_sum += wait
        if wait > self.wait_max:
            self.wait_max = wait

    def snapshot(self) -> Snapshot:
        """Return the counters, see ``Snapshot``."""
        cdef int index
        cdef list counts = [self.counts[index] for index in range(OUTCOME_COUNT)]
        cdef dict durations = {index: self.durations[index] for index in range(BUCKETS) if self.durations[index]}
        cdef dict waits = {index: self.waits[index] for index in range(BUCKETS) if self.waits[index]}
        return (
            self.started,
            counts,
            (durations, self.duration_sum, self.duration_max),
            (waits, self.wait_sum, self.wait_max),
            self.last_error,
        )


cdef inline int _bucket_of(double seconds) noexcept:
    cdef double microseconds = seconds * 1e6
    cdef uint64_t bits
    cdef uint64_t index
    if not microseconds >= 1.0:
        return 0
    # In a double, the exponent and the first three bits of the mantissa are adjacent and grow with its value.
    memcpy(&bits, &microseconds, sizeof(bits))
    index = (bits >> 49) - 1023 * 8 + 1
    return <int>index if index < BUCKETS else BUCKETS - 1


@cython.final
@cython.no_gc
# Enough for a busy iteration of the loop; 1,024 records take about 170 kB.
@cython.freelist(1024)
cdef class Record:
    """The bookkeeping of one live task; also the coroutine that the task steps, around the user's.

    The list of its ``LoopRecords`` owns it from creation to the end of the task; the task holds a second reference. It
    is invisible to the cycle collector on purpose: a task that only its manager holds must not be collected.
    ``release`` cuts every reference at the end.
    """

    # Neighbours in the list of live records, borrowed: the list holds one reference to each member.
    cdef PyObject* previous_record
    cdef PyObject* next_record
    # Neighbours in a slot of the timer wheel, borrowed; the first record's previous one is the last. A task that waits
    # for a concurrency slot has no timeout yet; these are then its neighbours in that queue.
    cdef PyObject* previous_timer
    cdef PyObject* next_timer
    cdef LoopRecords records
    cdef NameStats name_stats
    # The user's coroutine, or the ``Call`` of a function.
    cdef readonly object coro
    # None before the task is built and after its end.
    cdef readonly object task
    # The set of its executor; None for a task of no executor, and after its end.
    cdef readonly TaskSet task_set
    # The function of a submitted task, and what is to be done at its end; None for any other task.
    cdef public Submission submission
    # The future of a queued or waiting task, resolved when it may run; of a task that fire() deferred, the Context to
    # run in.
    cdef readonly object turn
    # Where it needs its first concurrency slot; None if no limit applies to it.
    cdef Slots slots
    cdef object given_name
    cdef object given_context
    # A time on the loop's clock, after the end of the task how many seconds it took; and its timeout.
    cdef double created
    cdef double seconds
    cdef uint64_t tick
    cdef readonly long long task_id
    # The id of the task of the same manager and loop that created this one; 0 if none did.
    cdef long long parent_id
    # Small on purpose, as are the flags: a record must fit into three cache lines.
    cdef short wheel_slot
    cdef unsigned char state
    # Built by the task factory: counted and shown, not owned.
    cdef readonly unsigned char observed
    cdef readonly unsigned char queued
    # Between two attempts; until the next one begins.
    cdef readonly unsigned char waiting
    # Cancelled before its first step: suspended in ``_task.pause``, the user's coroutine not entered.
    cdef public unsigned char paused
    # Its timeout has expired.
    cdef readonly unsigned char expired
    # How many concurrency slots it holds.
    cdef unsigned char slots_held
    # A task that runs as long as the program: counted and shown, waited for only after its cancellation.
    cdef readonly unsigned char service
    # How its executor treats it at the end of the block, as bits.
    cdef readonly unsigned char flags
    # Its wait for the first step has been counted.
    cdef unsigned char entered
    # ``records.notes`` has facts about it.
    cdef unsigned char noted

    def __init__(self):
        raise TypeError("a Record is made by its registry")

    @property
    def name(self):
        """The given name; for a task that the task factory built without a name, that of its coroutine."""
        return self.given_name

    @property
    def context(self):
        """The mapping for log records, an empty dict if none was given."""
        return {} if self.given_context is None else self.given_context

    @property
    def timeout(self):
        """The timeout in seconds, or None."""
        return self.seconds if self.seconds > 0 else None

    @property
    def duration(self):
        """Seconds that the task ran, or has run so far."""
        return self.get_duration()

    @property
    def outcome(self):
        """One of ``OUTCOMES``."""
        return OUTCOMES[self.state]

    @property
    def loop(self):
        """The loop of the task, None after its end."""
        return None if self.records is None else self.records.loop

    @property
    def registry(self):
        """The registry that keeps this record, None after the end of the task."""
        return None if self.records is None else self.records.registry

    @property
    def coroutine_name(self):
        """The qualified name of the user's coroutine."""
        return _name_of(self.coro)

    def info(self) -> TaskInfo:
        """Return a ``TaskInfo``; only until the end of the task is reported."""
        return self.make_info()

    cdef dict make_info(self):
        cdef dict info = {
            "task_id": self.task_id,
            "name": self.given_name,
            "coroutine": _name_of(self.coro),
            "state": "queued" if self.queued else "waiting" if self.waiting else OUTCOMES[self.state],
            "age_seconds": self.get_duration(),
            "timeout": self.seconds if self.seconds > 0 else None,
            "context": {} if self.given_context is None else self.given_context,
            "attempt": 1,
            "next_attempt_seconds": None,
            "done": self.state != RUNNING,
            "cancelled": self.state == CANCELLED or self.state == TIMED_OUT,
            "service": bool(self.service),
            "time_left_seconds": self.time_left(),
            "parent_id": self.parent_id if self.parent_id else None,
            "loop": None if self.records is None else self.records.label,
            "thread": None if self.records is None else self.records.thread,
            "origin": self.noted_as("origin"),
            "progress": self.noted_as("progress"),
        }
        if self.submission is not None:
            self.records.registry._describe_submission(self, info)
        return info

    def rename(self, name: str) -> None:
        """Give a task that the task factory built, and that has not ended, another name: loops may name it late."""
        cdef LoopRecords records = self.records
        cdef NameStats old = self.name_stats
        cdef object old_name = self.given_name
        if not self.observed or self.state != RUNNING:
            return
        self.given_name = name
        self.name_stats = records.stats_of(name)
        self.name_stats.started += 1
        old.started -= 1
        if not old.started and records.names.get(old_name) is old:
            del records.names[old_name]
            if records.last_stats is old:
                records.last_name = None

    cdef object time_left(self):
        if self.seconds <= 0:
            return None
        if self.queued or self.waiting:
            return self.seconds
        if self.submission is None or self.records is None or self.submission.failures is None:
            return max(self.seconds - self.get_duration(), 0.0)
        # Each attempt has the whole timeout.
        return max(self.seconds - (self.records.now() - self.submission.failures.next_at), 0.0)

    cdef object noted_as(self, str key):
        if not self.noted or self.records is None:
            return None
        return self.records.notes.get(self, {}).get(key)

    cdef double get_duration(self) except? -1:
        return self.created if self.state != RUNNING else self.records.now() - self.created

    def note(self, key: str, fact: Any) -> None:
        """Keep a fact about the task for ``info`` until its end; do nothing if it has ended."""
        cdef dict notes
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
        if not self.entered:
            self.count_wait(self.records)

    cdef inline int count_wait(self, LoopRecords records) except -1:
        # Reading the clock takes 3 % of a task. As the loop starts tasks in the order of their creation, the end of the
        # neighbour is this one's start; and in a burst of tasks that suspend, another one started a moment ago.
        if records.last_ended == self.task_id - 1 and records.last_end >= self.created:
            self.name_stats.count_wait(records.last_end - self.created)
        elif records.has_own_clock:
            self.name_stats.count_wait(records.now() - self.created)
        else:
            if not bgtasks_is_recent(&records.start_ticks) or records.last_start - self.created < LONG_WAIT:
                records.last_start = bgtasks_monotonic()
            self.name_stats.count_wait(records.last_start - self.created)
        self.entered = True
        return 0

    def complete(self, result: Result) -> Result:
        """Finish the record of a task whose coroutine returned ``result``; return ``result``."""
        self.finish_completed(result)
        return result

    cdef int finish_completed(self, object result) except -1:
        if self.state != RUNNING:
            return 0
        if self.submission is not None:
            self.submission.result = result
        try:
            self.records.finish(self, COMPLETED, None)
            self.report(None)
        finally:
            self.release()
        return 0

    def fail(self, error: BaseException) -> BaseException | None:
        """Finish the record of a task whose coroutine raised ``error``; return what to raise instead, or None."""
        cdef LoopRecords records = self.records
        cdef object task = self.task
        cdef object replacement
        if self.state != RUNNING:
            return None
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
                if not self.observed and task is not None:
                    task.add_done_callback(retrieve_failure)
            elif self.expired and task.cancelling() <= 1:
                records.finish(self, TIMED_OUT, None)
                # The report may have the task raise.
                task.add_done_callback(retrieve_failure)
            else:
                records.finish(self, CANCELLED, None)
            replacement = self.report(error)
        finally:
            self.release()
        return replacement

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
        self.report(None)
        self.release()

    def abandon(self) -> None:
        """Finish the record of a task whose loop was closed, close its coroutine and release the task."""
        cdef object task = self.task
        if self.state != RUNNING:
            return
        self.records.finish(self, ABANDONED, None)
        if task is not None:
            task._log_destroy_pending = False
            if isinstance(task, TrackedTask):
                close_quietly(Task.get_coro(task))
        close_quietly(self.coro)
        self.release()

    def cancel(self, message: Any = None) -> bool:
        """Request cancellation, also of a task that ``fire`` has not started yet; return False if it has ended."""
        cdef object task = self.task
        if self.state != RUNNING:
            return False
        if task is None and isinstance(self.turn, Context):
            self.coro.close()
            self.records.finish(self, CANCELLED, None)
            self.report(None)
            self.release()
            return True
        if task is None:
            task = task_in_constructor(self, self.records.loop)
        return task is not None and bool(task.cancel(message))

    # -- the coroutine that asyncio steps, around the user's; see _step -------------------------------------------

    def send(self, value):
        """Step the user's coroutine."""
        cdef PyObject* result = NULL
        if _step(<PyObject*>self, <PyObject*>value, &result) == PYGEN_NEXT:
            return _taken(result)
        raise StopIteration(_taken(result))

    def throw(self, error, *rest):
        """Raise an exception in the user's coroutine."""
        cdef LoopRecords records = self.records
        cdef PyObject* stepping
        if self.turn is not None:
            self.fail(error)
            raise error
        if records is None:
            return self.coro.throw(error, *rest)
        stepping = records.stepping
        records.stepping = <PyObject*>self
        try:
            yielded = self.coro.throw(error, *rest)
        except StopIteration as end:
            self.finish_completed(end.value)
            raise
        except BaseException as raised:
            if self.submission is not None and self.retry(raised):
                # As a future's __await__ does before it yields the future to the task.
                self.turn._asyncio_future_blocking = True
                return self.turn
            replacement = self.fail(raised)
            if replacement is not None:
                raise replacement from raised
            raise
        finally:
            records.stepping = stepping
        if self.wheel_slot != NOT_ARMED:
            self.see_to_timer()
        return yielded

    cdef int see_to_timer(self) except -1:
        """Have the loop's timer set in time for a task that suspends; a task that ends at once needs none."""
        if not self.records.lacks_timer(self):
            return 0
        try:
            self.records.want_timer(self)
        except BaseException as error:
            try:
                self.coro.close()
            finally:
                self.fail(error)
            raise
        return 0

    def close(self):
        """Close the user's coroutine; a task that had not ended is abandoned."""
        try:
            self.coro.close()
        except BaseException as raised:
            self.fail(raised)
            raise
        if self.state == RUNNING:
            self.records.finish(self, ABANDONED, None)
            self.report(None)
            self.release()

    def __await__(self):
        return self

    def __next__(self):
        return self.send(None)

    # -- attempts of a submitted function -------------------------------------------------------------------------

    def retry(self, error: BaseException) -> bool:
        """Have another attempt follow the one that raised ``error``, if its policy says so; return whether it does."""
        cdef LoopRecords records = self.records
        cdef object task = self.task
        if self.submission is None or self.submission.retry is None or self.state != RUNNING:
            return False
        if task is None:
            # An eager task that has not left its constructor.
            task = self.task = current_task(records.loop)
        if task.cancelling() > self.expired:
            return False
        seconds = records.registry._wait_after(self, error)
        if seconds is None or self.state != RUNNING:
            return False
        if self.expired:
            self.expired = False
            task.uncancel()
        records.suspend(self, seconds)
        return True

    def proceed(self) -> None:
        """Let a task run that was held or waited: at once, or when it has its concurrency slots."""
        cdef LoopRecords records = self.records
        records.disarm(self)
        if records.acquire_slots(self):
            grant_turn(records.loop, self.turn)
        elif not self.queued:
            self.queued = True
            records.queued += 1
            records.waiting -= 1

    def begin_attempt(self) -> Any:
        """Mark a waiting task as running, and return the coroutine of its next attempt."""
        cdef LoopRecords records = self.records
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
        cdef double waited = -self.created
        self.created = self.records.now()
        waited += self.created
        # What can fail comes first: of a task that could not begin the coroutine is closed as one that still waits.
        self.records.arm(self)
        self.records.want_timer(self)
        self.name_stats.count_wait(waited)
        self.entered = True
        self.queued = False
        self.records.queued -= not self.service
        self.turn = None

    def begin_call(self) -> bool:
        """Mark a queued function as running; return False if it was finished before. Safe from any thread."""
        # Neither this method nor ``finish`` releases the GIL between a check and the action that depends on it.
        cdef double now
        if self.state != RUNNING:
            return False
        now = self.records.now()
        if self.waiting:
            self.waiting = False
            self.queued = False
            self.records.queued -= 1
            self.submission.attempt += 1
            self.submission.failures.last = None
            self.submission.failures.next_at = now
            return True
        self.name_stats.count_wait(now - self.created)
        self.entered = True
        self.created = now
        self.queued = False
        self.records.queued -= 1
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
        if self.state != RUNNING or (if_queued and not self.queued and not self.waiting):
            return False
        if attempt and (self.waiting or self.submission.attempt != attempt):
            return False
        self.records.finish(self, OUTCOMES.index(outcome), error)
        return True

    def suspend_call(self, attempt: int) -> bool:
        """Have a function wait that runs its attempt of this number; return False if it does not. From any thread."""
        if self.state != RUNNING or self.waiting or self.queued or self.submission.attempt != attempt:
            return False
        self.waiting = True
        self.records.waiting += 1
        return True

    def queue_call(self) -> bool:
        """Mark a function that waits for its next attempt as queued; return False if it does not. From any thread."""
        if self.state != RUNNING or not self.waiting or self.queued:
            return False
        self.queued = True
        self.records.queued += 1
        self.records.waiting -= 1
        return True

    def report_call(self, error: BaseException | None = None) -> None:
        """Report the end of a function; called once, after ``finish_call`` returned True."""
        try:
            self.report(error)
        finally:
            self.release()
            # The call refers to its record, and the cycle collector does not see records.
            self.coro = None

    cdef object report(self, object error):
        cdef RegistryCore registry = self.records.registry
        if (
            self.state != FAILED
            and self.state != TIMED_OUT
            and registry._muted is not None
            and registry._muted.get(registry._muted_level) is False
        ):
            return None
        try:
            return registry._report(self, error)
        except BaseException:
            self.release()
            raise

    cdef int release(self) except -1:
        if self.noted and self.records is not None:
            self.records.notes.pop(self, None)
        self.task = None
        self.given_context = None
        self.turn = None
        self.submission = None
        self.task_set = None
        self.slots = None
        self.records = None
        self.name_stats = None
        return 0


cdef object _taken(PyObject* result):
    cdef object value = <object>result
    Py_DECREF(result)
    return value


cdef PySendResult _step(PyObject* self, PyObject* sent, PyObject** result) except PYGEN_ERROR:
    """Step the coroutine of a record; finish the record when the coroutine ends."""
    cdef Record record = <Record>self
    cdef LoopRecords records = record.records
    cdef PyObject* stepping
    cdef PySendResult status
    if record.records is None:
        # Taken back because its task could not be built, and stepped by what was built of that all the same.
        Py_INCREF(None)
        result[0] = <PyObject*>None
        return PYGEN_RETURN
    if record.turn is not None:
        if not record.turn.done():
            return _yield_turn(record, result)
        try:
            if record.waiting:
                record.begin_attempt()
            else:
                record.begin()
        except BaseException as error:
            record.fail(error)
            raise
    elif not record.entered:
        record.count_wait(records)
    stepping = records.stepping
    records.stepping = self
    status = PyIter_Send(<PyObject*>record.coro, sent, result)
    records.stepping = stepping
    if status == PYGEN_NEXT:
        if record.wheel_slot != NOT_ARMED:
            _suspend(record, result)
        return PYGEN_NEXT
    if status == PYGEN_ERROR:
        if record.submission is not None and _retry(record):
            return _yield_turn(record, result)
        _fail(record)
        return PYGEN_ERROR
    # Held by a Cython variable, which releases it if the report raises.
    returned = _taken(result[0])
    result[0] = NULL
    record.finish_completed(returned)
    Py_INCREF(returned)
    result[0] = <PyObject*>returned
    return PYGEN_RETURN


cdef int _suspend(Record record, PyObject** result) except -1:
    """See to the timer of a task that suspends; if that fails, nobody waits for what its coroutine yielded."""
    cdef bint is_done = False
    try:
        record.see_to_timer()
        is_done = True
    finally:
        if not is_done:
            _taken(result[0])
            result[0] = NULL
    return 0


cdef inline PySendResult _yield_turn(Record record, PyObject** result) except PYGEN_ERROR:
    """Have the task wait until its turn."""
    # As a future's __await__ does before it yields the future to the task.
    record.turn._asyncio_future_blocking = True
    Py_INCREF(record.turn)
    result[0] = <PyObject*>record.turn
    return PYGEN_NEXT


cdef bint _retry(Record record) except -1:
    """Have another attempt follow; return False if none does: the error is then in the error indicator again."""
    cdef object error = bgtasks_take_error()
    if record.retry(error):
        return True
    bgtasks_put_error(error)
    return False


cdef int _fail(Record record) except -1:
    """Finish the record of a task whose coroutine raised; its error stays in the error indicator."""
    cdef object error = bgtasks_take_error()
    cdef object replacement
    cdef PyObject* handled = PyErr_GetHandledException()
    # Hooks and logging handlers may ask for the exception that is being handled.
    PyErr_SetHandledException(<PyObject*>error)
    try:
        replacement = record.fail(error)
    finally:
        PyErr_SetHandledException(handled)
        Py_XDECREF(handled)
    if replacement is not None:
        replacement.__cause__ = error
        error = replacement
    bgtasks_put_error(error)
    return 0


bgtasks_set_am_send(Record, _step)


cdef inline object _around(Record record):
    """Return the coroutine that the task of a record steps: the record itself or a native one."""
    if not _native:
        return record
    return _wrap(record, _run if record.submission is None else run_submitted)


cdef inline object _wrap(Record record, object function):
    """Return the native coroutine around the user's."""
    if PyCoro_CheckExact(record.coro):
        return function(record.coro, record)
    return function(drive(record.coro), record)


cdef object _name_of(object coro):
    cdef object name = getattr(coro, "__qualname__", None)
    return name if type(name) is str else type(coro).__qualname__


# A list of records, linked by their timer fields, borrowed. The first record's previous one is the last.

cdef int _append(PyObject** first, Record record) except -1:
    cdef PyObject* head = first[0]
    record.next_timer = NULL
    if head is NULL:
        first[0] = record.previous_timer = <PyObject*>record
        return 0
    record.previous_timer = (<Record>head).previous_timer
    (<Record>record.previous_timer).next_timer = <PyObject*>record
    (<Record>head).previous_timer = <PyObject*>record
    return 0


cdef int _prepend(PyObject** first, Record record) except -1:
    cdef PyObject* head = first[0]
    if head is NULL:
        return _append(first, record)
    record.next_timer = head
    record.previous_timer = (<Record>head).previous_timer
    (<Record>head).previous_timer = first[0] = <PyObject*>record
    return 0


cdef int _remove(PyObject** first, Record record) except -1:
    if first[0] is not <PyObject*>record:
        (<Record>record.previous_timer).next_timer = record.next_timer
    else:
        first[0] = record.next_timer
    if record.next_timer is not NULL:
        (<Record>record.next_timer).previous_timer = record.previous_timer
    elif first[0] is not NULL:
        (<Record>first[0]).previous_timer = record.previous_timer
    record.previous_timer = NULL
    return 0


@cython.final
# As records are: cut from its record at the end of the task.
@cython.no_gc
@cython.freelist(1024)
cdef class Submission:
    """A submitted function with its arguments, which one task runs, once or several times.

    Args:
        function: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        retry: decides on further attempts; None for no further one.
        listener: its ``_ended(record, error)`` is called when the task has ended; None for no call.
    """

    cdef readonly object function
    cdef readonly tuple args
    # None instead of an empty dict, to save memory.
    cdef readonly dict kwargs
    cdef public object retry
    cdef public object listener
    # The number of the attempt that runs, or ran last, from 1.
    cdef public Py_ssize_t attempt
    # At most one task of a key runs on each loop, and at most one is held until its end.
    cdef readonly object key
    cdef public Submission following
    # What the policies keep: about failed attempts, and for how long the result.
    cdef public object failures
    cdef public object keep
    # Several coroutines may await its task, and the cancellation of one is not to cancel it.
    cdef public bint shared
    # Until it is released; None before the start.
    cdef readonly Record record
    # What the function returned, set just before the listener is called.
    cdef public object result

    def __init__(self, function, tuple args, dict kwargs, retry, listener):
        self.function = function
        self.args = args
        self.kwargs = kwargs or None
        self.retry = retry
        self.listener = listener
        self.attempt = 1

    def task(self) -> Any:
        """Return its task; an eager one that has not left its constructor is the running one."""
        return current_task(self.record.loop) if self.record.task is None else self.record.task


@cython.final
cdef class Slots:
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

    cdef Py_ssize_t limit
    cdef Py_ssize_t used
    cdef Slots next_stage
    # The first of the waiting records.
    cdef PyObject* first_waiting
    cdef double interval
    cdef double tolerance
    cdef double next_start
    # Calls ``wake`` when the next slot is due, on the loop of a task that waits.
    cdef object timer
    cdef object timer_loop

    def __init__(self, limit, Slots next_stage, double interval=0.0, double tolerance=0.0):
        self.limit = PY_SSIZE_T_MAX if limit is None else limit
        self.next_stage = next_stage
        self.interval = interval
        self.tolerance = tolerance
        self.next_start = -INFINITY

    cdef bint has_slot(self, Record record) except -1:
        """Return whether a slot is free, and due at the time of a record's loop."""
        if self.used >= self.limit:
            return False
        return self.interval == 0 or record.records.now() >= self.next_start - self.tolerance

    cdef int take(self, Record record) except -1:
        """Give a slot to a record."""
        cdef double now
        if self.interval > 0:
            now = record.records.now()
            self.next_start = (now if now > self.next_start else self.next_start) + self.interval
        self.used += 1
        record.slots_held += 1
        return 0

    cdef int see_to_timer(self) except -1:
        """Have ``wake`` called when the next slot is due, if a task waits for that."""
        cdef Record record
        cdef object loop
        cdef double wait
        if self.interval == 0 or self.used >= self.limit:
            return 0
        if self.first_waiting is NULL:
            self.drop_timer()
            return 0
        record = <Record>self.first_waiting
        # Not on that of another task: its loop may end before.
        loop = record.records.held_loop
        if self.timer is not None and self.timer_loop is loop:
            return 0
        self.drop_timer()
        if loop is not _running_loop():
            try:
                loop.call_soon_threadsafe(self.wake)
            except RuntimeError:
                # Its loop is closed: the release of its slots sees to the timer of the next one.
                pass
            return 0
        wait = self.next_start - self.tolerance - record.records.now()
        self.timer = loop.call_later(wait if wait > SHORTEST_WAIT else SHORTEST_WAIT, self.wake)
        self.timer_loop = loop
        return 0

    cdef int drop_timer(self) except -1:
        """Forget the timer; one of another thread's loop fires, and finds nothing to do."""
        if self.timer is not None and self.timer_loop is _running_loop():
            self.timer.cancel()
        self.timer = None
        self.timer_loop = None
        return 0

    def wake(self):
        """Pass on the slots that are due."""
        self.drop_timer()
        self.hand_on()

    cdef bint acquire(self, Record record) except -1:
        """Acquire a slot of this and of every later stage; return False if the task has to wait for one."""
        cdef Slots stage = self
        while stage is not None:
            # First come, first served.
            if stage.first_waiting is not NULL and stage.used < stage.limit:
                # A turn could not be granted when the slot became free.
                stage.hand_on()
            if stage.first_waiting is not NULL or not stage.has_slot(record):
                if record.turn is None:
                    # Before a thread can grant it. Another one may have freed a slot meanwhile: look again.
                    record.records.queue(record)
                    continue
                _append(&stage.first_waiting, record)
                stage.see_to_timer()
                return False
            stage.take(record)
            stage = stage.next_stage
        return True

    cdef int release(self, Record record) except -1:
        """Free the slots that a task holds from this stage on, end its wait, and pass the slots on."""
        cdef Slots stage = self
        cdef int held = record.slots_held
        record.slots_held = 0
        while stage is not None and held > 0:
            held -= 1
            stage.used -= 1
            stage.hand_on()
            stage = stage.next_stage
        if stage is not None and record.previous_timer is not NULL:
            _remove(&stage.first_waiting, record)
            stage.see_to_timer()
        return 0

    cdef int hand_on(self) except -1:
        """Pass free slots on to the tasks that wait for them."""
        cdef Record record
        cdef bint is_asked, is_granted
        while self.first_waiting is not NULL and self.has_slot(<Record>self.first_waiting):
            record = <Record>self.first_waiting
            _remove(&self.first_waiting, record)
            self.take(record)
            if self.next_stage is not None and not self.next_stage.acquire(record):
                continue
            is_asked = False
            try:
                is_granted = grant_turn(record.records.held_loop, record.turn)
                is_asked = True
            finally:
                if not is_asked:
                    # It stays the next one.
                    record.slots.give_up(record)
                    _prepend(&record.slots.first_waiting, record)
            if is_granted:
                continue
            # Its loop is closed, and it will never run: what it just acquired is free again.
            record.slots.give_up(record)
        self.see_to_timer()
        return 0

    cdef int give_up(self, Record record) except -1:
        cdef Slots stage = self
        while record.slots_held:
            record.slots_held -= 1
            stage.used -= 1
            stage = stage.next_stage
        return 0


@cython.final
cdef class TimerWheel:
    """A hierarchical timing wheel with slots of a millisecond: O(1) to arm, to disarm and to advance.

    After G. Varghese and A. Lauck, "Hashed and hierarchical timing wheels" (SOSP 1987), scheme 7. A tick is a number of
    milliseconds since the wheel's start. A record waits in the level of the highest six bits in which its tick differs
    from now, and moves down when the wheel reaches its slot; most are disarmed long before.
    """

    cdef PyObject** slots
    cdef uint64_t occupied[LEVELS]
    cdef uint64_t now
    cdef Py_ssize_t armed

    def __cinit__(self):
        # The last slot holds the due records until ``pop_due`` returns them.
        self.slots = <PyObject**>PyMem_Calloc(LEVELS * SLOTS + 1, sizeof(PyObject*))
        if self.slots is NULL:
            raise MemoryError()

    def __dealloc__(self):
        PyMem_Free(self.slots)

    cdef int arm(self, Record record, uint64_t tick) except -1:
        record.tick = tick if tick > self.now else self.now + 1
        self.insert(record)
        self.armed += 1
        return 0

    cdef int disarm(self, Record record) except -1:
        self.unlink(record)
        self.armed -= 1
        return 0

    cdef int set_hand(self, uint64_t tick) except -1:
        if tick > self.now:
            self.now = tick
        return 0

    cdef int insert(self, Record record) except -1:
        cdef uint64_t tick = record.tick
        cdef uint64_t differing
        cdef int level = 0
        if tick - self.now >= WHEEL_SPAN:
            # Beyond the wheel's span: wait in its farthest slot, to be inserted again from there.
            tick = self.now + WHEEL_SPAN - 1
        differing = (tick ^ self.now) >> 6
        while differing != 0 and level < LEVELS - 1:
            differing >>= 6
            level += 1
        cdef int index = <int>((tick >> (6 * level)) & 63)
        self.occupied[level] |= (<uint64_t>1) << index
        self.link(record, level * SLOTS + index)
        return 0

    cdef int link(self, Record record, int slot) except -1:
        # At the end, so that equal timeouts expire in the order in which they were armed.
        record.wheel_slot = slot
        _append(&self.slots[slot], record)
        return 0

    cdef int unlink(self, Record record) except -1:
        cdef int slot = record.wheel_slot
        _remove(&self.slots[slot], record)
        if self.slots[slot] is NULL and slot != DUE_SLOT:
            self.occupied[slot // SLOTS] &= ~((<uint64_t>1) << (slot % SLOTS))
        record.wheel_slot = NOT_ARMED
        return 0

    cdef uint64_t next_tick(self) except? 0:
        """Return the tick of the earliest slot in use, MAX_TICK if there is none."""
        cdef int level, shift, index
        cdef uint64_t turned, base
        for level in range(LEVELS):
            if self.occupied[level] == 0:
                continue
            shift = 6 * level
            index = <int>((self.now >> shift) & 63)
            # A lower level holds only ticks before the next slot of a higher one, so the first hit is the earliest.
            base = (self.now >> shift) >> 6 << 6
            turned = self.occupied[level] >> index
            if turned != 0:
                while turned & 1 == 0:
                    turned >>= 1
                    index += 1
                return (base + index) << shift
            # Only the top level wraps around: a record beyond the wheel's span may be behind the hand.
            turned = self.occupied[level]
            index = 0
            while turned & 1 == 0:
                turned >>= 1
                index += 1
            return (base + 64 + index) << shift
        return MAX_TICK

    cdef int advance(self, uint64_t tick) except -1:
        """Move the hand to ``tick``, and the records that are due by then to the due slot."""
        cdef uint64_t following
        cdef int level, slot
        cdef Record record
        while True:
            following = self.next_tick()
            if following > tick:
                break
            if following > self.now:
                self.now = following
            level = 0
            while level < LEVELS:
                slot = level * SLOTS + <int>((self.now >> (6 * level)) & 63)
                while self.slots[slot] is not NULL:
                    record = <Record>self.slots[slot]
                    self.unlink(record)
                    if record.tick <= self.now:
                        self.link(record, DUE_SLOT)
                    else:
                        self.insert(record)
                level += 1
        self.set_hand(tick)
        return 0

    cdef bint has_due(self) noexcept:
        return self.slots[DUE_SLOT] is not NULL

    cdef Record pop_due(self):
        """Disarm and return a record that is due, None if there is none."""
        if self.slots[DUE_SLOT] is NULL:
            return None
        cdef Record record = <Record>self.slots[DUE_SLOT]
        self.disarm(record)
        return record


@cython.final
cdef class LoopRecords:
    """The live records of one event loop, in order of creation, with their timers and counters.

    Belongs to the thread of its loop. While it holds a record it owns itself and its loop, so that neither it nor its
    manager can be collected under a running task. Without a record it keeps no loop alive.
    """

    cdef RegistryCore registry
    cdef object loop_ref
    # The loop, None without a record.
    cdef object held_loop
    cdef bint has_own_clock
    # The method of the loop's class.
    cdef object read_factory
    cdef bint has_factory_attribute
    cdef PyObject* first_record
    cdef PyObject* last_record
    # Tasks that have not ended: those that the manager owns, and those that are observed or services.
    cdef readonly Py_ssize_t owned
    cdef readonly Py_ssize_t observed
    # Owned tasks that wait for a concurrency slot, and tasks between two attempts that do not.
    cdef readonly Py_ssize_t queued
    cdef readonly Py_ssize_t waiting
    # ``_on_idle`` is called when a task ends and at most this many owned ones are left; -1 for never.
    cdef public Py_ssize_t idle_threshold
    cdef long long next_id
    cdef long long last_id
    # NameStats by name, and those of all names beyond MAX_NAMES together.
    cdef readonly dict names
    cdef readonly NameStats other_names
    # Facts about some live tasks: a dict for each of their records.
    cdef readonly dict notes
    # What ``info`` says of the loop and of the thread that first used it.
    cdef readonly str label
    cdef readonly object thread
    # The record whose coroutine runs, borrowed.
    cdef PyObject* stepping
    # A foreign factory built tasks here, whose steps are not seen.
    cdef bint has_foreign_tasks
    # Whether it stands for a loop, not for the threads of an executor.
    cdef bint runs_tasks
    cdef object last_name
    cdef NameStats last_stats
    cdef TimerWheel wheel
    cdef double wheel_start
    cdef object timer
    cdef uint64_t timer_tick
    cdef bint timer_wanted
    # 1 or 0: tasks can start eagerly on this loop or not; -1: not tried yet.
    cdef int eager
    # Arguments of the task constructor, reused: a fresh dict per task costs 4 % of its creation. The loop is not among
    # them: it runs, so the constructor finds it.
    cdef dict options
    # The name in ``options``: setting it again for each task of a burst costs 2 % of a task.
    cdef object options_name
    # Records of fire() since the batch was scheduled; None if no batch is open.
    cdef list batch
    cdef double batch_clock
    # When a task last ended: the next one of a batch starts then.
    cdef double last_end
    # The id of the task that last ended in a step of the loop.
    cdef long long last_ended
    # When the clock was last read for the start of a task, and the processor's counter then.
    cdef double last_start
    cdef uint64_t start_ticks
    # The current submission of each key; None before the first key.
    cdef dict keys

    def __init__(self, RegistryCore registry, loop):
        self.registry = registry
        self.loop_ref = ref(loop)
        # asyncio's and uvloop's clock is the monotonic one. A loop with another one, such as a test's, is asked.
        stock = getattr(type(loop), "time", None) is BaseEventLoop.time or type(loop).__module__ == "uvloop"
        self.has_own_clock = not stock
        self.read_factory = type(loop).get_task_factory
        # On asyncio's own loops the attribute is read, which costs a third of the call.
        self.has_factory_attribute = (
            getattr(type(loop), "get_task_factory", None) is BaseEventLoop.get_task_factory
            and hasattr(loop, "_task_factory")
        )
        self.idle_threshold = -1
        self.names = {}
        self.other_names = NameStats()
        self.notes = {}
        self.runs_tasks = isinstance(loop, AbstractEventLoop)
        self.label, self.thread = describe_loop(loop)
        self.eager = -1
        self.options = {"name": None}

    @property
    def loop(self):
        """The loop, None if it is gone."""
        return bgtasks_referent(self.loop_ref)

    cdef inline bint is_of(self, object loop) noexcept:
        return self.held_loop is loop or bgtasks_refers_to(self.loop_ref, loop)

    cdef inline double now(self) except? -1:
        return <double>self.loop.time() if self.has_own_clock else bgtasks_monotonic()

    cdef inline object task_factory(self):
        return self.held_loop._task_factory if self.has_factory_attribute else self.read_factory(self.held_loop)

    cdef bint builds_tasks(self, object factory) except -1:
        """Return whether tasks are built here: the loop has no factory, asyncio's eager one, or the manager's own."""
        return (
            factory is None or factory is self.registry._eager_factory or factory == self.registry.task_factory
        )

    cdef bint can_start_eagerly(self) except -1:
        if self.eager < 0:
            self.eager = self.registry._has_eager_tasks(self.held_loop)
        return self.eager

    cdef Record enroll(self, object coro, object name, double timeout, object context, bint observed):
        """Make the record of a new task and append it to the list."""
        cdef Record record = Record.__new__(Record)
        cdef NameStats stats
        if name is self.last_name:
            stats = self.last_stats
        else:
            stats = self.stats_of(name)
        if self.next_id == self.last_id:
            self.reserve_ids()
        self.next_id += 1
        record.task_id = self.next_id
        record.coro = coro
        record.records = self
        record.name_stats = stats
        record.given_context = context
        record.seconds = timeout
        record.wheel_slot = NOT_ARMED
        record.observed = observed
        record.given_name = name
        if _native or self.has_foreign_tasks:
            record.parent_id = self.current_id()
        elif self.stepping is not NULL:
            record.parent_id = (<Record>self.stepping).task_id
        if self.registry._tracks_origin:
            record.note("origin", origin())

        record.previous_record = self.last_record
        if self.last_record is NULL:
            self.first_record = <PyObject*>record
            # See the class: this object now owns itself and its loop.
            Py_INCREF(self)
            self.held_loop = bgtasks_referent(self.loop_ref)
        else:
            (<Record>self.last_record).next_record = <PyObject*>record
        self.last_record = <PyObject*>record
        Py_INCREF(record)
        if observed:
            self.observed += 1
        else:
            self.owned += 1
        stats.started += 1
        return record

    cdef int make_service(self, Record record) except -1:
        """Have the manager not wait for a task that was just enrolled."""
        record.service = True
        self.owned -= 1
        self.observed += 1
        return 0

    cdef long long current_id(self) except -1:
        """Return the id of the task that runs, 0 if it is none of this manager."""
        cdef object task, record
        if not self.runs_tasks or self.first_record is NULL:
            return 0
        task = _current_task(self.held_loop)
        if task is None:
            return 0
        if isinstance(task, TrackedTask):
            record = record_of(task)
        else:
            record = foreign_record(task) if self.has_foreign_tasks else None
        if isinstance(record, Record) and (<Record>record).records is self:
            return (<Record>record).task_id
        return 0

    cdef NameStats stats_of(self, object name):
        cdef object stats = self.names.get(name)
        if stats is None:
            if len(self.names) >= _MAX_NAMES:
                return self.other_names
            stats = self.names[name] = NameStats()
        self.last_name = name
        self.last_stats = <NameStats>stats
        return <NameStats>stats

    cdef int reserve_ids(self) except -1:
        self.next_id = self.registry._reserve_ids(IDS_AT_ONCE)
        self.last_id = self.next_id + IDS_AT_ONCE
        return 0

    # -- building tasks -------------------------------------------------------------------------------------------

    cdef object launch(self, Record record, bint eager, object context):
        """Build and return the task of a record. If that fails, remove the record and close the coroutine."""
        cdef object task
        cdef object wrapper = record
        # Here and in create_task() and fire() not "except", which saves the handled exception at the entry.
        cdef bint is_built = False
        # Close the batch of fire(): it starts before this task, and what fire() defers from now on starts after it.
        self.batch = None
        try:
            record.created = self.now()
            if context is not None or eager or self.registry._slots is not None or self.task_factory() is not None:
                task = self.launch_specially(record, eager, context)
                is_built = True
                return task
            if record.seconds > 0:
                self.arm(record)
            wrapper = _around(record)
            if record.given_name is not self.options_name:
                self.options_name = None
                self.options["name"] = record.given_name
                self.options_name = record.given_name
            task = PyObject_Call(self.task_type(record), (wrapper,), self.options)
            is_built = True
        finally:
            if not is_built:
                self.discard(record, wrapper)
        bgtasks_set_record(task, record)
        record.task = task
        if wrapper is not record and record.seconds > 0 and self.lacks_timer(record):
            # A record sees to the timer when its coroutine first suspends.
            self.want_timer_of(record, wrapper)
        return task

    cdef object launch_in_set(self, Record record, bint eager, object context):
        self.batch = None
        return self.launch_specially(record, eager, context)

    cdef object launch_held(self, Record record):
        """Build the task of a record that is held until ``proceed``."""
        cdef bint is_queued = False
        self.batch = None
        try:
            self.queue(record)
            is_queued = True
        finally:
            if not is_queued:
                self.discard(record, record)
        return self.launch_specially(record, False, None)

    cdef object launch_specially(self, Record record, bint eager, object context):
        """Launch a task that starts eagerly, runs in a given context, needs a slot or is built by a factory."""
        cdef object factory, task
        cdef object wrapper = record
        cdef bint is_built = False
        try:
            record.created = self.now()
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
            if not self.builds_tasks(factory):
                wrapper = self.native_wrapper(record)
                task = self.build_by_factory(record, wrapper, context)
            else:
                if _native:
                    wrapper = self.native_wrapper(record)
                task = self.build(record, wrapper, eager, context)
                bgtasks_set_record(task, record)
            is_built = True
        finally:
            if not is_built:
                self.discard(record, wrapper)
        if record.state == RUNNING:
            record.task = task
        return task

    cdef bint may_begin(self, Record record) except -1:
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

    cdef int suspend(self, Record record, double seconds) except -1:
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
        return 0

    cdef inline bint acquire_slots(self, Record record) except -1:
        """Acquire the concurrency slots that a task needs; return False if it has to wait for one."""
        if record.service:
            return True
        record.slots = self.registry._slots if record.task_set is None else record.task_set.slots
        if self.registry._limits is not None and record.task_set is None:
            self.find_slots(record)
        return record.slots is None or record.slots.acquire(record)

    cdef int find_slots(self, Record record) except -1:
        """Set the slots of a task whose key or name has a limit of its own."""
        cdef Slots slots = None
        if record.submission is not None and record.submission.key is not None:
            slots = self.registry._limits.get(record.submission.key)
        if slots is None:
            slots = self.registry._limits.get(record.given_name)
        if slots is not None:
            record.slots = slots
        return 0

    cdef int queue(self, Record record) except -1:
        """Mark a record as waiting for its slots, or for what holds it."""
        record.turn = self.held_loop.create_future()
        record.queued = True
        self.queued += not record.service
        return 0

    cdef object native_wrapper(self, Record record):
        if record.submission is not None:
            return _wrap(record, run_submitted)
        return _wrap(record, run_queued if record.queued else _run)

    cdef object build_by_factory(self, Record record, object wrapper, object context):
        """Build a task with the factory of the loop, a foreign one."""
        cdef dict options = {"name": record.given_name}
        if context is not None:
            options["context"] = context
        self.has_foreign_tasks = True
        # Made before there is a task: what fails later would leave one that nobody knows.
        on_end = partial(finish_unentered, record, wrapper)
        own_context = PyContext_CopyCurrent()
        task = self.held_loop.create_task(wrapper, **options)
        task.add_done_callback(on_end, context=own_context)
        return task

    cdef object build(self, Record record, object wrapper, bint eager, object context):
        """Build a task here, eagerly if that is wanted and possible."""
        cdef dict options = {"loop": self.held_loop, "name": record.given_name, "context": context}
        if eager and context is not None:
            # Raises if the context is entered already: the task's constructor would notice only when half done.
            context.run(do_nothing)
        if eager and self.can_start_eagerly():
            options["eager_start"] = True
        return PyObject_Call(self.task_type(record), (wrapper,), options)

    cdef inline object task_type(self, Record record):
        return _TrackedTask if record.submission is None or not record.submission.shared else _SharedTask

    cdef int discard(self, Record record, object wrapper) except -1:
        """Remove a record whose task could not be built."""
        if record.state != RUNNING:
            # The first step of an eager task raised an error that stops the loop: it ran, and its end was counted.
            return 0
        if wrapper is not record:
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
                    record.release()
        return 0

    # -- ending tasks ---------------------------------------------------------------------------------------------

    cdef int finish(self, Record record, int outcome, object error) except -1:
        """Do the bookkeeping of a task that ended; ``release`` cuts its references, after the report."""
        cdef RegistryCore registry = self.registry
        cdef double end = self.now()
        cdef double duration = end - record.created
        self.last_end = end
        self.last_ended = record.task_id
        record.created = duration
        record.state = outcome
        record.name_stats.count_end(outcome, duration)
        # Whatever fails from here on, the record leaves the list.
        try:
            if record.wheel_slot != NOT_ARMED:
                self.disarm(record)
            if outcome == FAILED and error is not None:
                record.name_stats.last_error = errors.type_of(error)
            if registry._keeps_history:
                registry._remember(record, error)
        finally:
            if record.submission is None:
                self.unlink(record)
            else:
                self.unlink_submitted(record, error)
        return 0

    cdef int unlink_submitted(self, Record record, object error) except -1:
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
        return 0

    cdef Submission submission_of(self, object key):
        """Return the submission of a key whose task has not ended, None if there is none."""
        if self.keys is None:
            self.keys = {}
        try:
            return self.keys.get(key)
        except TypeError:
            raise errors.unhashable_key(key) from None

    cdef int free_key(self, Submission submission) except -1:
        """Free the key of a submission whose task has ended or could not start, for the one that waits for that."""
        cdef Submission current = self.keys.get(submission.key)
        cdef Submission following
        if current is not submission:
            # Held until the end of the current one; or another one took its place meanwhile.
            if current is not None and current.following is submission:
                current.following = None
            return 0
        following = submission.following
        submission.following = None
        if following is None:
            del self.keys[submission.key]
            return 0
        self.keys[submission.key] = following
        if following.record is not None and following.record.state == RUNNING:
            following.record.proceed()
        return 0

    cdef int disarm(self, Record record) except -1:
        """End the timeout of a record, if it is armed, and the loop's timer with the last one."""
        cdef object timer
        if record.wheel_slot == NOT_ARMED:
            return 0
        self.wheel.disarm(record)
        if self.wheel.armed == 0 and self.timer is not None:
            timer = self.timer
            self.timer = None
            timer.cancel()
        return 0

    # In one body in spite of its branches: every task passes here, and each further call would show.
    cdef int unlink(self, Record record) except -1:
        """Remove a record from the list and from all counts, then notify those that wait for that."""
        if record.previous_record is NULL:
            self.first_record = record.next_record
        else:
            (<Record>record.previous_record).next_record = record.next_record
        if record.next_record is NULL:
            self.last_record = record.previous_record
        else:
            (<Record>record.next_record).previous_record = record.previous_record
        record.previous_record = NULL
        record.next_record = NULL
        Py_DECREF(<PyObject*>record)
        if record.queued:
            record.queued = False
            self.queued -= not record.service
        if record.observed or record.service:
            self.observed -= 1
        else:
            self.owned -= 1
        if self.first_record is NULL:
            self.held_loop = None
            # The caller holds the reference that keeps this object alive while it works.
            Py_DECREF(<PyObject*>self)
        if record.slots is not None or record.task_set is not None:
            self.leave(record)
        elif not record.observed:
            self.on_left()
        return 0

    cdef int leave(self, Record record) except -1:
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
        return 0

    cdef int on_left(self) except -1:
        """Have those look again who wait for the end of owned tasks."""
        cdef RegistryCore registry = self.registry
        try:
            if self.owned <= self.idle_threshold:
                registry._on_idle()
        finally:
            if registry._capacity_wanted:
                registry._on_capacity()
        return 0

    # -- timeouts -------------------------------------------------------------------------------------------------

    cdef int arm(self, Record record) except -1:
        """Put a record into the wheel, if it has a timeout; ``want_timer`` sees to the loop's timer."""
        return self.arm_after(record, record.created, record.seconds) if record.seconds > 0 else 0

    cdef int arm_after(self, Record record, double since, double seconds) except -1:
        """Put a record into the wheel, for a wait or a timeout that began at the time ``since``."""
        cdef double deadline
        cdef uint64_t tick
        if self.wheel is None:
            self.wheel = TimerWheel()
            self.wheel_start = since
        if self.wheel.armed == 0 and since > self.wheel_start:
            # The hand of an idle wheel lags behind: set it, so that the record needs no extra moves.
            self.wheel.set_hand(<uint64_t>((since - self.wheel_start) * TICKS_PER_SECOND))
        deadline = (since + seconds - self.wheel_start) * TICKS_PER_SECOND
        if deadline >= <double>MAX_TICK:
            return 0
        # The first tick at or after the deadline: never early, less than a tick late.
        tick = <uint64_t>deadline if deadline > 0 else 0
        if <double>tick < deadline:
            tick += 1
        self.wheel.arm(record, tick)
        return 0

    cdef inline bint lacks_timer(self, Record record):
        """Return whether a record is armed, and no timer of the loop comes in time for it."""
        return (
            record.wheel_slot != NOT_ARMED
            and not self.timer_wanted
            and (self.timer is None or record.tick < self.timer_tick)
        )

    cdef int want_timer(self, Record record) except -1:
        """Have the loop's timer set in time for a record: in the next iteration, once for all tasks of this one."""
        if self.lacks_timer(record):
            self.held_loop.call_soon(self.set_timer)
            self.timer_wanted = True
        return 0

    cdef int want_timer_of(self, Record record, object wrapper) except -1:
        """Do as ``want_timer`` after the first step of a new task: one that ends in it never gets a timer."""
        try:
            self.want_timer(record)
        except BaseException:
            # The loop steps the task all the same, which ends at once then.
            self.discard(record, wrapper)
            raise
        return 0

    def set_timer(self):
        """Schedule ``wake`` for the earliest slot in use."""
        cdef uint64_t tick
        cdef double wait
        cdef object before
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
        self.timer = self.held_loop.call_later(wait if wait > SHORTEST_WAIT else SHORTEST_WAIT, self.wake)
        self.timer_tick = tick
        if before is not None:
            before.cancel()

    def wake(self):
        """Report the tasks whose timeout has expired, and set the timer again."""
        cdef Record record
        self.timer = None
        try:
            self.wheel.advance(<uint64_t>((self.now() - self.wheel_start) * TICKS_PER_SECOND))
            while True:
                record = self.wheel.pop_due()
                if record is None:
                    break
                if record.turn is not None:
                    record.proceed()
                    continue
                record.expired = True
                self.registry._on_timeout(record)
        finally:
            self.set_timer()

    # -- fire: starts that wait for the next iteration ------------------------------------------------------------

    cdef bint defers(self) except -1:
        """Return whether ``fire`` may defer a start: tasks can start eagerly, and no foreign factory builds them."""
        # The answer holds for a whole batch, which starts in the next iteration of the loop.
        return self.batch is not None or self.can_defer()

    cdef bint can_defer(self) except -1:
        return self.registry._slots is None and self.can_start_eagerly() and self.builds_tasks(self.task_factory())

    cdef int defer(self, Record record) except -1:
        """Start a task in the next iteration of the loop, in one batch with its neighbours."""
        cdef list batch
        record.turn = PyContext_CopyCurrent()
        if self.batch is None:
            batch = [record]
            self.batch_clock = self.now()
            self.held_loop.call_soon(self.start_batch, batch)
            self.batch = batch
        else:
            self.batch.append(record)
        record.created = self.batch_clock
        return 0

    def start_batch(self, batch):
        """Start the tasks that ``fire`` deferred, each up to its first suspension."""
        cdef Record record
        cdef object task, wrapper
        cdef object name = None
        cdef dict options
        cdef Py_ssize_t index = 0
        if batch is self.batch:
            self.batch = None
        try:
            options = {"loop": self.loop, "name": name, "context": None, "eager_start": True}
            # Not before the call of fire(), so no timeout comes early; and one clock read per task instead of two.
            self.last_end = self.now()
            for record in <list>batch:
                index += 1
                if record.state != RUNNING:
                    continue
                record.entered = True
                record.name_stats.count_wait(self.last_end - record.created)
                record.created = self.last_end
                wrapper = record
                try:
                    wrapper = _around(record)
                    if record.given_name is not name:
                        options["name"] = name = record.given_name
                    options["context"] = record.turn
                    record.turn = None
                    task = PyObject_Call(_TrackedTask, (wrapper,), options)
                except BaseException as error:
                    self.fail_unbuilt(record, wrapper, error)
                    if not isinstance(error, Exception):
                        raise
                    continue
                bgtasks_set_record(task, record)
                if record.state == RUNNING:
                    record.task = task
                    if record.seconds > 0:
                        self.arm(record)
                        self.want_timer(record)
        finally:
            if index < len(batch):
                # The error stops the loop, or was raised by bgtasks: the other tasks start when the loop goes on.
                self.loop.call_soon(self.start_batch, batch[index:])

    cdef int fail_unbuilt(self, Record record, object wrapper, object error) except -1:
        """Finish, as failed, a record that ``fire`` accepted and whose task could not be built."""
        if record.state != RUNNING:
            # Its first step raised what stops the loop: it ran, and its end was counted.
            return 0
        if wrapper is not record:
            dismiss(record, wrapper)
        record.turn = None
        record.coro.close()
        if record.state == RUNNING:
            record.fail(error)
        return 0

    cpdef list snapshot(self):
        """Return the live records; the list is complete before anything else can run."""
        cdef list records = []
        cdef PyObject* record = self.first_record
        while record is not NULL:
            records.append(<Record>record)
            record = (<Record>record).next_record
        return records

    def parts(self, count: int) -> Iterator[list[Record]]:
        """Yield the live records in parts of up to ``count``, each copied at once; some may end in between."""
        part = self.part_after(None, count)
        while part:
            yield part
            part = self.part_after(part, count)

    cdef list part_after(self, list part, Py_ssize_t count):
        """Return the first records, or those that follow a part."""
        cdef PyObject* record = self.first_record
        cdef long long last_id = 0
        cdef Record candidate
        cdef list found = []
        if part is not None:
            last_id = (<Record>part[-1]).task_id
            for candidate in reversed(part):
                # Only a record that is still in the list leads on to the next one.
                if candidate.previous_record is not NULL:
                    record = candidate.next_record
                    break
        while record is not NULL and (<Record>record).task_id <= last_id:
            record = (<Record>record).next_record
        while record is not NULL and len(found) < count:
            found.append(<Record>record)
            record = (<Record>record).next_record
        return found

    def infos(self):
        """Return a ``TaskInfo`` for each live record."""
        cdef Record record
        cdef list live = self.snapshot()
        return [record.make_info() for record in live if record.state == RUNNING and record.records is not None]


cdef double _seconds(object coro, object timeout) except -1:
    """Return a timeout as a float, 0 for none."""
    if timeout is None:
        return 0.0
    if type(timeout) is float and 0.0 < <double>timeout < INFINITY:
        return <double>timeout
    return check_timeout(coro, timeout)


@cython.final
cdef class TaskSet:
    """The tasks or functions of one executor: how many have not ended, and how many may run at once.

    It belongs to the thread of the executor's loop, as do the records of its tasks.

    Args:
        registry: the registry that keeps their records.
        owner: the set calls its ``on_idle()`` when the last one ends, the manager its ``accept_failure``.
        max_running: how many of them may run at once; None for no limit.
        context: the mapping for the log records of its tasks; None for none.
    """

    cdef RegistryCore registry
    cdef readonly object owner
    cdef readonly object context
    cdef Slots slots
    cdef readonly Py_ssize_t live

    def __init__(self, RegistryCore registry, owner, max_running, context):
        self.registry = registry
        self.owner = owner
        self.context = context
        # The executor's own limit comes first.
        self.slots = registry._slots if max_running is None else Slots(max_running, registry._slots)

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
        cdef RegistryCore registry = self.registry
        cdef LoopRecords records = registry.records_here(coro)
        cdef Record record
        cdef double seconds
        try:
            if type(name) is not str:
                name = _name_of(coro) if name is None else str(name)
            if (registry._shut or registry._cap) and registry.must_ask(records):
                registry._admit(coro, name, False)
            seconds = _seconds(coro, timeout)
            record = records.enroll(coro, name, seconds, self.context, False)
            record.task_set = self
            record.flags = flags
            if submission is not None:
                record.submission = submission
                record.submission.record = record
            self.live += 1
            if self.slots is not None:
                return records.launch_in_set(record, eager_start, contextvars_context)
            return records.launch(record, eager_start, contextvars_context)
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
        cdef RegistryCore registry = self.registry
        cdef LoopRecords those = records
        cdef Record record
        cdef double created
        if (registry._shut or registry._cap) and registry.must_ask(those):
            registry._admit(call, name, False)
        created = those.now()
        record = those.enroll(call, name, 0.0 if timeout is None else timeout, self.context, False)
        record.created = created
        record.task = future
        record.task_set = self
        record.flags = flags
        self.live += 1
        if submission is not None:
            record.submission = submission
            record.submission.record = record
        record.queued = True
        those.queued += 1
        # Not by the caller: what stops it after this call would leave a record that nobody knows.
        call.record = record
        return record

    cdef int leave(self) except -1:
        self.live -= 1
        if self.live == 0:
            self.owner.on_idle()
        return 0


cdef class RegistryCore:
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

    cdef LoopRecords _current
    # By the id of the loop, which this keeps no reference to.
    cdef readonly dict _by_loop
    cdef public bint _shut
    cdef Py_ssize_t _cap
    cdef public bint _capacity_wanted
    cdef Slots _slots
    # The slots of a name or a key; None if there are none.
    cdef dict _limits
    cdef bint _keeps_history
    cdef bint _tracks_origin
    cdef public dict _muted
    cdef object _muted_level
    cdef object _eager_factory
    # The option ``retry`` of the last call of ``submit``, and what it means.
    cdef object _last_retry
    cdef object _last_policy

    def __init__(
        self,
        cap: int,
        max_running: int | None,
        keeps_history: bool,
        tracks_origin: bool,
        muted: dict[int, bool] | None,
        muted_level: int,
    ):
        self._by_loop = {}
        self._cap = cap
        self._slots = None if max_running is None else Slots(max_running, None)
        self._keeps_history = keeps_history
        self._tracks_origin = tracks_origin
        self._muted = muted
        self._muted_level = muted_level
        self._eager_factory = getattr(asyncio, "eager_task_factory", None)

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
        cdef LoopRecords records = self.records_here(coro)
        cdef Record record
        cdef double seconds
        cdef bint is_service = service
        cdef object task
        cdef bint is_started = False
        try:
            if type(name) is not str:
                name = _name_of(coro) if name is None else str(name)
            if (self._shut or (self._cap and not is_service)) and self.must_ask(records):
                self._admit(coro, name, False)
            seconds = _seconds(coro, timeout)
            if context is not None and type(context) is not dict:
                check_context(coro, context)
            if contextvars_context is not None and not isinstance(contextvars_context, _Context):
                refuse_contextvars_context(coro, contextvars_context)
            if retry is not None:
                refuse_retry(coro)
            record = records.enroll(coro, name, seconds, context, False)
            if is_service:
                records.make_service(record)
            task = records.launch(record, eager_start, contextvars_context)
            is_started = True
        finally:
            if not is_started:
                errors.close_refused(coro)
        return task

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
        cdef LoopRecords records
        cdef Submission submission, current
        cdef object coro, task
        cdef object policy = None
        cdef object keep = None
        cdef bint is_done = False
        if retry is not None:
            if retry is not self._last_retry:
                self._last_policy = self._policy_of(retry)
                self._last_retry = retry
            policy = self._last_policy
        if keep_result is not None or on_duplicate != "join":
            keep = self._check_submission(key, on_duplicate, keep_result)
        if not callable(function):
            refuse_function(function, "submit")
        records = self.records_of_running()
        if key is not None:
            current = records.submission_of(key)
            if current is not None and (on_duplicate == "join" or on_duplicate == "skip"):
                return current.task() if on_duplicate == "join" else None
        coro = function(*args, **kwargs)
        if not PyCoro_CheckExact(coro):
            coro = coroutine_of(function, coro, "submit")
        if policy is None and key is None and keep is None:
            return self.launch_submission(records, coro, name, timeout, context, None, False, False)
        submission = Submission.__new__(Submission)
        submission.function = function
        submission.args = args
        if kwargs:
            submission.kwargs = kwargs
        submission.retry = policy
        submission.attempt = 1
        if keep is not None:
            self._keep_result(submission, keep)
        if key is None:
            task = self.launch_submission(records, coro, name, timeout, context, submission, False, False)
        else:
            submission.shared = True
            submission.key = key
            current = records.keys.setdefault(key, submission)
            if current is not submission:
                return self._submit_duplicate(current, coro, submission, on_duplicate, (name, timeout, context))
            try:
                task = self.launch_submission(records, coro, name, timeout, context, submission, False, False)
                is_done = True
            finally:
                if not is_done:
                    records.free_key(submission)
        if keep is not None:
            self._follow_result(submission)
        return task

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
        return self.launch_submission(
            self.records_here(coro), coro, name, timeout, context, submission, is_held, is_service
        )

    def _fire(
        self,
        coro: Coroutine[Any, Any, Any],
        name: str | None,
        timeout: float | None,
        context: Mapping[str, Any] | None,
        submission: Any,
    ) -> None:
        """Start a submission as ``fire`` does; at its cap the manager raises."""
        self.fire_submission(self.records_here(coro), coro, name, timeout, context, submission, False)

    def _fire_during(self, function: Callable[[Any], object], argument: Any) -> None:
        """Call a function of a callback of the loop, and start what it fires right after it, as one batch."""
        cdef LoopRecords records = self.records_of_running()
        cdef list batch = []
        cdef bint is_open = False
        if records.held_loop is None:
            # Until it has a record again, as it needs the loop now.
            records.held_loop = records.loop
        try:
            is_open = records.can_defer()
        finally:
            if records.first_record is NULL:
                records.held_loop = None
        if not is_open:
            function(argument)
            return
        records.batch_clock = records.now()
        records.batch = batch
        try:
            function(argument)
        finally:
            if records.batch is batch:
                records.batch = None
            if batch:
                records.start_batch(batch)

    cdef bint fire_submission(
        self,
        LoopRecords records,
        object coro,
        object name,
        object timeout,
        object context,
        Submission submission,
        bint may_drop,
    ) except -1:
        cdef Record record = None
        cdef double seconds
        cdef bint is_done = False
        try:
            if type(name) is not str:
                name = _name_of(coro) if name is None else str(name)
            if (self._shut or self._cap) and self.must_ask(records) and not self._admit(coro, name, may_drop):
                is_done = True
                return False
            seconds = _seconds(coro, timeout)
            if context is not None and type(context) is not dict:
                check_context(coro, context)
            record = records.enroll(coro, name, seconds, context, False)
            if submission is not None:
                record.submission = submission
                submission.record = record
            if records.defers():
                records.defer(record)
            else:
                records.launch(record, False, None)
            is_done = True
        finally:
            if not is_done:
                if record is not None:
                    records.discard(record, record)
                errors.close_refused(coro)
        return True

    cdef object launch_submission(
        self,
        LoopRecords records,
        object coro,
        object name,
        object timeout,
        object context,
        Submission submission,
        bint is_held,
        bint is_service,
    ):
        cdef Record record
        cdef double seconds
        cdef object task
        cdef bint is_started = False
        try:
            if type(name) is not str:
                name = _name_of(coro) if name is None else str(name)
            if (self._shut or (self._cap and not is_service)) and self.must_ask(records):
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
            task = records.launch_held(record) if is_held else records.launch(record, False, None)
            is_started = True
        finally:
            if not is_started:
                errors.close_refused(coro)
        return task

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
        return self.fire_submission(self.records_here(coro), coro, name, timeout, context, None, True)

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
        cdef object coro
        cdef Submission submission = None
        if retry is not None and retry is not self._last_retry:
            self._last_policy = self._policy_of(retry)
            self._last_retry = retry
        if not callable(function):
            refuse_function(function, "fire_function")
        self.records_of_running()
        coro = function(*args, **kwargs)
        if not PyCoro_CheckExact(coro):
            coro = coroutine_of(function, coro, "fire_function")
        if retry is not None and self._last_policy is not None:
            submission = Submission(function, args, kwargs, self._last_policy, None)
        return self.fire_submission(self.records_here(coro), coro, name, timeout, context, submission, True)

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
        cdef LoopRecords records
        cdef Record record
        cdef object task
        if not iscoroutine(coro):
            return Task(coro, loop=loop, **kwargs)
        try:
            records = self.records_of(loop)
            name = kwargs.get("name")
            record = records.enroll(coro, _name_of(coro) if name is None else str(name), 0.0, None, True)
        except BaseException:
            errors.close_refused(coro)
            raise
        wrapper = record
        try:
            record.created = records.now()
            wrapper = _around(record)
            task = TrackedTask(wrapper, loop=loop, **kwargs)
        except BaseException:
            records.discard(record, wrapper)
            raise
        bgtasks_set_record(task, record)
        if record.state == RUNNING:
            record.task = task
        return task

    cdef inline bint must_ask(self, LoopRecords records):
        # The count of one loop is known here; _admit adds up those of several.
        return self._shut or records.owned >= self._cap or len(self._by_loop) > 1

    cdef inline LoopRecords records_of_running(self):
        """Return the records of the running loop."""
        cdef object loop = _running_loop()
        cdef LoopRecords records = self._current
        if loop is None:
            raise errors.no_running_loop()
        return records if records is not None and records.is_of(loop) else self.records_of(loop)

    cdef inline LoopRecords records_here(self, object coro):
        cdef object loop
        cdef LoopRecords records = self._current
        if not PyCoro_CheckExact(coro) and not iscoroutine(coro):
            raise errors.not_a_coroutine(coro)
        loop = _running_loop()
        if loop is None:
            errors.close_refused(coro)
            raise errors.no_running_loop()
        if records is not None and records.is_of(loop):
            return records
        try:
            return self.records_of(loop)
        except BaseException:
            errors.close_refused(coro)
            raise

    cdef LoopRecords records_of(self, object loop):
        """Return the records of a loop, made at its first use."""
        cdef LoopRecords records = self._by_loop.get(id(loop))
        if records is None or not records.is_of(loop):
            records = self._add_loop(loop, LoopRecords)
        self._current = records
        return records

    def _forget_loop(self, loop_id: int) -> None:
        """Remove a loop that was closed; by the ``id`` that it has or had."""
        if self._current is self._by_loop.pop(loop_id):
            self._current = None
