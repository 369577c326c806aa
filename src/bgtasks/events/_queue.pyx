# cython: language_level=3, binding=True, annotation_typing=False
"""The bounded queue between ``emit`` and the flusher, with its counters. No logging, no policy, no event loop.

There are two implementations, ``_queue.pyx`` (compiled) and ``_queue_py.py`` (pure Python); ``_event_queue.py`` selects
one. No lock is taken here: a method runs under the GIL and lets no other Python code run between its reads and its
writes. Callbacks and the destruction of dropped events, which may run other code, come last. The module does not
declare itself safe without the GIL, so a free-threaded interpreter enables the GIL for it.
"""

cimport cython
from cpython.bytes cimport PyBytes_CheckExact, PyBytes_GET_SIZE
from cpython.contextvars cimport PyContextVar_Get
from cpython.object cimport PyObject
from libc.stdint cimport int64_t

from asyncio.events import _get_running_loop as get_running_loop
from struct import pack

from bgtasks.events._footprint import footprint
from bgtasks.events._guard import at_work

NEVER = 1 << 62
FIRST_MEAN = 256
# The queue looks at the memory of its newest events when it has grown to this number, and then each time when it has
# grown by one event for every 2 MiB of ``max_bytes``, within these bounds. A queue with the longest stretch takes twice
# as many while it is not half full: that many events of 1 MiB still fit into twice ``max_bytes``.
FIRST_LOOK = 8
LEAST_STRETCH = 4
# Classes whose layout is known; then they are forgotten.
MOST_CLASSES = 256

# C variables: a lookup in the module's dict would cost a tenth of an emit.
cdef int64_t _NEVER = NEVER
cdef object _at_work = at_work
cdef object _get_running_loop = get_running_loop

cdef enum:
    # Slots of a new queue, a power of two; an emptied queue frees those beyond LARGEST_KEPT.
    FIRST_SLOTS = 256
    LARGEST_KEPT = 16384
    # A weight is kept in these parts of a byte: as a number of bytes, each look would round it down.
    UNITS = 1024
    LONGEST_STRETCH = 32
    # A mean weight that only large events reach: then the queue looks at all events until it is empty.
    LARGE_MEAN = 2048

QueueStats = dict


cdef extern from "Python.h":
    void Py_DECREF(PyObject* value)


cdef extern from "_footprint.h":
    Py_ssize_t bgtasks_footprint(PyObject* event, PyObject* layouts, PyObject** unknown) noexcept
    Py_ssize_t bgtasks_offset(object member) noexcept

# How to find the parts of an object, by its class: the places of its fields, True if the garbage collector sees them,
# None if only Python code can tell.
cdef dict _layouts = {}


def footprints(events: list) -> int:
    """Return about how many bytes of memory these events take by themselves."""
    cdef int64_t total = 0
    for event in <list>events:
        total += _footprint_of(event)
    return total


cdef int64_t _footprint_of(object event) except -1:
    cdef PyObject* unknown
    cdef int64_t size = bgtasks_footprint(<PyObject*>event, <PyObject*>_layouts, &unknown)
    while size < 0 and unknown is not NULL and _learn(<object>unknown):
        size = bgtasks_footprint(<PyObject*>event, <PyObject*>_layouts, &unknown)
    return <int64_t>footprint(event) if size < 0 else size


cdef bint _learn(object kind) except -1:
    """Return whether the class was not known, and is now."""
    # The hash of a foreign metaclass may run Python code.
    if type(kind).__hash__ is not type.__hash__ or kind in _layouts:
        return False
    if len(_layouts) >= MOST_CLASSES:
        _layouts.clear()
    _layouts[kind] = _layout_of(kind)
    return True


cdef object _layout_of(object kind):
    try:
        fields = getattr(kind, "__struct_fields__", ())
        if fields:
            # The garbage collector does not look into a msgspec.Struct with gc=False.
            offsets = [bgtasks_offset(getattr(kind, name)) for name in fields]
            return None if -1 in offsets else pack(f"{len(offsets)}n", *offsets)
        if kind.__module__ == "decimal":
            return True
        # A class that says how large its objects are may keep memory that nobody sees.
        is_plain = kind.__sizeof__ is object.__sizeof__ and (not kind.__itemsize__ or issubclass(kind, tuple))
        return True if is_plain else None
    except Exception:
        return None


