# cython: language_level=3, binding=True
"""Bookkeeping of background tasks: records, timeouts, counters. No logging and no policy.

Two files hold these names, ``_registry.pyx`` (compiled) and ``_registry_py.py`` (its twin); ``registry.py`` picks one.
A ``Registry`` is what a manager is built on. It keeps one ``LoopRecords`` for each event loop it serves; that one
belongs to the thread of its loop, and only ``Registry`` methods that say so may be called from other threads.
"""

cimport cython
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.object cimport PyObject, PyObject_Call
from cpython.ref cimport Py_INCREF
from libc.stdint cimport uint64_t
from libc.string cimport memcpy

import asyncio
import sys
import threading
from asyncio import BaseEventLoop, CancelledError, Task, current_task, iscoroutine
from asyncio.events import _get_running_loop
from collections import OrderedDict, deque
from collections.abc import Mapping
from contextvars import Context
from functools import partial
from time import time as wall_clock

from bgtasks import _task, errors
from bgtasks._task import drive, record_of, run, run_queued, starts_eagerly

cdef extern from "Python.h":
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT

    bint PyCoro_CheckExact(object value)
    object PyContext_CopyCurrent()
    void Py_DECREF(PyObject* value)
    # Neither raises for Cython's eyes: the error indicator is dealt with by hand.
    PySendResult PyIter_Send(PyObject* coro, PyObject* sent, PyObject** result) noexcept
    PyObject* PyErr_GetHandledException() noexcept
    void PyErr_SetHandledException(PyObject* error) noexcept
    void Py_XDECREF(PyObject* value)


cdef extern from "_clock.h":
    double bgtasks_monotonic() noexcept


cdef extern from "_coroutine.h":
    void bgtasks_set_am_send(object type, PySendResult (*send)(PyObject*, PyObject*, PyObject**) except PYGEN_ERROR)
    object bgtasks_take_error()
    void bgtasks_put_error(object error)


cdef extern from "_tracked_task.h":
    # Returns a new type derived from asyncio.Task.
    object bgtasks_make_task_type(object base)
    # The task takes a reference of its own to the record.
    void bgtasks_set_record(object task, object record)


TrackedTask = bgtasks_make_task_type(Task)
for _name in ("__doc__", "_coro", "cancel", "get_coro"):
    setattr(TrackedTask, _name, _task.TrackedTask.__dict__[_name])

DEFAULT_NAME = "background_task"
MAX_NAMES = 1000
OTHER_NAMES = "(other)"
CANCEL_ON_EXIT = 1
RERAISE_ON_EXIT = 2
OUTCOMES = ("running", "completed", "failed", "cancelled", "timed_out", "abandoned")

# Constants and names of the hot path as C variables: looked up in the module's dict they would cost 4 % of a task.
cdef str _DEFAULT_NAME = DEFAULT_NAME
cdef int _MAX_NAMES = MAX_NAMES
cdef object _TrackedTask = TrackedTask
cdef object _run = run
cdef object _running_loop = _get_running_loop
cdef object _Context = Context

# Whether tasks step a native coroutine around the user's, or their record, which is faster. From Python 3.14 on
# ``python -m asyncio pstree`` reads the coroutines of a task out of the memory of the process and follows native ones
# only; before, whoever asks a task for its coroutine gets the user's from TrackedTask.
cdef bint _native = sys.version_info >= (3, 14)


def use_native_coroutines(bint wanted):
    """Choose what tasks step from now on, for the tests: native coroutines or records."""
    global _native
    _native = wanted


cdef enum:
    RUNNING = 0
    COMPLETED = 1
    FAILED = 2
    CANCELLED = 3
    TIMED_OUT = 4
    ABANDONED = 5
    OUTCOME_COUNT = 6

    # One bucket below a microsecond, then eight to a power of two, up to 2**41 microseconds (25 days).
    BUCKETS = 329

    # The timer wheel: six levels of 64 slots of a millisecond, 64 milliseconds, ... : 2**36 ms, two years.
    LEVELS = 6
    SLOTS = 64
    DUE_SLOT = 384
    NOT_ARMED = -1

    IDS_AT_ONCE = 1024

cdef double TICKS_A_SECOND = 1000.0
cdef double SHORTEST_WAIT = 1e-6
cdef uint64_t MAX_TICK = (<uint64_t>1 << 62)
# 63 of the 64 slots of the top level: with all 64, the farthest slot would be the one the hand stands on.
cdef uint64_t WHEEL_SPAN = (<uint64_t>63 << 30)


@cython.final
cdef class NameStats:
    """Counters and the histogram of durations of all tasks of one name."""

    cdef uint64_t started
    cdef uint64_t counts[OUTCOME_COUNT]
    cdef uint64_t buckets[BUCKETS]

    cdef int count_end(self, int outcome, double duration) except -1:
        self.counts[outcome] += 1
        self.buckets[_bucket_of(duration)] += 1
        return 0

    cdef int add(self, NameStats other) except -1:
        cdef int index
        self.started += other.started
        for index in range(OUTCOME_COUNT):
            self.counts[index] += other.counts[index]
        for index in range(BUCKETS):
            self.buckets[index] += other.buckets[index]
        return 0

    cdef uint64_t ended(self) noexcept:
        cdef uint64_t total = 0
        cdef int index
        for index in range(1, OUTCOME_COUNT):
            total += self.counts[index]
        return total

    cdef object percentile(self, double share):
        # Nearest rank over the buckets; the middle of a bucket is at most 6.25 % off.
        cdef uint64_t total = 0, seen = 0
        cdef int index
        for index in range(BUCKETS):
            total += self.buckets[index]
        if total == 0:
            return None
        for index in range(BUCKETS):
            seen += self.buckets[index]
            if seen >= share * total:
                return _middle_of(index)

    def as_dict(self):
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


cdef inline int _bucket_of(double seconds) noexcept:
    cdef double microseconds = seconds * 1e6
    cdef uint64_t bits
    cdef uint64_t index
    if not microseconds >= 1.0:
        return 0
    # The exponent and the first three bits of the mantissa of a double stand next to each other and count up with it.
    memcpy(&bits, &microseconds, sizeof(bits))
    index = (bits >> 49) - 1023 * 8 + 1
    return <int>index if index < BUCKETS else BUCKETS - 1


