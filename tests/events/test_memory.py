"""max_bytes bounds the memory of a queue, whatever the events are; on both twins."""

from __future__ import annotations

import itertools
import json
import re
import sys
import tracemalloc
from collections import deque
from dataclasses import dataclass

import pytest
from child import child
from event_tools import queue_module
from requirements import need

from bgtasks.events._footprint import footprint, footprints

msgspec = need("msgspec")

MEBIBYTE = 1 << 20


class Struct(msgspec.Struct, gc=False):
    """A Struct into which the garbage collector does not see."""

    name: str
    text: str


class OneField(msgspec.Struct, gc=False):
    """A Struct with one field."""

    text: str


@dataclass
class Data:
    """A dataclass."""

    text: str
    numbers: list[float]


@dataclass(slots=True)
class Slotted:
    """A dataclass with slots."""

    text: str


def long_text(number, size=100_000):
    """Return a new text."""
    return f"{number:010d}" + "x" * size


BURSTS = {
    "one long text": lambda number: {"payload": long_text(number)},
    "long bytes inside": lambda number: {"payload": long_text(number).encode()},
    "nested": lambda number: {"a": {"b": [{"c": long_text(number, 20_000)}, number]}},
    "many numbers": lambda number: {"points": [number + part / 7 for part in range(3000)]},
    "many keys": lambda number: {f"key {part}": number + part / 7 for part in range(500)},
    "rows": lambda number: [{"id": number + part, "value": part / 7} for part in range(100)],
    "small": lambda number: {"event": "order_paid", "order": number, "user": f"user {number}"},
    "struct": lambda number: Struct("name", long_text(number, 5000)),
    "struct of one field": lambda number: OneField(long_text(number, 5000)),
    "dataclass": lambda number: Data(long_text(number, 2000), [number / 7] * 20),
    "slots": lambda number: Slotted(long_text(number, 5000)),
    "text": lambda number: long_text(number, 5000),
    "bytearray": lambda number: bytearray(long_text(number, 5000).encode()),
    "raw": lambda number: OneField(msgspec.Raw(json.dumps(long_text(number, 5000)))),
    "raw in a dict": lambda number: {"payload": msgspec.Raw(json.dumps(long_text(number, 5000)).encode())},
    "tuple": lambda number: ("name", long_text(number, 5000)),
    "alternating": lambda number: {"payload": long_text(number, 50_000 if number % 2 else 10)},
    "one in ten": lambda number: {"payload": long_text(number, 200_000 if number % 10 == 0 else 10)},
    "long after short": lambda number: {"payload": long_text(number, 100_000 if number > 1000 else 10)},
}


def measure_of(twin):
    """Return the function by which a publisher has the queue of a twin measure events."""
    return getattr(queue_module(twin), "footprints", footprints)


def memory_of_burst(queue, make, count):
    """Return the bytes of memory after a burst of events: as many as fit, and then a hundred that are refused."""
    refused = 0
    tracemalloc.start()
    try:
        for number in range(count):
            refused += not queue.emit(make(number))
            if refused == 100:
                break
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("burst", "drop_oldest"), [*((burst, False) for burst in BURSTS), ("one in ten", True), ("long after short", True)]
)
def test_a_burst_takes_at_most_twice_max_bytes_and_a_batch(twin, burst, drop_oldest):
    """Nothing was encoded yet, and no mean is known."""
    limit = 4 * MEBIBYTE
    queue = queue_module(twin).EventQueue(200_000, limit, MEBIBYTE, drop_oldest, int, int, measure_of(twin))
    used = memory_of_burst(queue, BURSTS[burst], 1500 if burst != "small" else 20_000)
    assert used <= 2 * limit + MEBIBYTE
    # It is not refused much too early either.
    assert used >= limit / 2


SMALL = {"event": "order_paid", "order": 123_456, "total": 12.5}
MIXED_BURSTS = {
    "every tenth 500 kB": lambda number: ({**SMALL, "text": "x"}, 500_000 if number % 10 == 0 else 0),
    "every tenth 500 kB, in a struct": lambda number: (Struct("name", "x"), 500_000 if number % 10 == 0 else 0),
    "every tenth 500 kB, nested": lambda number: ({**SMALL, "data": {"a": [{}]}}, 500_000 if number % 10 == 0 else 0),
    "every tenth 500 kB, as bytes": lambda number: ({**SMALL, "text": b"x"}, 500_000 if number % 10 == 0 else 0),
    "every 50th 500 kB": lambda number: ({**SMALL, "text": "x"}, 500_000 if number % 50 == 0 else 0),
    "every 300th 900 kB": lambda number: ({**SMALL, "text": "x"}, 900_000 if number % 300 == 0 else 0),
    "100 kB": lambda number: ({**SMALL, "text": "x"}, 100_000),
    "5 kB": lambda number: ({**SMALL, "text": "x"}, 5000),
    "20 kB after small ones": lambda number: ({**SMALL, "text": "x"}, 20_000 if number > 50_000 else 0),
}


def enlarge(event, size):
    """Put a text of a size into an event."""
    if isinstance(event, Struct):
        event.text = "x" * size
    elif "data" in event:
        event["data"]["a"][0]["text"] = "x" * size
    else:
        event["text"] = event["text"] * size


@pytest.mark.parametrize("burst", MIXED_BURSTS)
def test_large_events_among_small_ones_are_within_the_default_bound(twin, burst):
    """A small share of the events may take most of the memory; the bytes of the large fields alone are counted here."""
    limit = 64 * MEBIBYTE
    queue = queue_module(twin).EventQueue(200_000, limit, MEBIBYTE, False, int, int, measure_of(twin))
    used = 0
    for number in range(200_000):
        event, size = MIXED_BURSTS[burst](number)
        if size:
            enlarge(event, size)
        if not queue.emit(event):
            break
        used += size
    assert used <= 2 * limit + MEBIBYTE
    # It is refused, and not much too early.
    assert number < 199_999
    assert used >= limit / 2


