"""The ring alone: bounds, books, what wakes the flusher, on both twins; and a state machine that drives it."""

from __future__ import annotations

import gc
import inspect
import threading
import weakref
from collections import deque

import pytest
from event_tools import assert_books_close, ring_module
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bgtasks.events._guard import at_work

FIRST_MEAN = 256


class Calls:
    """Counts what a ring calls."""

    def __init__(self):
        self.wakes = self.tells = 0

    def wake(self):
        self.wakes += 1

    def tell(self):
        self.tells += 1


def make(module, max_events=10, max_bytes=1 << 20, max_event_bytes=1 << 20, drop_oldest=False, calls=None):
    """Return a ring."""
    calls = calls or Calls()
    return module.Ring(max_events, max_bytes, max_event_bytes, drop_oldest, calls.wake, calls.tell)


@pytest.fixture
def module(twin):
    """Give the module of the twin's ring."""
    return ring_module(twin)


def test_events_come_out_in_the_order_they_went_in(module):
    """First in, first out, also around the end of the places and beyond a growth."""
    ring = make(module, max_events=5000)
    expected = deque()
    number = 0
    for step in (100, 300, 700, 1500, 10):
        for _ in range(step):
            assert ring.emit(number)
            expected.append(number)
            number += 1
        for event in ring.take(step // 2, 1 << 40):
            assert event == expected.popleft()
    assert ring.take(10_000, 1 << 40) == list(expected)
    assert len(ring) == 0


def test_a_full_ring_refuses_the_newest_and_counts_it(module):
    """drop_newest."""
    ring = make(module, max_events=3)
    assert [ring.emit(number) for number in range(5)] == [True] * 3 + [False] * 2
    books = ring.books()
    assert books["refused"] == {"full": 2}
    assert books["dropped"] == {}
    assert ring.take(9, 1 << 40) == [0, 1, 2]


def test_a_full_ring_gives_up_the_oldest_and_counts_it(module):
    """drop_oldest."""
    ring = make(module, max_events=3, drop_oldest=True)
    assert all(ring.emit(number) for number in range(5))
    books = ring.books()
    assert books["dropped"] == {"full": 2}
    assert ring.take(9, 1 << 40) == [2, 3, 4]
    assert_books_close(ring.books())


def test_bytes_bound_the_ring_too(module):
    """Whichever bound comes first."""
    ring = make(module, max_bytes=10)
    assert ring.emit(b"12345")
    assert ring.emit(b"12345")
    assert not ring.emit(b"1")
    assert ring.books()["queue_bytes"] == 10
    ring = make(module, max_bytes=10, drop_oldest=True)
    assert ring.emit(b"123456")
    assert ring.emit(b"abc")
    assert ring.emit(b"12345678")
    assert ring.take(9, 1 << 40) == [b"12345678"]
    assert ring.books()["dropped"] == {"full": 2}


def test_an_event_that_no_empty_ring_could_hold_drops_nothing_for_it(module):
    """drop_oldest does not empty itself in vain."""
    ring = make(module, max_bytes=10, drop_oldest=True)
    ring.emit(b"1234")
    assert not ring.emit(b"x" * 11)
    assert len(ring) == 1


def test_what_is_not_encoded_counts_at_the_mean(module):
    """The mean is learned, and what is queued already counts anew."""
    ring = make(module, max_bytes=10 * FIRST_MEAN)
    for _ in range(4):
        ring.emit({})
    assert ring.books()["queue_bytes"] == 4 * FIRST_MEAN
    ring.measured(4 * FIRST_MEAN)
    mean = (3 * FIRST_MEAN + 4 * FIRST_MEAN) // 4
    assert ring.books()["queue_bytes"] == 4 * mean
    ring.emit(b"123")
    assert ring.books()["queue_bytes"] == 4 * mean + 3
    ring.take(9, 1 << 40)
    assert ring.books()["queue_bytes"] == 0


def test_one_event_too_large_is_refused_alone(module):
    """max_event_bytes."""
    ring = make(module, max_event_bytes=4)
    assert not ring.emit(b"12345")
    assert ring.emit(b"1234")
    assert ring.books()["refused"] == {"too_large": 1}


def test_a_closed_ring_refuses_and_keeps_what_it_has(module):
    """Close."""
    ring = make(module)
    ring.emit(1)
    ring.close()
    assert not ring.emit(2)
    assert ring.books()["refused"] == {"closed": 1}
    assert ring.take(9, 1 << 40) == [1]
    assert ring.has_room()


def test_take_keeps_to_events_and_bytes_but_takes_one_at_least(module):
    """A batch has two limits."""
    ring = make(module)
    for event in (b"1234", b"5678", b"9"):
        ring.emit(event)
    assert ring.take(2, 1) == [b"1234"]
    assert ring.take(2, 5) == [b"5678", b"9"]
    assert ring.take(2, 5) == []
    assert ring.books()["in_flight"] == 3


def test_the_books_follow_an_event_through_every_end(module):
    """settle, settle_spooled and recover."""
    ring = make(module)
    for number in range(6):
        ring.emit(number)
    ring.take(5, 1 << 40)
    ring.settle(1, "delivered")
    ring.settle(1, "rejected")
    ring.settle(2, "spooled")
    ring.recover(3)
    ring.settle_spooled(1, "delivered")
    ring.settle_spooled(1, "spool_full")
    books = ring.books()
    assert books["accepted"] == 9
    assert books["recovered"] == 3
    assert books["delivered"] == 2
    assert books["spooled"] == 3
    assert books["queue_events"] == 2
    assert books["dropped"] == {"rejected": 1, "spool_full": 1}
    assert_books_close(books)
    assert ring.finished == 4
    assert ring.left == 7


def test_the_flusher_is_woken_once_for_each_arm(module):
    """No wake-up an event."""
    calls = Calls()
    ring = make(module, max_events=1000, calls=calls)
    for number in range(100):
        ring.emit(number)
    assert calls.wakes == 1
    assert ring.arm(50, 0)
    assert not ring.arm(110, 0)
    for number in range(100):
        ring.emit(number)
    assert calls.wakes == 2
    ring.take(1000, 1 << 40)
    assert not ring.arm(1000, 10)
    ring.emit(b"123456789")
    assert calls.wakes == 2
    ring.emit(b"1")
    assert calls.wakes == 3


def test_losses_are_told_once_for_each_listen(module):
    """No call a drop."""
    calls = Calls()
    ring = make(module, max_events=1, calls=calls)
    for number in range(10):
        ring.emit(number)
    assert calls.tells == 1
    ring.listen()
    ring.take(1, 1)
    ring.settle(1, "rejected")
    ring.settle(0, "rejected")
    assert calls.tells == 2


def test_a_ring_does_not_feed_itself(module):
    """What is emitted in the context of its own flusher is refused, and only there."""
    ring, other = make(module), make(module)
    token = at_work.set(ring)
    try:
        assert not ring.emit(1)
        assert other.emit(1)
    finally:
        at_work.reset(token)
    assert ring.emit(1)
    assert ring.books()["refused"] == {"feedback": 1}


def test_a_reset_ring_is_a_new_one(module):
    """For the child of a fork."""
    ring = make(module)
    ring.emit(1)
    ring.take(1, 1)
    ring.emit(2)
    ring.reset()
    assert ring.books()["accepted"] == ring.books()["queue_events"] == 0
    assert ring.emit(3)
    assert ring.take(9, 1 << 40) == [3]


class Event:
    """Something that can be referred to weakly, and does something when it ends."""

    def __init__(self, at_end=None):
        self.at_end = at_end

    def __del__(self):
        if self.at_end is not None:
            self.at_end()


def test_events_are_let_go_of(module):
    """Neither a taken nor a given-up event is kept; and a cycle through the ring is the collector's."""
    ring = make(module, max_events=2, drop_oldest=True)
    events = [Event() for _ in range(4)]
    ends = [weakref.ref(event) for event in events]
    for event in events:
        ring.emit(event)
    del event, events
    assert [end() is None for end in ends] == [True, True, False, False]
    ring.take(9, 1 << 40)
    assert all(end() is None for end in ends)

    class Holder:
        pass

    holder = Holder()
    holder.ring = make(module)
    holder.ring.emit(holder)
    end = weakref.ref(holder)
    del holder
    gc.collect()
    assert end() is None


def test_an_event_whose_end_emits_finds_a_ring_in_order(module):
    """The end of a given-up event may come back into the ring."""
    ring = make(module, max_events=2, drop_oldest=True)
    ring.emit(Event(lambda: ring.emit("late")))
    ring.emit("b")
    ring.emit("c")
    assert list(ring.take(9, 1 << 40)) == ["c", "late"]
    assert_books_close(ring.books())


def test_threads_lose_nothing(module):
    """Eight threads emit while one takes: the books close, nothing is there twice."""
    ring = make(module, max_events=500)
    count = 20_000
    accepted = [0] * 8
    done = threading.Event()
    taken = []

    def produce(place):
        for number in range(count):
            accepted[place] += ring.emit((place, number))

    def consume():
        while not done.is_set() or len(ring):
            events = ring.take(100, 1 << 40)
            taken.extend(events)
            ring.settle(len(events), "delivered")
            assert_books_close(ring.books())

    consumer = threading.Thread(target=consume)
    threads = [threading.Thread(target=produce, args=(place,)) for place in range(8)]
    for thread in (consumer, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    consumer.join()
    books = ring.books()
    assert books["accepted"] == books["delivered"] == len(taken) == len(set(taken)) == sum(accepted)
    assert books["accepted"] + books["refused"].get("full", 0) == 8 * count
    for place in range(8):
        numbers = [number for thread, number in taken if thread == place]
        assert numbers == sorted(numbers)


def test_the_twins_look_alike():
    """The same methods, signatures and docstrings."""
    first, second = (ring_module(twin).Ring for twin in ("cython", "python"))
    assert inspect.getdoc(first) == inspect.getdoc(second)
    names = {
        name
        for name, member in vars(second).items()
        if not name.startswith("_") and not inspect.ismemberdescriptor(member)
    }
    assert names == {name for name in vars(first) if not name.startswith("_")}
    for name in names:
        one, other = vars(first)[name], vars(second)[name]
        assert inspect.getdoc(one) == inspect.getdoc(other), name
        assert inspect.getdoc(one), name
        if callable(other):
            assert list(inspect.signature(one).parameters) == list(inspect.signature(other).parameters), name


@pytest.mark.parametrize("place", [0, 1, 2])
def test_wrong_arguments_are_type_errors(module, place):
    """A bound that is no number is refused at the latest when it is used."""
    arguments = [10, 10, 10]
    arguments[place] = "ten"
    with pytest.raises(TypeError):
        module.Ring(*arguments, False, int, int).emit(b"x")


class RingMachine(RuleBasedStateMachine):
    """Drives both twins at once beside a model that is a list of events and a handful of counters."""

    def __init__(self):
        super().__init__()
        self.calls = [Calls(), Calls()]
        self.rings = None

    @precondition(lambda self: self.rings is None)
    @rule(max_events=st.integers(1, 12), max_bytes=st.integers(1, 3000), drop_oldest=st.booleans())
    def begin(self, max_events, max_bytes, drop_oldest):
        self.rings = [
            make(ring_module(twin), max_events, max_bytes, 500, drop_oldest, calls)
            for twin, calls in zip(("cython", "python"), self.calls, strict=True)
        ]
        self.queue = deque()
        self.mean = FIRST_MEAN
        self.bounds = max_events, max_bytes, drop_oldest
        self.in_flight = self.spooled = self.accepted = self.delivered = 0
        self.dropped, self.refused = {}, {}
        self.closed = False

    def size(self, event):
        return len(event) if isinstance(event, bytes) else self.mean

    def volume(self):
        return sum(map(self.size, self.queue))

    def expected(self, event):
        max_events, max_bytes, drop_oldest = self.bounds
        size = self.size(event)
        if self.closed:
            return "closed"
        if isinstance(event, bytes) and size > 500:
            return "too_large"
        if len(self.queue) < max_events and self.volume() + size <= max_bytes:
            return None
        return None if drop_oldest and size <= max_bytes else "full"

    @precondition(lambda self: self.rings)
    @rule(event=st.one_of(st.binary(max_size=20), st.integers(), st.sampled_from([b"x" * 400, b"x" * 501])))
    def emit(self, event):
        refusal = self.expected(event)
        assert [ring.emit(event) for ring in self.rings] == [refusal is None] * 2
        if refusal is not None:
            self.refused[refusal] = self.refused.get(refusal, 0) + 1
            return
        max_events, max_bytes, _ = self.bounds
        while len(self.queue) >= max_events or self.volume() + self.size(event) > max_bytes:
            self.queue.popleft()
            self.dropped["full"] = self.dropped.get("full", 0) + 1
        self.queue.append(event)
        self.accepted += 1

    @precondition(lambda self: self.rings)
    @rule(events=st.integers(1, 6), volume=st.integers(0, 1000))
    def take(self, events, volume):
        first, second = (ring.take(events, volume) for ring in self.rings)
        assert first == second
        expected = []
        while self.queue and len(expected) < events:
            volume -= self.size(self.queue[0])
            if expected and volume < 0:
                break
            expected.append(self.queue.popleft())
        assert first == expected
        self.in_flight += len(first)

    @precondition(lambda self: self.rings and self.in_flight)
    @rule(data=st.data(), outcome=st.sampled_from(["delivered", "spooled", "rejected", "deadline"]))
    def settle(self, data, outcome):
        count = data.draw(st.integers(1, self.in_flight))
        for ring in self.rings:
            ring.settle(count, outcome)
        self.in_flight -= count
        self.enter(count, outcome)

    @precondition(lambda self: self.rings and self.spooled)
    @rule(data=st.data(), outcome=st.sampled_from(["delivered", "spool_full"]))
    def settle_spooled(self, data, outcome):
        count = data.draw(st.integers(1, self.spooled))
        for ring in self.rings:
            ring.settle_spooled(count, outcome)
        self.spooled -= count
        self.enter(count, outcome)

    def enter(self, count, outcome):
        if outcome == "delivered":
            self.delivered += count
        elif outcome == "spooled":
            self.spooled += count
        else:
            self.dropped[outcome] = self.dropped.get(outcome, 0) + count

    @precondition(lambda self: self.rings)
    @rule(count=st.integers(1, 5))
    def recover(self, count):
        for ring in self.rings:
            ring.recover(count)
        self.accepted += count
        self.spooled += count

    @precondition(lambda self: self.rings)
    @rule(mean=st.integers(0, 900))
    def measure(self, mean):
        for ring in self.rings:
            ring.measured(mean)
        self.mean = max((3 * self.mean + mean) // 4, 1)

    @precondition(lambda self: self.rings)
    @rule(events=st.integers(1, 12), volume=st.integers(0, 1000))
    def arm(self, events, volume):
        there = len(self.queue) >= events or bool(volume and self.volume() >= volume)
        assert [ring.arm(events, volume) for ring in self.rings] == [there] * 2

    @precondition(lambda self: self.rings)
    @rule()
    def listen(self):
        for ring in self.rings:
            ring.listen()

    @precondition(lambda self: self.rings)
    @rule(close=st.sampled_from([False] * 9 + [True]))
    def close(self, close):
        if close:
            self.closed = True
            for ring in self.rings:
                ring.close()

    @invariant()
    def books_agree(self):
        if self.rings is None:
            return
        first, second = (ring.books() for ring in self.rings)
        assert first == second
        assert_books_close(first)
        assert first["accepted"] == self.accepted == self.rings[0].accepted == self.rings[1].accepted
        assert first["delivered"] == self.delivered
        assert first["spooled"] == self.spooled
        assert first["queue_events"] == len(self.queue) + self.in_flight
        assert first["queue_bytes"] == self.volume()
        assert first["dropped"] == self.dropped
        assert first["refused"] == self.refused
        assert self.rings[0].finished == self.rings[1].finished == self.delivered + sum(self.dropped.values())
        assert self.rings[0].has_room() == self.rings[1].has_room()
        assert (self.calls[0].wakes, self.calls[0].tells) == (self.calls[1].wakes, self.calls[1].tells)


TestRingMachine = RingMachine.TestCase
TestRingMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