cdef double _middle_of(int index) noexcept:
    cdef int exponent
    if index == 0:
        return 0.5e-6
    exponent = (index - 1) // 8 + 1
    return (8.5 + (index - 1) % 8) / 16.0 * 2.0 ** exponent * 1e-6


@cython.final
@cython.no_gc
# As many as a busy iteration of the loop has in flight; 1,024 records are some 170 kB.
@cython.freelist(1024)
cdef class Record:
    """What the registry keeps on one task while it lives, and what the task steps as the coroutine around the user's.

    The list of its ``LoopRecords`` owns it from creation to the end of the task; the task shares it. It is invisible to
    the cycle collector on purpose: a task must not vanish because nobody but its manager holds it, and ``release`` cuts
    every reference at the end.
    """

    # Neighbours in the list of live records, borrowed: the list holds one reference to each member.
    cdef PyObject* previous_record
    cdef PyObject* next_record
    # Neighbours in a slot of the timer wheel, borrowed; before the first one stands the last.
    cdef PyObject* previous_timer
    cdef PyObject* next_timer
    cdef LoopRecords records
    cdef NameStats name_stats
    cdef object _coro
    cdef object _task
    cdef object _name
    cdef object _context
    # The contextvars.Context of a task that fire() has not started yet, then the future of a queued one.
    cdef object _place
    # The tasks of the executor that started this one, None for any other task.
    cdef Group _group
    cdef double _created
    cdef double _timeout
    cdef double _duration
    cdef uint64_t tick
    cdef long long _task_id
    # Small on purpose, as the flags are: a record is to fit into three cache lines.
    cdef short slot
    cdef unsigned char _outcome
    cdef unsigned char observed
    cdef unsigned char expired
    cdef unsigned char queued
    cdef unsigned char _paused
    cdef unsigned char holds_place
    cdef unsigned char holds_group_place
    cdef unsigned char _marks

    def __init__(self):
        raise TypeError("a Record is made by its registry")

    @property
    def coro(self):
        """The user's coroutine."""
        return self._coro

    @property
    def place(self):
        """The future that a queued task waits on, resolved when it may run."""
        return self._place

    @property
    def paused(self):
        """True for a task cancelled before its first step: it stands in ``_task.pause``, its coroutine unentered."""
        return self._paused

    @paused.setter
    def paused(self, bint value):
        self._paused = value

    @property
    def task(self):
        """The task, or None before it is built and after its end."""
        return self._task

    @property
    def task_id(self):
        """The number that tells this task from all others of its manager."""
        return self._task_id

    @property
    def name(self):
        """The name given, or the task's own for one that came through a task factory."""
        if self._name is None:
            return "" if self._task is None else self._task.get_name()
        return self._name

    @property
    def context(self):
        """The mapping for log records, an empty dict if none was given."""
        return {} if self._context is None else self._context

    @property
    def timeout(self):
        """The timeout in seconds, or None."""
        return self._timeout if self._timeout > 0 else None

    @property
    def duration(self):
        """How long the task ran, in seconds, or has run if it still does."""
        return self._duration if self._outcome != RUNNING else self.records.now() - self._created

    @property
    def outcome(self):
        """One of ``OUTCOMES``."""
        return OUTCOMES[self._outcome]

    @property
    def is_observed(self):
        """True for a task that came through a task factory: counted and shown, not owned."""
        return self.observed

    @property
    def group(self):
        """The tasks of the executor that started this one, None for any other task and after its end."""
        return self._group

    @property
    def marks(self):
        """What its executor is to do with it at its exit: a sum of CANCEL_ON_EXIT and RERAISE_ON_EXIT."""
        return self._marks

    @property
    def coroutine_name(self):
        """The qualified name of the user's coroutine."""
        return _name_of(self._coro)

    def info(self):
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
            "cancelled": self._outcome == CANCELLED or self._outcome == TIMED_OUT,
        }

    @cython.binding(False)
    def complete(self, result):
        """Settle the record of a task whose coroutine returned ``result``, and return that."""
        self.settle_completed()
        return result

    cdef int settle_completed(self) except -1:
        cdef LoopRecords records = self.records
        cdef Registry registry
        if self._outcome != RUNNING:
            return 0
        records.finish(self, COMPLETED, None)
        registry = records.registry
        if registry._muted is None or registry._muted.get(registry._muted_level) is not False:
            self.report(None)
        self.release()
        return 0

    def fail(self, error):
        """Settle the record of a task whose coroutine raised ``error``."""
        cdef LoopRecords records = self.records
        cdef object task = self._task
        if self._outcome != RUNNING:
            return
        if task is None:
            # An eager task that has not left its constructor.
            task = self._task = current_task(records.loop)
        if self.queued or self._paused:
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

    def settle(self, task):
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

    def cancel(self, message=None):
        """Ask the task to cancel, also one that ``fire`` has not started yet; return False if it has ended."""
        if self._outcome != RUNNING:
            return False
        if self._task is not None:
            return self._task.cancel(message)
        if isinstance(self._place, Context):
            self._coro.close()
            self.records.finish(self, CANCELLED, None)
            self.report(None)
            self.release()
            return True
        # An eager task that has not left its constructor.
        return current_task(self.records.loop).cancel(message)

    # -- a coroutine around the user's: what asyncio steps, see _step ---------------------------------------------

    def send(self, value):
        """Step the user's coroutine."""
        cdef PyObject* result = NULL
        if _step(<PyObject*>self, <PyObject*>value, &result) == PYGEN_NEXT:
            return _taken(result)
        raise StopIteration(_taken(result))

    def throw(self, error, *rest):
        """Raise an exception in the user's coroutine."""
        if self.queued:
            self.fail(error)
            raise error
        try:
            return self._coro.throw(error, *rest)
        except StopIteration:
            self.settle_completed()
            raise
        except BaseException as raised:
            self.fail(raised)
            raise

    def close(self):
        """Close the user's coroutine; a task that had not ended is abandoned."""
        try:
            self._coro.close()
        except BaseException as raised:
            self.fail(raised)
            raise
        if self._outcome == RUNNING:
            self.records.finish(self, ABANDONED, None)
            self.report(None)
            self.release()

    def __await__(self):
        return self

    def __next__(self):
        return self.send(None)

    def begin(self):
        """Mark a queued task as running: its timeout and its duration count from here."""
        self.queued = False
        self.records.queued -= 1
        self._place = None
        self._created = self.records.now()
        self.records.arm(self)

    def begin_call(self):
        """Mark a queued function as running; return False if it was settled before. Safe from any thread."""
        # Nothing in here and in ``finish`` lets go of the GIL between a question and what follows from the answer.
        if self._outcome != RUNNING:
            return False
        self.queued = False
        self.records.queued -= 1
        self._created = self.records.now()
        return True

    def finish_call(self, outcome, error=None, bint if_queued=False):
        """Settle the record of a function, or only a queued one; return whether that was done. Safe from any thread."""
        if self._outcome != RUNNING or (if_queued and not self.queued):
            return False
        self.records.finish(self, OUTCOMES.index(outcome), error)
        return True

    def report_call(self, error=None):
        """Report the end of a function that ``finish_call`` settled; called once, by whoever settled it."""
        cdef Registry registry = self.records.registry
        try:
            if self._outcome != COMPLETED or registry._muted is None or (
                registry._muted.get(registry._muted_level) is not False
            ):
                self.report(error)
        finally:
            self.release()
            # The call refers to its record, and the cycle collector does not see records.
            self._coro = None

    cdef int report(self, object error) except -1:
        try:
            self.records.registry._report(self, error)
        except BaseException:
            self.release()
            raise
        return 0

    cdef int release(self) except -1:
        self._task = None
        self._context = None
        self._place = None
        self._group = None
        self.records = None
        self.name_stats = None
        return 0