# Prints by how many bytes the memory of the process grows at most, and how many events are accepted.
BURST = """
from pathlib import Path
from bgtasks.events import Publisher
from bgtasks.events.sinks.memory import MemorySink

def resident(name):
    status = Path("/proc/self/status").read_text()
    return int(status.partition(name + ":")[2].split()[0]) * 1024

async def main():
    publisher = Publisher(MemorySink())
    # Everything is loaded, and the flusher has started.
    assert publisher.emit({"number": -1, "payload": "x"})
    await publisher.flush()
    before = resident("VmRSS")
    accepted = sum(publisher.emit({"number": number, "payload": f"{number:0100000}"}) for number in range(5000))
    say(resident("VmHWM") - before, accepted)
    assert (await publisher.close(30))["status"] == "flushed"
    assert publisher.stats()["delivered"] == accepted + 1

asyncio.run(main())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory of a process from /proc")
def test_a_burst_makes_the_process_grow_by_at_most_twice_max_bytes_and_a_batch(twin, tmp_path):
    """A process of its own: this one may have memory that it has freed."""
    with child(tmp_path, BURST, twin, "asyncio") as program:
        assert program.end() == 0, program.output
    # Its log is between the lines.
    [(grown, accepted)] = [map(int, line.split()) for line in program.lines if re.fullmatch(r"\d+ \d+", line)]
    assert grown <= (2 * 64 + 1) * MEBIBYTE
    assert 300 < accepted < 5000


def test_small_events_fill_the_default_queue(twin):
    """As many small events as max_events are accepted."""
    queue = queue_module(twin).EventQueue(200_000, 64 * MEBIBYTE, MEBIBYTE, False, int, int, measure_of(twin))
    assert all(queue.emit({"event": "paid", "order": number}) for number in range(150_000))


@pytest.mark.parametrize(
    "event",
    [
        {"text": "x" * 10_000 + str(1)},
        {"texts": ["x" * 500 + str(number) for number in range(1000)]},
        {"nested": {"a": [{"b": ("x" * 5000, b"y" * 5000)}]}},
        {"parts": [bytearray(5000), {1.5, 2.5}]},
        {f"key {number}": number / 7 for number in range(1000)},
        [number / 7 for number in range(100_000)],
        Struct("name", "x" * 10_001),
        Data("x" * 10_002, [number / 7 for number in range(30)]),
        Slotted("x" * 10_003),
        deque(["x" * 10_004]),
        10**10_000,
        "ü" * 10_000,
    ],
    ids=lambda event: type(event).__name__,
)
def test_the_twins_measure_alike(event):
    """What the compiled function says is near to what Python says of each object."""
    compiled, pure = (measure_of(each)([event]) for each in ("cython", "python"))
    assert pure * 0.7 <= compiled <= pure * 1.4


def test_the_mean_length_does_not_hide_the_memory(twin):
    """Events that become short JSON may take much memory; encoding other ones before changes nothing."""
    limit = 4 * MEBIBYTE
    queue = queue_module(twin).EventQueue(200_000, limit, MEBIBYTE, False, int, int, measure_of(twin))
    queue.add_mean(10)
    for number in itertools.count():
        if not queue.emit({"points": [number + part / 7 for part in range(1000)]}):
            break
        if number % 10 == 9:
            assert queue.pop_batch(4, MEBIBYTE)
            queue.add_mean(10)
        assert number < 1000
    # A batch is no larger than it is said to be either.
    assert len(queue.pop_batch(500, MEBIBYTE // 2)) < 30


def test_a_drained_queue_forgets_the_estimate(twin):
    """Large events of the past do not make the queue refuse small ones."""
    queue = queue_module(twin).EventQueue(10_000, MEBIBYTE, MEBIBYTE, False, int, int, measure_of(twin))
    while queue.emit({"payload": long_text(1)}):
        pass
    while queue.pop_batch(100, MEBIBYTE):
        pass
    assert all(queue.emit({"number": number}) for number in range(3000))


def test_a_measure_that_fails_harms_nothing(twin):
    """An event that cannot be measured is accepted, and on_due is called."""
    calls = []

    def fail(events):
        raise MemoryError

    queue = queue_module(twin).EventQueue(100, MEBIBYTE, MEBIBYTE, False, lambda: calls.append(1), int, fail)
    assert queue.pop_batch(1, 1) == []
    queue.arm(20, 0)
    assert all(queue.emit(number) for number in range(50))
    assert len(calls) == 1

    class Odd:
        def __sizeof__(self):
            raise ValueError

    assert footprint(Odd()) == 0


def test_a_measure_may_emit(twin):
    """Measuring may run other code, which finds a consistent queue."""
    found = deque()

    def measure(events):
        found.append(len(queue))
        queue.emit("from inside")
        return 10

    queue = queue_module(twin).EventQueue(1000, MEBIBYTE, MEBIBYTE, False, int, int, measure)
    for number in range(100):
        assert queue.emit(number)
    counters = queue.counters()
    assert counters["queue_events"] == counters["accepted"] == 100 + len(found)


def test_shared_parts_are_not_counted_for_each_event():
    """A constant that all events refer to is in memory once."""
    constant = {"settings": ["x" * 100_000]}
    events = [{"number": number, "constant": constant} for number in range(20)]
    assert footprint(events[0]) < 1000
    cycle = {"itself": None}
    cycle["itself"] = cycle
    assert footprint(cycle) > 0
