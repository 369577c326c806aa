"""The event queue alone, on both twins: bounds, counters, callbacks, and a state machine."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import weakref
from collections import deque

import pytest
from event_tools import assert_counters_add_up, queue_module
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bgtasks.events._guard import at_work

FIRST_MEAN = 256


class Calls:
    """Counts the calls of a queue's callbacks."""

    def __init__(self):
        self.due = self.losses = 0

    def on_due(self):
        self.due += 1

    def on_loss(self):
        self.losses += 1


def weightless(event):
    """Return 0 for the memory of any event."""
    return 0


def make(
    module, max_events=10, max_bytes=1 << 20, max_event_bytes=1 << 20, drop_oldest=False, calls=None, measure=weightless
):
    """Return a queue."""
    calls = calls or Calls()
    return module.EventQueue(max_events, max_bytes, max_event_bytes, drop_oldest, calls.on_due, calls.on_loss, measure)


@pytest.fixture
def module(twin):
    """Give the module of the twin's queue."""
    return queue_module(twin)


def test_events_come_out_in_the_order_they_went_in(module):
    """The queue is first in, first out, also around the end of its slots and after it has grown."""
    queue = make(module, max_events=5000)
    expected = deque()
    number = 0
    for step in (100, 300, 700, 1500, 10):
        for _ in range(step):
            assert queue.emit(number)
            expected.append(number)
            number += 1
        for event in queue.pop_batch(step // 2, 1 << 40):
            assert event == expected.popleft()
    assert queue.pop_batch(10_000, 1 << 40) == list(expected)
    assert len(queue) == 0


def test_a_full_queue_refuses_the_newest_and_counts_it(module):
    """Without drop_oldest, a full queue refuses new events."""
    queue = make(module, max_events=3)
    assert [queue.emit(number) for number in range(5)] == [True] * 3 + [False] * 2
    counters = queue.counters()
    assert counters["refused"] == {"full": 2}
    assert counters["dropped"] == {}
    assert queue.pop_batch(9, 1 << 40) == [0, 1, 2]


def test_a_full_queue_drops_the_oldest_and_counts_it(module):
    """With drop_oldest, a full queue drops its oldest events for new ones."""
    queue = make(module, max_events=3, drop_oldest=True)
    assert all(queue.emit(number) for number in range(5))
    counters = queue.counters()
    assert counters["dropped"] == {"full": 2}
    assert queue.pop_batch(9, 1 << 40) == [2, 3, 4]
    assert_counters_add_up(queue.counters())


def test_bytes_bound_the_queue(module):
    """max_bytes bounds the queue as max_events does."""
    queue = make(module, max_bytes=10)
    assert queue.emit(b"12345")
    assert queue.emit(b"12345")
    assert not queue.emit(b"1")
    assert queue.counters()["queue_bytes"] == 10
    queue = make(module, max_bytes=10, drop_oldest=True)
    assert queue.emit(b"123456")
    assert queue.emit(b"abc")
    assert queue.emit(b"12345678")
    assert queue.pop_batch(9, 1 << 40) == [b"12345678"]
    assert queue.counters()["dropped"] == {"full": 2}


def test_an_event_too_large_for_an_empty_queue_drops_no_others(module):
    """drop_oldest drops no events for one that cannot fit."""
    queue = make(module, max_bytes=10, drop_oldest=True)
    queue.emit(b"1234")
    assert not queue.emit(b"x" * 11)
    assert len(queue) == 1


def test_unencoded_events_count_with_the_mean(module):
    """The mean length is updated, also for events that are queued already."""
    queue = make(module, max_bytes=10 * FIRST_MEAN)
    for _ in range(4):
        queue.emit({})
    assert queue.counters()["queue_bytes"] == 4 * FIRST_MEAN
    queue.add_mean(4 * FIRST_MEAN)
    mean = (3 * FIRST_MEAN + 4 * FIRST_MEAN) // 4
    assert queue.counters()["queue_bytes"] == 4 * mean
    queue.emit(b"123")
    assert queue.counters()["queue_bytes"] == 4 * mean + 3
    queue.pop_batch(9, 1 << 40)
    assert queue.counters()["queue_bytes"] == 0


def test_only_an_event_that_is_too_large_is_refused(module):
    """An event longer than max_event_bytes is refused; others are accepted."""
    queue = make(module, max_event_bytes=4)
    assert not queue.emit(b"12345")
    assert queue.emit(b"1234")
    assert queue.counters()["refused"] == {"too_large": 1}


def test_a_closed_queue_refuses_and_keeps_its_events(module):
    """close() refuses new events and keeps the queued ones."""
    queue = make(module)
    queue.emit(1)
    queue.close()
    assert not queue.emit(2)
    assert queue.counters()["refused"] == {"closed": 1}
    assert queue.pop_batch(9, 1 << 40) == [1]
    assert queue.has_capacity()


def test_pop_batch_keeps_its_limits_but_returns_at_least_one(module):
    """pop_batch has two limits, but returns at least one event if there is any."""
    queue = make(module)
    for event in (b"1234", b"5678", b"9"):
        queue.emit(event)
    assert queue.pop_batch(2, 1) == [b"1234"]
    assert queue.pop_batch(2, 5) == [b"5678", b"9"]
    assert queue.pop_batch(2, 5) == []
    assert queue.counters()["in_flight"] == 3


def test_counters_follow_an_event_to_every_outcome(module):
    """account, account_spooled and recover move events between the counters."""
    queue = make(module)
    for number in range(6):
        queue.emit(number)
    queue.pop_batch(5, 1 << 40)
    queue.account(1, "delivered")
    queue.account(1, "rejected")
    queue.account(2, "spooled")
    queue.recover(3)
    queue.account_spooled(1, "delivered")
    queue.account_spooled(1, "spool_full")
    counters = queue.counters()
    assert counters["accepted"] == 9
    assert counters["recovered"] == 3
    assert counters["delivered"] == 2
    assert counters["spooled"] == 3
    assert counters["queue_events"] == 2
    assert counters["dropped"] == {"rejected": 1, "spool_full": 1}
    assert_counters_add_up(counters)
    assert queue.finished == 4


def test_on_due_is_called_once_per_arm(module):
    """on_due is called once per arm, not once per event."""
    calls = Calls()
    queue = make(module, max_events=1000, calls=calls)
    for number in range(100):
        queue.emit(number)
    assert calls.due == 1
    assert queue.arm(50, 0)
    assert not queue.arm(110, 0)
    for number in range(100):
        queue.emit(number)
    assert calls.due == 2
    queue.pop_batch(1000, 1 << 40)
    assert not queue.arm(1000, 10)
    queue.emit(b"123456789")
    assert calls.due == 2
    queue.emit(b"1")
    assert calls.due == 3


def test_on_loss_is_called_once_per_arm_loss(module):
    """on_loss is called once per arm_loss, not once per drop."""
    calls = Calls()
    queue = make(module, max_events=1, calls=calls)
    for number in range(10):
        queue.emit(number)
    assert calls.losses == 1
    queue.arm_loss()
    queue.pop_batch(1, 1)
    queue.account(1, "rejected")
    queue.account(0, "rejected")
    assert calls.losses == 2


def test_a_queue_does_not_feed_itself(module):
    """Events that are emitted in the context of the queue's own flusher are refused, and only these."""
    queue, other = make(module), make(module)
    token = at_work.set(queue)
    try:
        assert not queue.emit(1)
        assert other.emit(1)
    finally:
        at_work.reset(token)
    assert queue.emit(1)
    assert queue.counters()["refused"] == {"feedback": 1}


def test_reset_empties_the_queue(module):
    """reset() empties the queue and its counters, for the child of a fork."""
    queue = make(module)
    queue.emit(1)
    queue.pop_batch(1, 1)
    queue.emit(2)
    queue.reset()
    assert queue.counters()["accepted"] == queue.counters()["queue_events"] == 0
    assert queue.emit(3)
    assert queue.pop_batch(9, 1 << 40) == [3]


class Event:
    """An object that can be referred to weakly, and calls a function when it is freed."""

    def __init__(self, at_end=None):
        self.at_end = at_end

    def __del__(self):
        if self.at_end is not None:
            self.at_end()


def test_events_are_freed(module):
    """Popped and dropped events are freed; the collector frees a cycle through the queue."""
    queue = make(module, max_events=2, drop_oldest=True)
    events = [Event() for _ in range(4)]
    ends = [weakref.ref(event) for event in events]
    for event in events:
        queue.emit(event)
    del event, events
    assert [end() is None for end in ends] == [True, True, False, False]
    queue.pop_batch(9, 1 << 40)
    assert all(end() is None for end in ends)

    class Holder:
        pass

    holder = Holder()
    holder.queue = make(module)
    holder.queue.emit(holder)
    end = weakref.ref(holder)
    del holder
    gc.collect()
    assert end() is None


def test_a_dropped_event_may_emit_when_it_is_freed(module):
    """A dropped event may emit into the queue when it is freed."""
    queue = make(module, max_events=2, drop_oldest=True)
    queue.emit(Event(lambda: queue.emit("late")))
    queue.emit("b")
    queue.emit("c")
    assert list(queue.pop_batch(9, 1 << 40)) == ["c", "late"]
    assert_counters_add_up(queue.counters())


def test_threads_lose_no_event(module):
    """Eight threads emit while one pops: the counters add up, and no event is lost or duplicated."""
    queue = make(module, max_events=500)
    count = 20_000
    accepted = [0] * 8
    done = threading.Event()
    taken = []

    def produce(producer):
        for number in range(count):
            accepted[producer] += queue.emit((producer, number))

    def consume():
        while not done.is_set() or len(queue):
            events = queue.pop_batch(100, 1 << 40)
            taken.extend(events)
            queue.account(len(events), "delivered")
            assert_counters_add_up(queue.counters())

    consumer = threading.Thread(target=consume)
    threads = [threading.Thread(target=produce, args=(producer,)) for producer in range(8)]
    for thread in (consumer, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    consumer.join()
    counters = queue.counters()
    assert counters["accepted"] == counters["delivered"] == len(taken) == len(set(taken)) == sum(accepted)
    assert counters["accepted"] + counters["refused"].get("full", 0) == 8 * count
    for producer in range(8):
        numbers = [number for thread, number in taken if thread == producer]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_wrong_arguments_are_type_errors(module, index):
    """A bound that is no number is refused, at the latest when it is used."""
    arguments = [10, 10, 10]
    arguments[index] = "ten"
    with pytest.raises(TypeError):
        module.EventQueue(*arguments, False, int, int, weightless).emit(b"x")


class QueueMachine(RuleBasedStateMachine):
    """Drives both twins beside a model: a list of events and some counters."""

    def __init__(self):
        super().__init__()
        self.calls = [Calls(), Calls()]
        self.queues = None

    @precondition(lambda self: self.queues is None)
    @rule(max_events=st.integers(1, 12), max_bytes=st.integers(1, 3000), drop_oldest=st.booleans())
    def begin(self, max_events, max_bytes, drop_oldest):
        self.queues = [
            make(queue_module(twin), max_events, max_bytes, 500, drop_oldest, calls)
            for twin, calls in zip(("cython", "python"), self.calls, strict=True)
        ]
        self.expected_events = deque()
        self.mean = FIRST_MEAN
        self.bounds = max_events, max_bytes, drop_oldest
        self.in_flight = self.spooled = self.accepted = self.delivered = 0
        self.dropped, self.refused = {}, {}
        self.closed = False

    def size(self, event):
        return len(event) if isinstance(event, bytes) else self.mean

    def queued_bytes(self):
        return sum(map(self.size, self.expected_events))

    def expected(self, event):
        max_events, max_bytes, drop_oldest = self.bounds
        size = self.size(event)
        if self.closed:
            return "closed"
        if isinstance(event, bytes) and size > 500:
            return "too_large"
        if len(self.expected_events) < max_events and self.queued_bytes() + size <= max_bytes:
            return None
        return None if drop_oldest and size <= max_bytes else "full"

    @precondition(lambda self: self.queues)
    @rule(event=st.one_of(st.binary(max_size=20), st.integers(), st.sampled_from([b"x" * 400, b"x" * 501])))
    def emit(self, event):
        refusal = self.expected(event)
        assert [queue.emit(event) for queue in self.queues] == [refusal is None] * 2
        if refusal is not None:
            self.refused[refusal] = self.refused.get(refusal, 0) + 1
            return
        max_events, max_bytes, _ = self.bounds
        while len(self.expected_events) >= max_events or self.queued_bytes() + self.size(event) > max_bytes:
            self.expected_events.popleft()
            self.dropped["full"] = self.dropped.get("full", 0) + 1
        self.expected_events.append(event)
        self.accepted += 1

    @precondition(lambda self: self.queues)
    @rule(events=st.integers(1, 6), batch_bytes=st.integers(0, 1000))
    def pop_batch(self, events, batch_bytes):
        first, second = (queue.pop_batch(events, batch_bytes) for queue in self.queues)
        assert first == second
        expected = []
        while self.expected_events and len(expected) < events:
            batch_bytes -= self.size(self.expected_events[0])
            if expected and batch_bytes < 0:
                break
            expected.append(self.expected_events.popleft())
        assert first == expected
        self.in_flight += len(first)

    @precondition(lambda self: self.queues and self.in_flight)
    @rule(data=st.data(), outcome=st.sampled_from(["delivered", "spooled", "rejected", "timeout"]))
    def account(self, data, outcome):
        count = data.draw(st.integers(1, self.in_flight))
        for queue in self.queues:
            queue.account(count, outcome)
        self.in_flight -= count
        self.enter(count, outcome)

    @precondition(lambda self: self.queues and self.spooled)
    @rule(data=st.data(), outcome=st.sampled_from(["delivered", "spool_full"]))
    def account_spooled(self, data, outcome):
        count = data.draw(st.integers(1, self.spooled))
        for queue in self.queues:
            queue.account_spooled(count, outcome)
        self.spooled -= count
        self.enter(count, outcome)

    def enter(self, count, outcome):
        if outcome == "delivered":
            self.delivered += count
        elif outcome == "spooled":
            self.spooled += count
        else:
            self.dropped[outcome] = self.dropped.get(outcome, 0) + count

    @precondition(lambda self: self.queues)
    @rule(count=st.integers(1, 5))
    def recover(self, count):
        for queue in self.queues:
            queue.recover(count)
        self.accepted += count
        self.spooled += count

    @precondition(lambda self: self.queues)
    @rule(mean=st.integers(0, 900))
    def measure(self, mean):
        for queue in self.queues:
            queue.add_mean(mean)
        self.mean = max((3 * self.mean + mean) // 4, 1)

    @precondition(lambda self: self.queues)
    @rule(events=st.integers(1, 12), batch_bytes=st.integers(0, 1000))
    def arm(self, events, batch_bytes):
        there = len(self.expected_events) >= events or bool(batch_bytes and self.queued_bytes() >= batch_bytes)
        assert [queue.arm(events, batch_bytes) for queue in self.queues] == [there] * 2

    @precondition(lambda self: self.queues)
    @rule()
    def arm_loss(self):
        for queue in self.queues:
            queue.arm_loss()

    @precondition(lambda self: self.queues)
    @rule(close=st.sampled_from([False] * 9 + [True]))
    def close(self, close):
        if close:
            self.closed = True
            for queue in self.queues:
                queue.close()

    @invariant()
    def counters_agree(self):
        if self.queues is None:
            return
        first, second = (queue.counters() for queue in self.queues)
        assert first == second
        assert_counters_add_up(first)
        assert first["accepted"] == self.accepted == self.queues[0].accepted == self.queues[1].accepted
        assert first["delivered"] == self.delivered
        assert first["spooled"] == self.spooled
        assert first["queue_events"] == len(self.expected_events) + self.in_flight
        assert first["queue_bytes"] == self.queued_bytes()
        assert first["dropped"] == self.dropped
        assert first["refused"] == self.refused
        assert self.queues[0].finished == self.queues[1].finished == self.delivered + sum(self.dropped.values())
        assert self.queues[0].has_capacity() == self.queues[1].has_capacity()
        assert (self.calls[0].due, self.calls[0].losses) == (self.calls[1].due, self.calls[1].losses)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_a_queue_that_was_quiet_refuses_once_closed(module):
    """However far from its bounds it was."""
    queue = make(module, max_events=1000)
    for event in (1, b"2", 3, b"4"):
        assert queue.emit(event)
    queue.close()
    assert [queue.emit(event) for event in (5, b"6")] == [False, False]


@pytest.mark.parametrize("event", [1, b"1"])
def test_a_call_on_a_loop_that_fails_is_repeated_at_the_next_event(module, event):
    """Also without a loop, where the queue was quiet before."""
    calls = []

    def fail():
        calls.append(True)
        raise KeyError

    queue = module.EventQueue(1000, 1 << 20, 1000, False, fail, int, weightless)
    queue.arm_loop()
    for _ in range(5):
        assert queue.emit(event)

    async def emit_on_loop():
        with pytest.raises(KeyError):
            queue.emit(event)

    asyncio.run(emit_on_loop())
    with pytest.raises(KeyError):
        queue.emit(event)
    assert len(calls) == 2


@pytest.mark.parametrize("seed", range(20))
def test_the_twins_agree_over_many_events(seed):
    """A queue that is long enough to be looked at, and whose events differ in size, refuses and calls alike."""
    chance = random.Random(seed)
    calls = [Calls(), Calls()]
    bounds = chance.choice([50, 300, 5000]), chance.choice([20_000, 1 << 20, 64 << 20]), 3000, chance.random() < 0.3
    queues = [
        make(queue_module(twin), *bounds, each, lambda events: 10 * len(events))
        for twin, each in zip(("cython", "python"), calls, strict=True)
    ]
    steps = {
        "emit": lambda queue, size: queue.emit(b"x" * size if size % 3 else size),
        "pop": lambda queue, size: queue.pop_batch(size // 5, 20 * size),
        "arm": lambda queue, size: queue.arm(max(len(queue) + size % 100 - 20, 1), size % 2 * 40 * size),
        "mean": lambda queue, size: queue.add_mean(size),
        "wait": lambda queue, size: queue.arm_loop(),
    }
    for _ in range(300):
        step = chance.choice(["emit"] * 8 + ["pop"] * 3 + ["arm"] * 2 + ["mean", "wait"])
        for _ in range(chance.randrange(1, 90) if step == "emit" else 1):
            size = chance.choice([0, 1, 3, 30, 300, 301, 1000, 3001])
            first, second = (steps[step](queue, size) for queue in queues)
            assert first == second
            assert queues[0].counters() == queues[1].counters()
            assert (calls[0].due, calls[0].losses) == (calls[1].due, calls[1].losses)


def test_a_queue_that_waits_for_a_loop_calls_only_where_one_runs(module):
    """Events outside of loops cost no call; the first one on a loop does, until a flusher has armed the queue."""
    calls = Calls()
    queue = make(module, max_events=1000, calls=calls)
    queue.arm_loop()
    for number in range(200):
        assert queue.emit(number)
    assert calls.due == 0

    async def emit_on_loop():
        assert queue.emit("a")
        assert queue.emit("b")

    asyncio.run(emit_on_loop())
    assert calls.due == 2
    assert not queue.arm(300, 0)
    asyncio.run(emit_on_loop())
    assert calls.due == 2
    for number in range(200):
        queue.emit(number)
    assert calls.due == 3