cdef object _taken(PyObject* result):
    cdef object value = <object>result
    Py_DECREF(result)
    return value


cdef PySendResult _step(PyObject* self, PyObject* sent, PyObject** result) except PYGEN_ERROR:
    """Step the coroutine of a record, and settle the record where that ends."""
    cdef Record record = <Record>self
    cdef PySendResult status
    if record.queued:
        if not record._place.done():
            # What a future's __await__ does before it yields itself to the task.
            record._place._asyncio_future_blocking = True
            Py_INCREF(record._place)
            result[0] = <PyObject*>record._place
            return PYGEN_NEXT
        record.begin()
    status = PyIter_Send(<PyObject*>record._coro, sent, result)
    if status == PYGEN_NEXT:
        return PYGEN_NEXT
    if status == PYGEN_ERROR:
        _fail(record)
        return PYGEN_ERROR
    # Held by a variable of Cython's, so that it is let go of if the report raises.
    returned = _taken(result[0])
    result[0] = NULL
    record.settle_completed()
    Py_INCREF(returned)
    result[0] = <PyObject*>returned
    return PYGEN_RETURN


cdef int _fail(Record record) except -1:
    """Settle the record of a task whose coroutine raised what stands in the error indicator, and leave that there."""
    cdef object error = bgtasks_take_error()
    cdef PyObject* handled = PyErr_GetHandledException()
    # Hooks and logging handlers may ask for the exception that is being handled.
    PyErr_SetHandledException(<PyObject*>error)
    try:
        record.fail(error)
    finally:
        PyErr_SetHandledException(handled)
        Py_XDECREF(handled)
    bgtasks_put_error(error)
    return 0


bgtasks_set_am_send(Record, _step)


cdef inline object _around(Record record):
    """Return what the task of a record is to step: the record itself, or a native coroutine."""
    return _wrap(record, _run) if _native else record


cdef inline object _wrap(Record record, object function):
    """Return the native coroutine around the user's."""
    if PyCoro_CheckExact(record._coro):
        return function(record._coro, record)
    return function(drive(record._coro), record)


cdef bint _is_running(object task) except -1:
    """Tell whether the current step is one of this task."""
    cdef object loop = _running_loop()
    return loop is not None and current_task(loop) is task


def _nothing():
    """Do nothing."""


cdef object _name_of(object coro):
    cdef object name = getattr(coro, "__qualname__", None)
    return type(coro).__qualname__ if name is None else name


def _retrieve(task):
    """Mark a failure as seen: it was reported, the loop's "never retrieved" must not follow."""
    if not task.cancelled():
        task.exception()