cdef inline bint _is_at_work(object queue) except -1:
    cdef PyObject* value = NULL
    cdef bint same
    PyContextVar_Get(_at_work, NULL, &value)
    same = value == <PyObject*>queue
    Py_DECREF(value)
    return same


@cython.final
cdef class EventQueue:
    """A bounded first-in, first-out queue of events, with counters; any thread may fill it.

    Args:
        max_events: the maximum number of queued events.
        max_bytes: the maximum number of queued bytes. A ``bytes`` event counts with its length, any other with the
            mean length of the events encoded so far or three quarters of the mean ``measure``, whichever is more.
        max_event_bytes: a ``bytes`` event longer than this is refused.
        drop_oldest: when the queue is full, drop the oldest events instead of refusing the new one.
        on_due: called without arguments, by the emitting thread, when the number given to ``arm`` is reached; once
            per ``arm``. If it raises, it is called again at the next event.
        on_loss: called without arguments when events were refused or dropped; once per ``arm_loss``. If it raises, it
            is called again at the next loss.
        measure: returns about how many bytes of memory a list of unencoded events takes; called for the events that
            make the queue grow, many at a time.

    """

    cdef list _slots
    cdef Py_ssize_t _head
    cdef Py_ssize_t _count
    # The number of slots, a power of two, minus one.
    cdef Py_ssize_t _mask
    cdef int64_t _max_events
    cdef int64_t _max_bytes
    cdef int64_t _max_event_bytes
    cdef int64_t _bytes
    cdef int64_t _others
    # The mean length of encoded events; three quarters of the mean memory, in units; what an unencoded event counts,
    # the maximum of both in bytes.
    cdef int64_t _mean
    cdef int64_t _weight
    cdef int64_t _charge
    # The number of events at which to look at the newest, that of an empty queue, and how many more those are than at
    # the last look.
    cdef int64_t _look_events
    cdef int64_t _first_look
    cdef int64_t _step
    cdef int64_t _stretch
    cdef int64_t _random
    cdef bint _looks_at_all
    # The minimum of the numbers at which to look and to call ``on_due``.
    cdef int64_t _next_events
    cdef int64_t _due_events
    cdef int64_t _due_bytes
    cdef int64_t _accepted
    cdef int64_t _recovered
    cdef int64_t _delivered
    cdef int64_t _spooled
    cdef int64_t _in_flight
    cdef bint _drop_oldest
    cdef bint _closed
    cdef bint _loss_armed
    cdef bint _waits_for_loop
    cdef dict _dropped
    cdef dict _refused
    cdef object _on_due
    cdef object _on_loss
    cdef object _measure

    def __init__(
        self,
        int64_t max_events,
        int64_t max_bytes,
        int64_t max_event_bytes,
        bint drop_oldest,
        object on_due,
        object on_loss,
        object measure,
    ):
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._max_event_bytes = max_event_bytes
        self._drop_oldest = drop_oldest
        self._on_due = on_due
        self._on_loss = on_loss
        self._measure = measure
        self._stretch = min(max(max_bytes >> 21, LEAST_STRETCH), LONGEST_STRETCH)
        self._first_look = max(self._longest_step(), FIRST_LOOK)
        self._closed = False
        self.reset()

    def reset(self) -> None:
        """Forget all events and counters; also called in the child of a fork."""
        cdef list events = self._slots
        self._slots = [None] * FIRST_SLOTS
        self._mask = FIRST_SLOTS - 1
        self._head = self._count = 0
        self._bytes = self._others = 0
        self._mean = self._charge = FIRST_MEAN
        self._weight = 0
        self._look_events = self._first_look
        self._step = self._longest_step()
        self._random = 1
        self._looks_at_all = False
        self._accepted = self._recovered = self._delivered = self._spooled = self._in_flight = 0
        self._dropped = {}
        self._refused = {}
        self._waits_for_loop = False
        self._due_events = self._next_events = 1
        self._due_bytes = _NEVER
        self._loss_armed = True
        # Destroying events may run code, which must find a consistent queue.
        del events

    def __len__(self):
        return self._count

    # -- filling --------------------------------------------------------------------------------------------------

    # In one body in spite of its branches: every event passes here, and each further call would show.
    def emit(self, event: object) -> bool:
        """Queue an event for the flusher, from any thread; never wait, and never raise because of load.

        The event is encoded later: do not change it after this call.

        Returns:
            Whether the event was accepted. Refused events are counted by reason.

        """
        cdef int64_t size = PyBytes_GET_SIZE(event) if PyBytes_CheckExact(event) else -1
        cdef int64_t charge = self._charge if size < 0 else size
        cdef int64_t total = self._bytes + self._others * self._charge + charge
        cdef list dropped = None
        if self._closed:
            return self._refuse("closed")
        if size > self._max_event_bytes:
            return self._refuse("too_large")
        if _is_at_work(self):
            return self._refuse("feedback")
        if self._count >= self._max_events or total > self._max_bytes:
            if not self._drop_oldest or charge > self._max_bytes:
                return self._refuse("full")
            dropped = self._make_room(charge)
            total = self._bytes + self._others * self._charge + charge
        if self._count > self._mask:
            self._grow()
        self._slots[(self._head + self._count) & self._mask] = event
        self._count += 1
        self._accepted += 1
        if size < 0:
            self._others += 1
        else:
            self._bytes += size
        if self._count >= self._next_events or total >= self._due_bytes:
            self._pass_threshold()
        if dropped is not None:
            self._report_loss()
        return True

    cdef int _pass_threshold(self) except -1:
        if self._count >= self._look_events:
            self._look()
        if self._waits_for_loop:
            if _get_running_loop() is not None:
                self._call_due()
            return 0
        # Read again: other code may have run.
        self._next_events = min(self._due_events, self._look_events)
        if self._count >= self._due_events or self._total() >= self._due_bytes:
            self._due_events = self._due_bytes = _NEVER
            self._next_events = self._look_events
            self._call_due()
        return 0

    cdef inline int64_t _longest_step(self) noexcept:
        return 2 * self._stretch if self._stretch == LONGEST_STRETCH else self._stretch

    cdef int _look(self) except -1:
        # After the first look, the events before were looked at already.
        cdef int64_t step = self._step if self._count > self._first_look else self._count
        cdef int64_t weight
        cdef list newest
        cdef bint is_all = self._looks_at_all or step < LONGEST_STRETCH
        self._step = self._longest_step() if 2 * self._total() <= self._max_bytes else self._stretch
        self._look_events = self._count + self._step
        try:
            newest = self._newest(step, is_all)
            weight = self._weigh(newest)
            # Measuring may have emptied the queue.
            if weight > LARGE_MEAN * UNITS and not is_all and self._count >= step:
                self._looks_at_all = is_all = True
                newest = self._newest(step, True)
                weight = self._weigh(newest)
            if is_all:
                step = len(newest)
        except Exception:
            # The events are queued already: emit must not raise.
            return 0
        if weight:
            if self._others > step:
                weight = self._weight + (weight - self._weight) * step // self._others
            self._weight = weight
            self._charge = max(self._mean, weight // UNITS)
        return 0

    cdef list _newest(self, int64_t step, bint is_all):
        """Return the newest events that are not encoded, or about a fifth of them at random."""
        cdef list newest = []
        cdef object event
        cdef Py_ssize_t index = self._head + self._count - step
        while index < self._head + self._count:
            event = self._slots[index & self._mask]
            if not PyBytes_CheckExact(event):
                newest.append(event)
            if is_all:
                index += 1
            else:
                # A linear congruential generator, the one of C's standard: not always each tenth event, or never.
                self._random = (self._random * 1103515245 + 12345) & 0x7FFFFFFF
                index += 1 + (self._random >> 16) % 9
        return newest

    cdef int64_t _weigh(self, list newest) except -1:
        cdef int64_t size = self._measure(newest) if newest else 0
        return size * 3 * UNITS // (4 * len(newest)) if newest else 0

    cdef inline int64_t _total(self) noexcept:
        return self._bytes + self._others * self._charge

    def has_capacity(self) -> bool:
        """Return whether an event of mean length would be accepted, or refused for another reason than load."""
        return self._closed or (
            self._count < self._max_events and self._total() + self._charge <= self._max_bytes
        )

    def is_over(self, share: float) -> bool:
        """Return whether more than a share of either capacity is in use; False if the queue is closed."""
        cdef double part = share
        return not self._closed and (
            self._count > part * self._max_events or self._total() > part * self._max_bytes
        )

    def refuse(self, reason: str) -> bool:
        """Count a refused event, and return False."""
        return self._refuse(reason)

    cdef bint _refuse(self, str reason) except -1:
        self._refused[reason] = self._refused.get(reason, 0) + 1
        self._report_loss()
        return False

    cdef int _call_due(self) except -1:
        try:
            self._on_due()
        except BaseException:
            self._waits_for_loop = False
            self._due_events = self._next_events = self._count + 1
            raise
        return 0

    cdef list _make_room(self, int64_t charge):
        """Drop the oldest events, and return them; counted before they leave, which cannot fail."""
        cdef int64_t events = self._count
        cdef int64_t queued = self._bytes
        cdef int64_t others = self._others
        cdef list dropped = []
        while events and (events >= self._max_events or queued + others * self._charge + charge > self._max_bytes):
            event = self._slots[(self._head + len(dropped)) & self._mask]
            dropped.append(event)
            events -= 1
            if PyBytes_CheckExact(event):
                queued -= PyBytes_GET_SIZE(event)
            else:
                others -= 1
        self._dropped["full"] = self._dropped.get("full", 0) + len(dropped)
        for _ in range(len(dropped)):
            self._pop()
        # A queue that is always full has to look, too.
        self._look_events -= len(dropped)
        self._next_events = min(self._due_events, self._look_events)
        return dropped

    cdef object _pop(self):
        cdef object event = self._slots[self._head]
        self._slots[self._head] = None
        self._head = (self._head + 1) & self._mask
        self._count -= 1
        if PyBytes_CheckExact(event):
            self._bytes -= PyBytes_GET_SIZE(event)
        else:
            self._others -= 1
        return event

    cdef int _grow(self) except -1:
        cdef list slots = self._slots[self._head :] + self._slots[: self._head]
        self._slots = slots + [None] * len(slots)
        self._head = 0
        self._mask = 2 * self._mask + 1
        return 0

    cdef int _report_loss(self) except -1:
        if self._loss_armed:
            self._loss_armed = False
            try:
                self._on_loss()
            except BaseException:
                self._loss_armed = True
                raise
        return 0

    def close(self) -> None:
        """Refuse every event from now on."""
        self._closed = True

    # -- emptying, by the flusher ---------------------------------------------------------------------------------

    def arm(self, events: int, queued_bytes: int) -> bool:
        """Have ``on_due`` called once, when this number of events or bytes is queued.

        Args:
            events: number of events.
            queued_bytes: number of bytes; 0 to wait for events alone.

        Returns:
            True if that number is queued already; then nothing is armed.

        """
        self._waits_for_loop = False
        if self._count >= events or (queued_bytes and self._total() >= queued_bytes):
            self._due_events = self._due_bytes = _NEVER
            self._next_events = self._look_events
            return True
        self._due_events = events
        self._due_bytes = queued_bytes or _NEVER
        self._next_events = min(self._due_events, self._look_events)
        return False

    def arm_loop(self) -> None:
        """Have ``on_due`` called at every event that is emitted where an event loop runs, until ``arm`` is called."""
        self._waits_for_loop = True
        self._due_events = self._next_events = 0
        self._due_bytes = _NEVER

    def arm_loss(self) -> None:
        """Have ``on_loss`` called once, when the next event is refused or dropped."""
        self._loss_armed = True

    def pop_batch(self, events: int, batch_bytes: int) -> list[Any]:
        """Remove and return the oldest events, up to this number of events and bytes, but at least one if there is any.

        They are in flight until ``account`` counts their outcome.
        """
        cdef list batch = []
        cdef object event
        cdef int64_t left = batch_bytes
        cdef int64_t size
        cdef int64_t look
        cdef Py_ssize_t most = events
        cdef bint is_done = False
        try:
            while self._count and len(batch) < most:
                event = self._slots[self._head]
                size = PyBytes_GET_SIZE(event) if PyBytes_CheckExact(event) else -1
                left -= self._charge if size < 0 else size
                if left < 0 and batch:
                    break
                # What can fail comes first.
                batch.append(event)
                self._slots[self._head] = None
                self._head = (self._head + 1) & self._mask
                self._count -= 1
                if size < 0:
                    self._others -= 1
                else:
                    self._bytes -= size
            is_done = True
        finally:
            if not is_done:
                self._put_back(batch)
        self._in_flight += len(batch)
        if not self._others:
            self._looks_at_all = False
            self._weight = 0
            self._charge = self._mean
        look = max(self._count + self._step, self._first_look)
        self._look_events = min(self._look_events, look)
        self._next_events = min(self._due_events, self._look_events)
        if not self._count and self._mask >= LARGEST_KEPT:
            self._shrink()
        return batch

    cdef int _put_back(self, list batch) except -1:
        for event in reversed(batch):
            self._head = (self._head - 1) & self._mask
            self._slots[self._head] = event
            self._count += 1
            if PyBytes_CheckExact(event):
                self._bytes += PyBytes_GET_SIZE(event)
            else:
                self._others += 1
        return 0

    cdef int _shrink(self) except -1:
        try:
            self._slots = [None] * LARGEST_KEPT
        except MemoryError:
            # It stays as large as it is.
            return 0
        self._mask = LARGEST_KEPT - 1
        self._head = 0
        return 0

    def add_mean(self, mean: int) -> None:
        """Update the mean length of events by that of the batch just encoded, in bytes."""
        self._mean = max((3 * self._mean + <int64_t>mean) // 4, 1)
        self._charge = max(self._mean, self._weight // UNITS)

    def account(self, count: int, outcome: str) -> None:
        """Count the outcome of events in flight: ``"delivered"``, ``"spooled"`` or the reason of a drop."""
        cdef int64_t moved = count
        self._add(moved, outcome)
        self._in_flight -= moved
        self._report_drop(outcome)

    def account_spooled(self, count: int, outcome: str) -> None:
        """Count the outcome of spooled events: ``"delivered"`` or the reason of a drop."""
        cdef int64_t moved = count
        self._add(moved, outcome)
        self._spooled -= moved
        self._report_drop(outcome)

    def recover(self, count: int) -> None:
        """Count events that an earlier process left in the spool as accepted and spooled."""
        self._accepted += count
        self._recovered += count
        self._spooled += count

    cdef int _add(self, int64_t count, str outcome) except -1:
        if outcome == "delivered":
            self._delivered += count
        elif outcome == "spooled":
            self._spooled += count
        else:
            self._dropped[outcome] = self._dropped.get(outcome, 0) + count
        return 0

    cdef int _report_drop(self, str outcome) except -1:
        if outcome != "delivered" and outcome != "spooled":
            self._report_loss()
        return 0

    # -- counters -------------------------------------------------------------------------------------------------

    @property
    def accepted(self):
        """The number of accepted events."""
        return self._accepted

    @property
    def finished(self):
        """The number of accepted events that were delivered or dropped."""
        return self._accepted - self._count - self._in_flight - self._spooled

    def counters(self) -> QueueStats:
        """Return a consistent snapshot of the counters. Safe from any thread."""
        return {
            "accepted": self._accepted,
            "recovered": self._recovered,
            "delivered": self._delivered,
            "spooled": self._spooled,
            "queue_events": self._count + self._in_flight,
            "queue_bytes": self._total(),
            "in_flight": self._in_flight,
            "dropped": dict(self._dropped),
            "refused": dict(self._refused),
        }
