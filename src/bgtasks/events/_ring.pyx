# cython: language_level=3, binding=True
"""The bounded queue between ``emit`` and the flusher, and its books. No logging, no policy, no event loop.

Two files hold these names, ``_ring.pyx`` (compiled) and ``_ring_py.py`` (its twin); ``ring.py`` picks one. Here no lock
is taken: a method runs under the interpreter's lock and lets no other Python code run between its reads and its writes.
What may run some, a callback or the end of an event that is given up, comes last. The module does not declare itself
safe without that lock, so a free-threaded interpreter keeps it.
"""

cimport cython
from cpython.bytes cimport PyBytes_CheckExact, PyBytes_GET_SIZE
from cpython.contextvars cimport PyContextVar_Get
from cpython.object cimport PyObject
from libc.stdint cimport int64_t

from bgtasks.events._guard import at_work

NEVER = 1 << 62
FIRST_MEAN = 256

# As C variables: looked up in the module's dict they would cost a tenth of an emit.
cdef int64_t _NEVER = NEVER
cdef object _at_work = at_work

cdef enum:
    # Places of a new queue, a power of two; one that is empty again gives back what it has beyond LARGEST_KEPT.
    FIRST_PLACES = 256
    LARGEST_KEPT = 16384

Books = dict


cdef extern from "Python.h":
    # A borrowed reference to one of our own slots, which stay filled while it is used.
    void Py_DECREF(PyObject* value)


cdef inline bint _is_at_work(object ring) except -1:
    cdef PyObject* value = NULL
    cdef bint same
    PyContextVar_Get(_at_work, NULL, &value)
    same = value == <PyObject*>ring
    Py_DECREF(value)
    return same