def _settle_around(record, wrapper, task):
    """Settle the record of a task that a foreign factory built, which may never have entered the coroutine it got."""
    wrapper.close()
    record.settle(task)


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
    cdef readonly Py_ssize_t armed

    def __cinit__(self):
        # The last slot holds what is due while it is handed out.
        self.slots = <PyObject**>PyMem_Calloc(LEVELS * SLOTS + 1, sizeof(PyObject*))
        if self.slots is NULL:
            raise MemoryError()

    def __dealloc__(self):
        PyMem_Free(self.slots)

    cdef int arm(self, Record record, uint64_t tick) except -1:
        record.tick = tick if tick > self.now else self.now + 1
        self.put(record)
        self.armed += 1
        return 0

    cdef int disarm(self, Record record) except -1:
        self.take(record)
        self.armed -= 1
        return 0

    cdef int set_hand(self, uint64_t tick) except -1:
        if tick > self.now:
            self.now = tick
        return 0

    cdef int put(self, Record record) except -1:
        cdef uint64_t tick = record.tick
        cdef uint64_t differing
        cdef int level = 0
        if tick - self.now >= WHEEL_SPAN:
            # Past the wheel: wait in its farthest slot and be looked at again there.
            tick = self.now + WHEEL_SPAN - 1
        differing = (tick ^ self.now) >> 6
        while differing != 0 and level < LEVELS - 1:
            differing >>= 6
            level += 1
        cdef int place = <int>((tick >> (6 * level)) & 63)
        self.occupied[level] |= (<uint64_t>1) << place
        self.link(record, level * SLOTS + place)
        return 0

    cdef int link(self, Record record, int slot) except -1:
        cdef PyObject* head = self.slots[slot]
        record.slot = slot
        record.next_timer = NULL
        if head is NULL:
            record.previous_timer = <PyObject*>record
            self.slots[slot] = <PyObject*>record
            return 0
        # At the end, so that equal timeouts are over in the order in which they were armed.
        record.previous_timer = (<Record>head).previous_timer
        (<Record>record.previous_timer).next_timer = <PyObject*>record
        (<Record>head).previous_timer = <PyObject*>record
        return 0

    cdef int take(self, Record record) except -1:
        cdef int slot = record.slot
        cdef PyObject* head = self.slots[slot]
        if head is not <PyObject*>record:
            (<Record>record.previous_timer).next_timer = record.next_timer
        else:
            self.slots[slot] = head = record.next_timer
            if head is NULL and slot != DUE_SLOT:
                self.occupied[slot // SLOTS] &= ~((<uint64_t>1) << (slot % SLOTS))
        if record.next_timer is not NULL:
            (<Record>record.next_timer).previous_timer = record.previous_timer
        elif head is not NULL:
            (<Record>head).previous_timer = record.previous_timer
        record.slot = NOT_ARMED
        return 0

    cdef uint64_t next_tick(self) except? 0:
        """The tick of the earliest slot in use, MAX_TICK if there is none."""
        cdef int level, shift, place
        cdef uint64_t turned, base
        for level in range(LEVELS):
            if self.occupied[level] == 0:
                continue
            shift = 6 * level
            place = <int>((self.now >> shift) & 63)
            # Lower levels hold only what comes before the next slot of a higher one, so the first hit is the earliest.
            base = (self.now >> shift) >> 6 << 6
            turned = self.occupied[level] >> place
            if turned != 0:
                while turned & 1 == 0:
                    turned >>= 1
                    place += 1
                return (base + place) << shift
            # Only the top level goes round: what waits past the wheel's span may stand behind the hand.
            turned = self.occupied[level]
            place = 0
            while turned & 1 == 0:
                turned >>= 1
                place += 1
            return (base + 64 + place) << shift
        return MAX_TICK

    cdef int advance(self, uint64_t tick) except -1:
        """Move time to ``tick`` and what is due by then to the due slot."""
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
                    self.take(record)
                    if record.tick <= self.now:
                        self.link(record, DUE_SLOT)
                    else:
                        self.put(record)
                level += 1
        self.set_hand(tick)
        return 0

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

    Belongs to the thread of its loop. While it holds a record it owns itself, so that neither it nor its manager can be
    collected under a running task.
    """

    cdef Registry registry
    cdef object loop
    cdef object clock
    cdef object read_factory
    cdef bint has_factory_attribute
    cdef PyObject* first_record
    cdef PyObject* last_record
    cdef Py_ssize_t live
    cdef Py_ssize_t observed
    # Those among the live that wait for a place.
    cdef Py_ssize_t queued
    # The owned tasks left when somebody who waits for "all done" wants to hear of it; -1 if nobody does.
    cdef Py_ssize_t wake_at
    cdef long long next_id
    cdef long long last_id
    cdef dict names
    cdef object last_name
    cdef NameStats last_stats
    cdef NameStats other_names
    cdef TimerWheel wheel
    cdef double wheel_start
    cdef object timer
    cdef uint64_t timer_tick
    cdef bint timer_wanted
    # 1 or 0: tasks can start eagerly on this loop or not; -1: not tried yet.
    cdef int eager
    # Arguments of the task constructor, reused: a fresh dict a task costs 4 % of its creation.
    cdef dict options
    # The name in there: setting it anew for each task of a burst costs 2 % of one.
    cdef object options_name
    # Records that fire() took since the batch was scheduled; None if no batch is open.
    cdef list batch
    cdef double batch_clock
    # When a task last ended, which is when the next one of a batch starts.
    cdef double last_end

    def __init__(self, Registry registry, loop):
        self.registry = registry
        self.loop = loop
        # A loop with a clock of its own (a test's virtual one) is asked; asyncio's and uvloop's is the monotonic clock.
        stock = getattr(type(loop), "time", None) is BaseEventLoop.time or type(loop).__module__ == "uvloop"
        self.clock = None if stock else loop.time
        self.read_factory = loop.get_task_factory
        # asyncio's own loops are read by attribute, for a third of the call's price.
        self.has_factory_attribute = (
            getattr(type(loop), "get_task_factory", None) is BaseEventLoop.get_task_factory
            and hasattr(loop, "_task_factory")
        )
        self.wake_at = -1
        self.names = {}
        self.other_names = NameStats()
        self.eager = -1
        self.options = {"loop": loop, "name": None}

    cdef inline double now(self) except? -1:
        return bgtasks_monotonic() if self.clock is None else <double>self.clock()

    cdef inline object task_factory(self):
        return self.loop._task_factory if self.has_factory_attribute else self.read_factory()

    cdef bint builds_itself(self, object factory) except -1:
        """Tell whether tasks are built here: the loop has no factory, asyncio's eager one, or the manager's own."""
        return (
            factory is None or factory is self.registry._eager_factory or factory == self.registry.task_factory
        )

    cdef bint can_start_eagerly(self) except -1:
        if self.eager < 0:
            self.eager = self.registry._has_eager_tasks(self.loop)
        return self.eager

    cdef Record enroll(self, object coro, object name, double timeout, object context, bint observed):
        """Make the record of a task to come and put it at the end of the list."""
        cdef Record record = Record.__new__(Record)
        cdef NameStats stats
        if name is self.last_name:
            stats = self.last_stats
        else:
            stats = self.stats_of(name)
        record._coro = coro
        record.records = self
        record.name_stats = stats
        record._context = context
        record._timeout = timeout
        record.slot = NOT_ARMED
        record.observed = observed
        if self.next_id == self.last_id:
            self.take_ids()
        self.next_id += 1
        record._task_id = self.next_id
        if not observed:
            record._name = name

        record.previous_record = self.last_record
        if self.last_record is NULL:
            self.first_record = <PyObject*>record
            # See the class: this object now owns itself.
            Py_INCREF(self)
        else:
            (<Record>self.last_record).next_record = <PyObject*>record
        self.last_record = <PyObject*>record
        Py_INCREF(record)
        if observed:
            self.observed += 1
        else:
            self.live += 1
        stats.started += 1
        return record

    cdef NameStats stats_of(self, object name):
        cdef object stats = self.names.get(name)
        if stats is None:
            if len(self.names) >= _MAX_NAMES:
                return self.other_names
            stats = self.names[name] = NameStats()
        self.last_name = name
        self.last_stats = <NameStats>stats
        return <NameStats>stats

    cdef int take_ids(self) except -1:
        self.next_id = self.registry._take_ids()
        self.last_id = self.next_id + IDS_AT_ONCE
        return 0

    cdef object launch(self, Record record, bint eager, object context):
        """Build and return the task of a record. If that fails the record is gone, the coroutine closed."""
        cdef object task, wrapper
        record._created = self.now()
        # A batch of fire() that waits must start before what is created now and after what was created before it.
        self.batch = None
        if context is not None or eager or self.registry._max_running or self.task_factory() is not None:
            return self.launch_specially(record, eager, context)
        wrapper = _around(record)
        if record._name is not self.options_name:
            self.options["name"] = self.options_name = record._name
        try:
            task = PyObject_Call(_TrackedTask, (wrapper,), self.options)
        except BaseException:
            self.discard(record, wrapper)
            raise
        bgtasks_set_record(task, record)
        record._task = task
        if record._timeout > 0:
            self.arm(record)
        return task

    cdef object launch_in_group(self, Record record, bint eager, object context):
        record._created = self.now()
        self.batch = None
        return self.launch_specially(record, eager, context)

    cdef object launch_specially(self, Record record, bint eager, object context):
        """Do as ``launch`` for a task that starts eagerly, runs in a given context, needs a place or has a factory."""
        cdef object factory, task, wrapper
        cdef dict options
        cdef object name = record._name
        cdef Registry registry = self.registry
        cdef bint ours
        cdef bint has_place = record._group is None or record._group.take_place(record)
        if not has_place or (registry._max_running and not registry._take_place(record)):
            record.queued = True
            self.queued += 1
            record._place = self.loop.create_future()
            # Up to its wait, which costs less than a step by the loop: the user's coroutine is not entered.
            eager = context is None
        wrapper = record
        try:
            factory = self.task_factory()
            ours = self.builds_itself(factory)
            if _native or not ours:
                wrapper = _wrap(record, run_queued if record.queued else _run)
            if record._group is None:
                # An executor says for itself which of its tasks start eagerly.
                eager = eager or (factory is not None and factory is registry._eager_factory)
            if eager and context is not None:
                # Raises if the context is entered now: the task's constructor would notice too late, half built.
                context.run(_nothing)
            if not ours:
                options = {"name": name}
                if context is not None:
                    options["context"] = context
                task = self.loop.create_task(wrapper, **options)
                task.add_done_callback(partial(_settle_around, record, wrapper))
            elif eager and self.can_start_eagerly():
                options = {"loop": self.loop, "name": name, "context": context, "eager_start": True}
                task = PyObject_Call(_TrackedTask, (wrapper,), options)
            else:
                task = _TrackedTask(wrapper, loop=self.loop, name=name, context=context)
        except BaseException:
            self.discard(record, wrapper)
            raise
        if ours:
            bgtasks_set_record(task, record)
        self.follow(record, task)
        return task

    cdef inline int follow(self, Record record, object task) except -1:
        """Take up a task that may have run eagerly: keep it and start its timeout unless it has ended."""
        if record._outcome == RUNNING:
            record._task = task
            if record._timeout > 0 and not record.queued:
                self.arm(record)
        return 0

    cdef int discard(self, Record record, object wrapper) except -1:
        """Take back a record whose task could not be built."""
        if record._outcome != RUNNING:
            # An eager task whose first step raised what stops the loop: it ran, and its end was counted.
            return 0
        if wrapper is not record:
            wrapper.close()
        record._coro.close()
        if record._outcome == RUNNING:
            record.name_stats.started -= 1
            self.unlink(record)
            record._outcome = ABANDONED
            record.release()
        return 0

    cdef int finish(self, Record record, int outcome, object error) except -1:
        """Do the bookkeeping of a task that ended; its references are cut by ``release``, after the report."""
        cdef Registry registry = self.registry
        cdef double end = self.now()
        cdef double duration = end - record._created
        self.last_end = end
        record._duration = duration
        record._outcome = outcome
        record.name_stats.count_end(outcome, duration)
        if record.slot != NOT_ARMED:
            self.wheel.disarm(record)
            if self.wheel.armed == 0 and self.timer is not None:
                self.timer.cancel()
                self.timer = None
        if registry._history is not None:
            registry._remember(record, error)
        self.unlink(record)
        return 0

    cdef int unlink(self, Record record) except -1:
        cdef Registry registry = self.registry
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
        if self.first_record is NULL:
            # The caller holds the reference that keeps this object alive while it works.
            Py_DECREF(<PyObject*>self)
        return 0

    cdef int arm(self, Record record) except -1:
        """Start the timeout of a record, if it has one."""
        cdef double deadline
        cdef uint64_t tick
        if record._timeout <= 0:
            return 0
        if self.wheel is None:
            self.wheel = TimerWheel()
            self.wheel_start = record._created
        if self.wheel.armed == 0:
            # An idle wheel's hand stands where it stopped: set it, so that the record needs no extra moves.
            self.wheel.set_hand(<uint64_t>((record._created - self.wheel_start) * TICKS_A_SECOND))
        deadline = (record._created + record._timeout - self.wheel_start) * TICKS_A_SECOND
        if deadline >= <double>MAX_TICK:
            return 0
        # The first tick at or after the deadline: never early, less than a tick late.
        tick = <uint64_t>deadline if deadline > 0 else 0
        if <double>tick < deadline:
            tick += 1
        self.wheel.arm(record, tick)
        if not self.timer_wanted and (self.timer is None or record.tick < self.timer_tick):
            # One loop timer for all: set once an iteration, so tasks that end in it never touch the loop's heap.
            self.timer_wanted = True
            self.loop.call_soon(self.set_timer)
        return 0

    def set_timer(self):
        """Have the loop call ``wake`` when the earliest slot in use is due."""
        cdef uint64_t tick
        cdef double wait
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
        self.timer = self.loop.call_later(wait if wait > SHORTEST_WAIT else SHORTEST_WAIT, self.wake)

    def wake(self):
        """Cancel the tasks whose timeout is over and set the timer anew."""
        cdef Record record
        self.timer = None
        self.wheel.advance(<uint64_t>((self.now() - self.wheel_start) * TICKS_A_SECOND))
        try:
            while True:
                record = self.wheel.pop_due()
                if record is None:
                    break
                record.expired = True
                self.registry._on_timeout(record)
        finally:
            self.set_timer()

    cdef bint defers(self) except -1:
        """Tell whether ``fire`` may put off a start: eager tasks are to be had, and no foreign factory has a say."""
        # The answer holds for the whole of a batch: it starts in the next iteration of the loop.
        return self.batch is not None or (
            not self.registry._max_running and self.can_start_eagerly() and self.builds_itself(self.task_factory())
        )

    cdef int defer(self, Record record) except -1:
        """Have a task start in the next iteration of the loop, in one batch with its neighbours."""
        record._place = PyContext_CopyCurrent()
        if self.batch is None:
            self.batch = []
            self.batch_clock = self.now()
            self.loop.call_soon(self.start_batch, self.batch)
        record._created = self.batch_clock
        self.batch.append(record)
        return 0

    def start_batch(self, batch):
        """Start the tasks that ``fire`` put off, each up to its first suspension."""
        cdef Record record
        cdef object task, wrapper
        cdef object name = None
        cdef dict options = {"loop": self.loop, "name": name, "context": None, "eager_start": True}
        cdef Py_ssize_t index = 0
        if batch is self.batch:
            self.batch = None
        # Not before the call of fire(), so no timeout comes early; and one clock read a task instead of two.
        self.last_end = self.now()
        try:
            for record in <list>batch:
                index += 1
                if record._outcome != RUNNING:
                    continue
                record._created = self.last_end
                wrapper = _around(record)
                if record._name is not name:
                    options["name"] = name = record._name
                options["context"] = record._place
                record._place = None
                try:
                    task = PyObject_Call(_TrackedTask, (wrapper,), options)
                except BaseException:
                    self.discard(record, wrapper)
                    raise
                bgtasks_set_record(task, record)
                self.follow(record, task)
        finally:
            if index < len(batch):
                # The first step of a task raised what stops the loop: the others start when it goes on.
                self.loop.call_soon(self.start_batch, batch[index:])

    cdef list snapshot(self):
        """Return the live records; the list is complete before anything else can run."""
        cdef list records = []
        cdef PyObject* record = self.first_record
        while record is not NULL:
            records.append(<Record>record)
            record = (<Record>record).next_record
        return records

    def abandon(self):
        """Let go of every task of a loop that was closed; return their names, each with the number of tasks."""
        cdef dict names = {}
        cdef Record record
        cdef object task
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


cdef int _close_quietly(object coro) except -1:
    # What a coroutine raises while it is closed after the end of its loop has no one left to go to.
    try:
        coro.close()
    except BaseException:
        pass
    return 0


cdef double _seconds(object coro, object timeout) except -1:
    """Return a timeout as a float, 0 for none; refuse what is no positive number and close the coroutine."""
    cdef double seconds
    if timeout is None:
        return 0.0
    if type(timeout) is float and <double>timeout > 0.0:
        return <double>timeout
    try:
        seconds = timeout
    except (TypeError, ValueError, OverflowError):
        seconds = -1.0
    if not seconds > 0.0 or isinstance(timeout, bool):
        errors.close_refused(coro)
        raise errors.invalid_timeout(timeout)
    return seconds


@cython.final
cdef class Group:
    """The tasks of one executor: how many have not ended, and how many may run at once.

    Belongs to the thread of its loop, as the records of its tasks do. Places are asked for here first, then at the
    registry.

    Args:
        registry: whose tasks they are.
        owner: the executor; its ``_on_quiet`` is called when the last task ends.
        max_running: how many coroutines may run at once; 0 for no limit.
    """

    cdef readonly Registry registry
    cdef readonly object owner
    cdef readonly Py_ssize_t live
    cdef Py_ssize_t max_running
    cdef Py_ssize_t running
    # Records that wait for a place; those that ended meanwhile are passed over.
    cdef object queue

    def __init__(self, Registry registry, owner, *, Py_ssize_t max_running=0):
        self.registry = registry
        self.owner = owner
        self.max_running = max_running
        self.queue = deque()

    def create_task(self, coro, name, timeout, bint eager_start, contextvars_context, unsigned char marks):
        """Start a coroutine as ``Registry.create_task`` does, as one of this group."""
        cdef Registry registry = self.registry
        cdef LoopRecords records = registry.records_here(coro)
        cdef Record record
        cdef double seconds
        if (registry._shut or registry._cap) and registry.must_ask(records) and not registry._admit(coro, name):
            return None
        if type(name) is not str:
            name = _DEFAULT_NAME if name is None else str(name)
        seconds = _seconds(coro, timeout)
        record = records.enroll(coro, name, seconds, None, False)
        record._group = self
        record._marks = marks
        self.live += 1
        if self.max_running:
            return records.launch_in_group(record, eager_start, contextvars_context)
        return records.launch(record, eager_start, contextvars_context)

    cdef bint take_place(self, Record record) except -1:
        """Give a record a place among the running coroutines, or queue it and return False."""
        if self.max_running == 0:
            return True
        if self.running < self.max_running and not self.queue:
            self.running += 1
            record.holds_group_place = True
            return True
        self.queue.append(record)
        return False

    cdef int leave(self, Record record) except -1:
        """Take a record that ended out of the group and give its place to the next one."""
        cdef Record following
        cdef object place
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
                place = following._place
                if place is not None and not place.done():
                    place.set_result(None)
        if self.live == 0:
            self.owner._on_quiet()
        return 0


cdef class Registry:
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

    cdef LoopRecords _current
    cdef dict _by_loop
    # Guards what several threads share: the table of loops, the counters of closed ones, ids, places and the queue.
    cdef object _lock
    cdef object _history
    cdef bint _shut
    cdef Py_ssize_t _cap
    cdef public bint _room_wanted
    cdef readonly Py_ssize_t _max_running
    cdef Py_ssize_t _running
    # An OrderedDict: the first entry of a dict that shrinks at the front is found behind all that have gone.
    cdef object _queue
    cdef dict _muted
    cdef object _muted_level
    cdef long long _ids_taken
    cdef NameStats _retired
    cdef dict _retired_names
    cdef object _eager_tasks
    cdef object _eager_factory

    def __init__(self, *, history=0, cap=0, max_running=0, muted=None, muted_level=0):
        self._by_loop = {}
        self._lock = threading.RLock()
        self._history = deque(maxlen=history) if history else None
        self._cap = cap
        self._max_running = max_running
        self._queue = OrderedDict()
        self._muted = muted
        self._muted_level = muted_level
        self._retired = NameStats()
        self._retired_names = {}
        self._eager_factory = getattr(asyncio, "eager_task_factory", None)

    # -- starting tasks ------------------------------------------------------------------------------------------

    def create_task(
        self,
        coro,
        *,
        name=DEFAULT_NAME,
        timeout=None,
        context=None,
        bint eager_start=False,
        contextvars_context=None,
    ):
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
        cdef LoopRecords records = self.records_here(coro)
        cdef double seconds
        if (self._shut or self._cap) and self.must_ask(records) and not self._admit(coro, name):
            return None
        if type(name) is not str:
            name = _DEFAULT_NAME if name is None else str(name)
        seconds = _seconds(coro, timeout)
        if context is not None and type(context) is not dict:
            _check_context(coro, context)
        if contextvars_context is not None and not isinstance(contextvars_context, _Context):
            errors.close_refused(coro)
            raise errors.invalid_contextvars_context(contextvars_context)
        return records.launch(records.enroll(coro, name, seconds, context, False), eager_start, contextvars_context)

    def fire(self, coro, *, name=DEFAULT_NAME, timeout=None, context=None):
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
        cdef LoopRecords records = self.records_here(coro)
        cdef Record record
        cdef double seconds
        if (self._shut or self._cap) and self.must_ask(records) and not self._admit(coro, name):
            return
        if type(name) is not str:
            name = _DEFAULT_NAME if name is None else str(name)
        seconds = _seconds(coro, timeout)
        if context is not None and type(context) is not dict:
            _check_context(coro, context)
        record = records.enroll(coro, name, seconds, context, False)
        if records.defers():
            records.defer(record)
        else:
            records.launch(record, False, None)

    def task_factory(self, loop, coro, **kwargs):
        """Build a task for ``loop.set_task_factory(manager.task_factory)``: every task of the program is tracked.

        Such tasks are observed, not owned: they are counted, timed and shown, and ``cancel`` reaches them by id or
        name. Caps and ``shutdown`` leave them alone, and their exceptions go where they would go without a manager.

        Args:
            loop: the loop that asks.
            coro: the coroutine.
            kwargs: what the loop passes on to the task: ``name``, ``context``, ``eager_start``.
        """
        cdef LoopRecords records
        cdef Record record
        cdef object task
        if not iscoroutine(coro):
            return Task(coro, loop=loop, **kwargs)
        records = self.records_of(loop)
        record = records.enroll(coro, _name_of(coro), 0.0, None, True)
        record._created = records.now()
        wrapper = _around(record)
        try:
            task = TrackedTask(wrapper, loop=loop, **kwargs)
        except BaseException:
            records.discard(record, wrapper)
            raise
        bgtasks_set_record(task, record)
        if record._outcome == RUNNING:
            record._task = task
        return task

    cdef inline bint must_ask(self, LoopRecords records):
        # One loop's count is at hand; those of several are for _admit to add up.
        return self._shut or records.live >= self._cap or len(self._by_loop) > 1

    cdef inline LoopRecords records_here(self, object coro):
        cdef object loop
        cdef LoopRecords records = self._current
        if not PyCoro_CheckExact(coro) and not iscoroutine(coro):
            raise errors.not_a_coroutine(coro)
        loop = _running_loop()
        if loop is None:
            errors.close_refused(coro)
            raise errors.no_running_loop()
        if records is not None and records.loop is loop:
            return records
        return self.records_of(loop)

    cdef LoopRecords records_of(self, object loop):
        """Return the records of a loop, new ones at its first use; let go of loops that were closed."""
        cdef LoopRecords records
        with self._lock:
            records = self._by_loop.get(loop)
            if records is None:
                self._let_go_of_closed_loops()
                records = self._by_loop[loop] = LoopRecords(self, loop)
            self._current = records
        return records

    def _let_go_of_closed_loops(self):
        """Drop what closed loops left behind, count it as abandoned and tell the owner."""
        cdef LoopRecords records
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

    def _has_eager_tasks(self, loop):
        """Tell whether tasks can start eagerly here, by trying it once; ``loop`` runs."""
        if self._eager_tasks is None:
            self._eager_tasks = starts_eagerly(loop)
        return self._eager_tasks

    def _take_ids(self):
        """Reserve task ids for one loop and return the last one in use."""
        with self._lock:
            self._ids_taken += IDS_AT_ONCE
            return self._ids_taken - IDS_AT_ONCE

    def _renew_lock(self):
        """Take a new lock in the child of a fork, where no thread is left that could let go of the old one."""
        self._lock = threading.RLock()

    def _make_group(self, owner, max_running):
        """Return a ``Group`` for the tasks or functions of the executor ``owner``."""
        return Group(self, owner, max_running=max_running)

    # -- functions that an executor runs in threads --------------------------------------------------------------

    def _add_host(self, host):
        """Return the records of an executor's threads; ``host`` answers for them as a loop does for its tasks."""
        with self._lock:
            self._let_go_of_closed_loops()
            records = self._by_loop[host] = LoopRecords(self, host)
        return records

    def _admits_call(self, LoopRecords records, call, name):
        """Say whether a function may be taken on; raise to refuse it with an error."""
        return not (self._shut or self._cap) or not self.must_ask(records) or self._admit(call, name)

    def _enroll_call(self, LoopRecords records, Group group, call, name, timeout, unsigned char marks, future):
        """Make the record of a queued function, ``call`` standing for its coroutine. Safe from any thread."""
        cdef Record record = records.enroll(call, name, 0.0 if timeout is None else timeout, None, False)
        record._created = records.now()
        record._task = future
        record._group = group
        record._marks = marks
        group.live += 1
        record.queued = True
        records.queued += 1
        return record

    # -- places among the running coroutines ---------------------------------------------------------------------

    def _take_place(self, Record record):
        """Give a record a place among the running coroutines, or queue it and return False."""
        with self._lock:
            if self._running < self._max_running and not self._queue:
                self._running += 1
                record.holds_place = True
                return True
            self._queue[record] = None
            return False

    def _leave_place(self, Record record):
        """Take back the place of a record, or take it out of the queue, and let the next ones run."""
        cdef Record following
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
                    if loop is _running_loop():
                        _grant(following)
                    else:
                        loop.call_soon_threadsafe(_grant, following)
                except RuntimeError:
                    # Its loop is closed: it is counted as abandoned with the rest of that loop.
                    continue
                following.holds_place = True
                self._running += 1

    # -- questions, from any thread ------------------------------------------------------------------------------

    def get_task_count(self):
        """Return the number of tasks that have not ended, queued ones included."""
        cdef LoopRecords records = self._current
        if records is not None and len(self._by_loop) == 1 and not records.loop.is_closed():
            return records.live + records.observed
        return sum([self._count(records) for records in self._all_records()])

    def _count(self, LoopRecords records):
        """Return the number of tasks of one loop."""
        return records.live + records.observed

    def _count_queued(self, LoopRecords records):
        """Return the number of tasks of one loop that wait for a place."""
        return records.queued

    def _all_records(self):
        """Return the ``LoopRecords`` of every open loop."""
        with self._lock:
            self._let_go_of_closed_loops()
            return list(self._by_loop.values())

    def _owned(self):
        """Return how many tasks the manager owns: all but those that came through its task factory."""
        cdef LoopRecords records
        cdef Py_ssize_t count = 0
        for records in self._all_records():
            count += records.live
        return count

    def _owned_by_loop(self):
        """Return a list of (loop, number of owned tasks)."""
        cdef LoopRecords records
        return [(records.loop, records.live) for records in self._all_records()]

    def _live_records(self):
        """Return the records of all tasks that have not ended."""
        cdef LoopRecords records
        cdef list found = []
        for records in self._all_records():
            found += records.snapshot()
        return found

    def _record_of(self, task):
        """Return the record of a live task of this manager, None for any other."""
        cdef Record record
        if isinstance(task, TrackedTask):
            record = record_of(task)
            if record is None or record._outcome != RUNNING or record.records.registry is not self:
                return None
            return record
        for record in self._live_records():
            if record._task is task and task is not None:
                return record
        return None

    def _bind_running_loop(self):
        """Make the running loop known before its first task, so that other threads can hand work over to it."""
        loop = _running_loop()
        if loop is None:
            raise errors.no_running_loop()
        self.records_of(loop)

    def _loop_of(self, Record record):
        """Return the loop of a live record, None if it has ended."""
        return None if record.records is None else record.records.loop

    def get_task_info(self):
        """Return a ``TaskInfo`` for every task that has not ended, oldest first on each loop."""
        cdef Record record
        cdef list found = []
        for record in self._live_records():
            if record._outcome == RUNNING and record.records is not None:
                found.append(record.info())
        return found

    def get_history(self):
        """Return the finished tasks that are remembered, oldest first; empty unless ``history`` was given."""
        if self._history is None:
            return []
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
            for task_id, name, coroutine, outcome, duration, ended_at, error in list(self._history)
        ]

    def _remember(self, Record record, error):
        """Put a finished task into the history as plain values."""
        self._history.append(
            (
                record._task_id,
                record.name,
                _name_of(record._coro),
                OUTCOMES[record._outcome],
                record._duration,
                wall_clock(),
                None if error is None else errors.text_of(error),
            )
        )

    def _counters(self):
        """Return the counters of all loops, the closed ones included, and those of each name."""
        cdef NameStats total = NameStats()
        cdef dict names = {}
        cdef LoopRecords records
        with self._lock:
            # First of all: it moves the counters of loops closed meanwhile to the retired ones.
            open_loops = self._all_records()
            total.add(self._retired)
            for name, stats in self._retired_names.items():
                _add_to(names, name, <NameStats>stats)
            for records in open_loops:
                _merge(total, names, records)
            counters = total.as_dict()
            counters["queued"] = sum([self._count_queued(records) for records in open_loops])
            counters["running"] = counters["in_flight"] - counters["queued"]
        del counters["p50_seconds"]
        del counters["p99_seconds"]
        counters["names"] = {name: (<NameStats>stats).as_dict() for name, stats in names.items()}
        return counters

    # -- what the owner sets -------------------------------------------------------------------------------------

    def _shut_gate(self):
        """Have ``create_task`` and ``fire`` ask ``_admit`` for every task from now on."""
        self._shut = True

    def _wake_at(self, loop, Py_ssize_t count):
        """Have ``_on_quiet`` called each time a task ends and ``loop`` is left with ``count`` owned ones or fewer."""
        cdef LoopRecords records = self._by_loop.get(loop)
        if records is not None:
            records.wake_at = count

    # -- what the owner is asked and told ------------------------------------------------------------------------

    def _admit(self, coro, name):
        """Say whether a new task may start at the cap or behind a shut gate; raise to refuse it with an error."""
        return True

    def _report(self, Record record, error):
        """Hear that a task ended, after its bookkeeping and before its references are cut."""

    def _on_timeout(self, Record record):
        """Hear that the timeout of a task is over, and cancel it."""

    def _on_abandoned(self, names):
        """Hear that a closed loop left tasks behind: a dict of their names with the number of each."""

    def _on_quiet(self):
        """Hear that a loop is down to the number of tasks given to ``_wake_at``."""

    def _on_room(self):
        """Hear that a task ended while ``_room_wanted`` is set."""


cdef int _check_context(object coro, object context) except -1:
    if isinstance(context, Context) or not isinstance(context, Mapping):
        errors.close_refused(coro)
        raise errors.invalid_context(context)
    return 0


def _grant(record):
    """Let a queued task run."""
    place = record.place
    if place is not None and not place.done():
        place.set_result(None)


cdef int _merge(NameStats total, dict names, LoopRecords records) except -1:
    for name, stats in list(records.names.items()):
        total.add(<NameStats>stats)
        _add_to(names, name, <NameStats>stats)
    if records.other_names.started:
        total.add(records.other_names)
        _add_to(names, OTHER_NAMES, records.other_names)
    return 0


cdef int _add_to(dict names, object name, NameStats stats) except -1:
    if name not in names:
        if len(names) >= _MAX_NAMES:
            name = OTHER_NAMES
        names.setdefault(name, NameStats())
    (<NameStats>names[name]).add(stats)
    return 0
