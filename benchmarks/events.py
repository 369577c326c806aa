"""Measures the event layer without a server: emit, the way to a sink, JSON lines, memory.

Contenders are interleaved; medians are printed beside the goals (``must``). Run it with nothing else on the machine::

    python benchmarks/events.py                      # everything but flat, a minute
    python benchmarks/events.py emit memory          # some parts: emit, sink, jsonl, paced, size, flat
    python benchmarks/events.py flat --events 100000000

It ends with status 1 if a goal was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import logging
import platform
import resource
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from bgtasks.events import Publisher, Sink, _footprint, publisher
from bgtasks.events.sinks.jsonl import JsonlSink

QUEUES = {"compiled": "bgtasks.events._queue", "twin": "bgtasks.events._queue_py"}
# Emitted between two looks of the loop at its other work.
AT_ONCE = 1000

missed: list[str] = []


class NodeEvent(msgspec.Struct, gc=False):
    """An event whose JSON has 229 bytes."""

    event: str
    event_type: str
    node_name: str
    run_id: str
    thread_id: str
    timestamp: float
    data: str


def node_event(number: int) -> NodeEvent:
    """Return a new event, which shares only the strings that the events of a program would share."""
    return NodeEvent(
        "node_execution",
        "progress",
        "plan",
        "8c5b2c1e-8d0f-4b4e-9a39-6f3c2a9d1e57",
        f"thread-{number:012d}",
        1763681234.123456,
        f"step {number:012d}, some text of a size",
    )


class NullSink(Sink):
    """Takes encoded batches and counts."""

    count = 0

    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Count."""
        self.count += len(batch)


def say(what: str, value: float, unit: str, must: float | None = None, at_most: bool = False) -> None:
    """Print a figure and its goal."""
    line = f"{what:<56} {value:>12,.0f} {unit}"
    if must is not None:
        good = value <= must if at_most else value >= must
        line += f"   must {'<=' if at_most else '>='} {must:,.0f}   {'ok' if good else 'MISSED'}"
        if not good:
            missed.append(what)
    print(line, flush=True)


def use_queue(name: str) -> None:
    """Have publishers use this event queue."""
    module = importlib.import_module(QUEUES[name])
    publisher.EventQueue = module.EventQueue  # type: ignore[misc]
    publisher.footprints = getattr(module, "footprints", _footprint.footprints)


def time_emit(count: int = 100_000, flusher: bool = True) -> float:
    """Return the nanoseconds of one emit of a ready event, the loop around it included.

    Without a flusher it is that of an emit in a thread without an event loop.
    """
    target = Publisher(NullSink(), max_events=1 << 30, max_bytes=1 << 50)
    if flusher:
        # One that sleeps until a batch that never comes: emit alone is timed.
        target._queue.arm(1 << 60, 0)
    event = node_event(1)
    emit = target.emit
    gc.disable()
    # The time of this thread: other threads and programs do not count.
    begin = time.thread_time()
    for _ in range(count):
        emit(event)
    seconds = time.thread_time() - begin
    gc.enable()
    target._after_fork()
    return seconds / count * 1e9


def measure_emit() -> None:
    """Print what emit costs."""
    times: dict[str, list[float]] = {name: [] for name in QUEUES}
    for _ in range(15):
        for name in QUEUES:
            use_queue(name)
            times[name].append(time_emit())
    say("emit, compiled queue", statistics.median(times["compiled"]), "ns", 100, at_most=True)
    say("emit, Python twin", statistics.median(times["twin"]), "ns", 400, at_most=True)
    use_queue("compiled")
    without = statistics.median(time_emit(flusher=False) for _ in range(15))
    say("emit without a loop, compiled queue", without, "ns", 100, at_most=True)


async def flat_out(target: Publisher, events: list[Any], count: int) -> float:
    """Emit as fast as the loop and the queue allow, and flush; return events/s. Nothing is dropped."""
    emit = target.emit
    await target.start()
    begin = time.perf_counter()
    done = 0
    while done < count:
        for event in events:
            while not emit(event):
                await asyncio.sleep(0)
        done += len(events)
        await asyncio.sleep(0)
    await target.flush(60)
    seconds = time.perf_counter() - begin
    stats = target.stats()
    assert stats["delivered"] == done, stats
    await target.close()
    return done / seconds


def measure_throughput(what: str, make: Callable[[], Publisher], must: float, count: int, rounds: int = 5) -> None:
    """Print the throughput on both event queues, of events that are ready."""
    events = [node_event(number) for number in range(AT_ONCE)]
    rates: dict[str, list[float]] = {name: [] for name in QUEUES}
    for _ in range(rounds):
        for name in QUEUES:
            use_queue(name)
            rates[name].append(uvloop.run(flat_out(make(), events, count)))
    say(f"{what}, compiled queue", statistics.median(rates["compiled"]), "events/s", must)
    say(f"{what}, Python twin", statistics.median(rates["twin"]), "events/s")