@cython.final
cdef class Ring:
    """A bounded first-in, first-out queue of events that any thread may fill, with its books.

    Args:
        max_events: how many events it holds at most.
        max_bytes: how many bytes it holds at most. An event that is ``bytes`` counts with its length, any other with
            the mean length of those encoded so far.
        max_event_bytes: an event of ``bytes`` longer than this is refused alone.
        drop_oldest: at a bound, give up the oldest events instead of refusing the new one.
        wake: called without arguments, by whichever thread emits, when what ``arm`` waits for has come. Once for each
            ``arm``.
        tell: called without arguments when events were refused or given up, once for each ``listen``.

    """

    cdef list _slots
    cdef Py_ssize_t _head
    cdef Py_ssize_t _count
    # Of the places, less one: they are a power of two.
    cdef Py_ssize_t _mask
    cdef int64_t _max_events
    cdef int64_t _max_bytes
    cdef int64_t _max_event_bytes
    cdef int64_t _bytes
    cdef int64_t _others
    cdef int64_t _mean
    cdef int64_t _wake_events
    cdef int64_t _wake_bytes
    cdef int64_t _accepted
    cdef int64_t _recovered
    cdef int64_t _delivered
    cdef int64_t _spooled
    cdef int64_t _in_flight
    cdef bint _drop_oldest
    cdef bint _closed
    cdef bint _listening
    cdef dict _dropped
    cdef dict _refused
    cdef object _wake
    cdef object _tell

    def __init__(
        self,
        int64_t max_events,
        int64_t max_bytes,
        int64_t max_event_bytes,
        bint drop_oldest,
        object wake,
        object tell,
    ):
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._max_event_bytes = max_event_bytes
        self._drop_oldest = drop_oldest
        self._wake = wake
        self._tell = tell
        self._closed = False
        self.reset()

    def reset(self):
        """Forget all events and books; for the child of a fork, whose lock another thread may have held."""
        cdef list events = self._slots
        self._slots = [None] * FIRST_PLACES
        self._mask = FIRST_PLACES - 1
        self._head = self._count = 0
        self._bytes = self._others = 0
        self._mean = FIRST_MEAN
        self._accepted = self._recovered = self._delivered = self._spooled = self._in_flight = 0
        self._dropped = {}
        self._refused = {}
        self._wake_events = 1
        self._wake_bytes = _NEVER
        self._listening = True
        # What they run when they end finds a ring in order.
        del events

    def __len__(self):
        return self._count

    # -- filling ------------------------------------------------------------------------------------------------------

    def emit(self, event):
        """Queue an event for the flusher; from any thread. Never waits and never raises because of load.

        The event is encoded later: do not change it after this call.

        Returns:
            Whether the event was accepted. What is refused is counted with its reason.

        """
        cdef int64_t size = PyBytes_GET_SIZE(event) if PyBytes_CheckExact(event) else -1
        cdef int64_t charge = self._mean if size < 0 else size
        cdef int64_t volume = self._bytes + self._others * self._mean + charge
        cdef list given_up = None
        if self._closed:
            return self.refuse("closed")
        if size > self._max_event_bytes:
            return self.refuse("too_large")
        if _is_at_work(self):
            return self.refuse("feedback")
        if self._count >= self._max_events or volume > self._max_bytes:
            if not self._drop_oldest or charge > self._max_bytes:
                return self.refuse("full")
            given_up = self._make_room(charge)
            volume = self._bytes + self._others * self._mean + charge
        if self._count > self._mask:
            self._grow()
        self._slots[(self._head + self._count) & self._mask] = event
        self._count += 1
        self._accepted += 1
        if size < 0:
            self._others += 1
        else:
            self._bytes += size
        if self._count >= self._wake_events or volume >= self._wake_bytes:
            self._wake_events = self._wake_bytes = _NEVER
            self._wake()
        if given_up is not None:
            self._tell_once()
        return True

    def has_room(self):
        """Say whether an event of the mean size would be accepted, or refused for another reason than a full ring."""
        return self._closed or (
            self._count < self._max_events and self._bytes + (self._others + 1) * self._mean <= self._max_bytes
        )

    cpdef bint refuse(self, str reason) except -1:
        """Count an event that is not accepted, and return False."""
        self._refused[reason] = self._refused.get(reason, 0) + 1
        self._tell_once()
        return False

    cdef list _make_room(self, int64_t charge):
        cdef list given_up = []
        while self._count and (
            self._count >= self._max_events or self._bytes + self._others * self._mean + charge > self._max_bytes
        ):
            given_up.append(self._pop())
        self._dropped["full"] = self._dropped.get("full", 0) + len(given_up)
        return given_up

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

    cdef int _tell_once(self) except -1:
        if self._listening:
            self._listening = False
            self._tell()
        return 0

    def close(self):
        """Refuse every event from now on."""
        self._closed = True

    # -- emptying: the flusher's --------------------------------------------------------------------------------------

    def arm(self, int64_t events, int64_t volume):
        """Have ``wake`` called once, when so many events or bytes are queued.

        Args:
            events: number of events.
            volume: number of bytes; 0 to wait for events alone.

        Returns:
            True if they are there already: then nothing was armed.

        """
        if self._count >= events or (volume and self._bytes + self._others * self._mean >= volume):
            self._wake_events = self._wake_bytes = _NEVER
            return True
        self._wake_events = events
        self._wake_bytes = volume or _NEVER
        return False

    def listen(self):
        """Have ``tell`` called once, at the next event that is refused or given up."""
        self._listening = True

    def take(self, int64_t events, int64_t volume):
        """Take out the oldest events, at most so many and of so many bytes, but at least one if there is any.

        They are in flight until ``settle`` says what became of them.
        """
        cdef list taken = []
        cdef object first
        while self._count and len(taken) < events:
            first = self._slots[self._head]
            volume -= PyBytes_GET_SIZE(first) if PyBytes_CheckExact(first) else self._mean
            if volume < 0 and taken:
                break
            taken.append(self._pop())
        self._in_flight += len(taken)
        if not self._count and self._mask >= LARGEST_KEPT:
            self._slots = [None] * LARGEST_KEPT
            self._mask = LARGEST_KEPT - 1
            self._head = 0
        return taken

    def measured(self, int64_t mean):
        """Take note of the mean size of the events last encoded, in bytes."""
        self._mean = max((3 * self._mean + mean) // 4, 1)

    def settle(self, int64_t count, str outcome):
        """Close the books on events in flight: ``"delivered"``, ``"spooled"`` or the reason of a drop."""
        self._in_flight -= count
        self._enter(count, outcome)

    def settle_spooled(self, int64_t count, str outcome):
        """Close the books on events that were spooled: ``"delivered"`` or the reason of a drop."""
        self._spooled -= count
        self._enter(count, outcome)

    def recover(self, int64_t count):
        """Enter events that an earlier process left in the spool: accepted and spooled."""
        self._accepted += count
        self._recovered += count
        self._spooled += count

    cdef int _enter(self, int64_t count, str outcome) except -1:
        if outcome == "delivered":
            self._delivered += count
        elif outcome == "spooled":
            self._spooled += count
        else:
            self._dropped[outcome] = self._dropped.get(outcome, 0) + count
            self._tell_once()
        return 0

    # -- books --------------------------------------------------------------------------------------------------------

    @property
    def accepted(self):
        """How many events were accepted."""
        return self._accepted

    @property
    def finished(self):
        """How many accepted events were delivered or dropped."""
        return self._accepted - self._count - self._in_flight - self._spooled

    @property
    def left(self):
        """How many accepted events have left memory: delivered, dropped or spooled."""
        return self._accepted - self._count - self._in_flight

    def books(self):
        """Return the books, all of one moment. Safe from any thread."""
        return {
            "accepted": self._accepted,
            "recovered": self._recovered,
            "delivered": self._delivered,
            "spooled": self._spooled,
            "queue_events": self._count + self._in_flight,
            "queue_bytes": self._bytes + self._others * self._mean,
            "in_flight": self._in_flight,
            "dropped": dict(self._dropped),
            "refused": dict(self._refused),
        }