def measure_sink() -> None:
    """Print how many events are accepted, encoded and handed over."""
    measure_throughput("memory sink, flat out", lambda: Publisher(NullSink()), 1_000_000, 1_000_000)


def measure_jsonl() -> None:
    """Print how many events reach files of JSON lines beside the producing loop."""
    with tempfile.TemporaryDirectory() as folder:
        paths = iter(range(1000))

        def make() -> Publisher:
            for path in Path(folder).iterdir():
                path.unlink()
            return Publisher(JsonlSink(Path(folder) / f"{next(paths)}.jsonl"))

        measure_throughput("JSON lines, flat out", make, 500_000, 1_000_000)


async def paced(target: Publisher, rate: int, seconds: float) -> tuple[float, float]:
    """Offer a rate in ticks of a millisecond; return the share of a CPU and the 99th percentile of the loop's lag."""
    lags = []
    # Not the loop's clock: uvloop's stands still within an iteration.
    clock = time.perf_counter
    begin, cpu = clock(), time.process_time()
    offered = 0
    while (now := clock() - begin) < seconds:
        for _ in range(int(now * rate) - offered):
            target.emit(node_event(offered))
            offered += 1
        before = clock()
        await asyncio.sleep(0.001)
        lags.append(clock() - before - 0.001)
    share = (time.process_time() - cpu) / seconds
    await target.close()
    stats = target.stats()
    assert stats["delivered"] == offered, stats
    return share * 100, statistics.quantiles(lags, n=100)[-1] * 1000


def measure_paced() -> None:
    """Print CPU and lag at a steady rate into JSON lines, building and encoding included."""
    use_queue("compiled")
    with tempfile.TemporaryDirectory() as folder:
        for rate in (100_000, 250_000):
            share, lag = uvloop.run(paced(Publisher(JsonlSink(Path(folder) / f"{rate}.jsonl")), rate, 3.0))
            say(f"JSON lines, {rate:,} offered a second: CPU", share, "%")
            print(f"{'    and the lag of the loop, 99th percentile':<56} {lag:>12.1f} ms")


def measure_size() -> None:
    """Print the memory of a queued event, its own included."""
    size = len(msgspec.json.encode(node_event(1)))
    count = 200_000
    for name in QUEUES:
        use_queue(name)
        gc.collect()
        tracemalloc.start()
        target = Publisher(NullSink(), max_events=count)
        target._queue.arm(1 << 60, 0)
        before = tracemalloc.get_traced_memory()[0]
        for number in range(count):
            assert target.emit(node_event(number))
        used = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        target._after_fork()
        say(f"memory of a queued event of {size} bytes of JSON, {name}", used / count, "bytes", 450, at_most=True)


def resident() -> int:
    """Return the memory of the process now, in bytes; its peak where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()


async def run_flat(count: int) -> None:
    """Send many events through one publisher and look at the memory on the way."""
    use_queue("compiled")
    target = Publisher(NullSink())
    sizes = []
    begin = time.perf_counter()
    step = count // 20
    for _ in range(20):
        for _ in range(step // AT_ONCE):
            for number in range(AT_ONCE):
                while not target.emit(node_event(number)):
                    await asyncio.sleep(0)
            await asyncio.sleep(0)
        sizes.append(resident())
        print(f"    {target.stats()['accepted']:>13,} events, {sizes[-1] / 1e6:.1f} MB resident", flush=True)
    await target.close(60)
    stats = target.stats()
    seconds = time.perf_counter() - begin
    assert stats["accepted"] == stats["delivered"], stats
    say("events sent", stats["delivered"], f"in {seconds:.0f} s")
    # The first step has the queue grow; from then on nothing may.
    say("growth of the memory after the first step", max(sizes[1:]) - sizes[0], "bytes", 4 << 20, at_most=True)


PARTS: dict[str, Callable[[], None]] = {
    "emit": measure_emit,
    "sink": measure_sink,
    "jsonl": measure_jsonl,
    "paced": measure_paced,
    "size": measure_size,
}


def main() -> int:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}, flat; all but flat by default")
    parser.add_argument("--events", type=int, default=10_000_000, help="how many events flat sends")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - {*PARTS, "flat"}
    if unknown:
        parser.error(f"unknown part: {', '.join(sorted(unknown))}")
    # A producer that is faster than the sink has events refused, and tries again: no loss to warn of.
    logging.getLogger("bgtasks.events").setLevel(logging.ERROR)
    print(f"CPython {platform.python_version()}, uvloop {uvloop.__version__}, msgspec {msgspec.__version__}")
    for name in arguments.parts or PARTS:
        if name == "flat":
            uvloop.run(run_flat(arguments.events))
        else:
            PARTS[name]()
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
