"""Measures what the options of ``submit`` cost beside ``create_task``, and what schedules cost the processor.

Each round runs every contender once, in an order that changes from round to round; what is printed is the median over
the rounds of (time of ``create_task`` / time of the contender), never a single time. Schedules are compared with the
same ticks of bare ``call_later`` and ``create_task``. Each goal is MET or MISSED: a "must" holds for the compiled
twin, an "aim" for the Python twin, and a missed "must" is the exit code 1. Run it with nothing else on the machine::

    python benchmarks/policies.py [--rounds 40] [--schedules 10000] [--seconds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

from twins import manager_module

from bgtasks import Retry

TASKS = 2000
RETRY = Retry(on=ValueError)


async def noop() -> None:
    """End at once."""


async def tick() -> None:
    """Suspend once."""
    await asyncio.sleep(0)


# What each contender calls for the task with a number, and its least ratio.
CONTENDERS: dict[str, tuple[Callable[[Any, Any, int], object], float | None]] = {
    "create_task": (lambda manager, work, number: manager.create_task(work()), None),
    "submit": (lambda manager, work, number: manager.submit(work), None),
    "submit, retry": (lambda manager, work, number: manager.submit(work, retry=RETRY), 0.90),
    "submit, key": (lambda manager, work, number: manager.submit(work, key=number), 0.75),
    "submit, keep_result": (lambda manager, work, number: manager.submit(work, keep_result=0.001), None),
}


async def seconds_of(manager: Any, work: Any, start: Callable[[Any, Any, int], object]) -> float:
    """Return the seconds that a burst of tasks takes."""
    begun = time.perf_counter()
    for number in range(TASKS):
        start(manager, work, number)
    while manager.get_task_count():
        await asyncio.sleep(0)
    return time.perf_counter() - begun


def judge(twin: str, text: str, goal: float, is_met: bool) -> bool:
    """Print a figure with its goal; return False if it must be met and is not."""
    word = "must" if twin == "cython" else "aim"
    print(f"{text}   ({word}: {goal:g}, {'MET' if is_met else 'MISSED'})")
    return is_met or word == "aim"


async def compare(twin: str, rounds: int) -> bool:
    """Print the ratios of one twin; return whether it met all that it must."""
    is_met = True
    for work in (noop, tick):
        times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        manager = manager_module(twin).BackgroundTaskManager()
        names = list(CONTENDERS)
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                gc.collect()
                times[name].append(await seconds_of(manager, work, CONTENDERS[name][0]))
        for name, (_start, goal) in CONTENDERS.items():
            pairs = zip(times["create_task"], times[name], strict=True)
            ratio = statistics.median(plain / own for plain, own in pairs)
            text = f"{twin:7} {work.__name__:5} {name:20} {ratio:.2f}x"
            if goal is None:
                print(text)
            else:
                is_met &= judge(twin, text, goal, ratio >= goal)
    return is_met


async def share_of(seconds: float) -> float:
    """Return the share of a core that this process uses for some seconds."""
    used = time.process_time()
    await asyncio.sleep(seconds)
    return (time.process_time() - used) / seconds


async def share_of_bare_loop(count: int, seconds: float) -> float:
    """Return the share of a core of as many ticks of the loop, each of which starts a task."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()
    is_over = False

    def begin() -> None:
        if not is_over:
            task = loop.create_task(noop())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            loop.call_later(1.0, begin)

    for number in range(count):
        loop.call_later(number / count, begin)
    await asyncio.sleep(1.5)
    share = await share_of(seconds)
    is_over = True
    await asyncio.sleep(1.5)
    return share


async def repeat(twin: str, count: int, seconds: float) -> bool:
    """Print what schedules of one second cost, and how late their ticks are; return whether they met what they must."""
    bare = await share_of_bare_loop(count, seconds)
    manager = manager_module(twin).BackgroundTaskManager()
    loop = asyncio.get_running_loop()
    late: list[float] = []

    async def run(begun: float) -> None:
        late.append((time.monotonic() - begun) % 1.0)

    def begin() -> None:
        manager.every(1.0, run, time.monotonic())

    for number in range(count):
        loop.call_later(number / count, begin)
    await asyncio.sleep(1.5)
    late.clear()
    share = await share_of(seconds)
    await manager.shutdown()
    p99 = statistics.quantiles(late, n=100)[98]
    text = f"{twin:7} {count} schedules of 1 s: {share:.1%} of a core, a bare loop {bare:.1%}"
    is_met = judge(twin, text, 0.05, share < 0.05)
    text = f"{twin:7} {len(late)} ticks, late by {p99 * 1000:.2f} ms at p99"
    return judge(twin, text, 0.002, p99 < 0.002) and is_met


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    is_met = True
    for twin in ("cython", "python"):
        is_met &= asyncio.run(compare(twin, options.rounds))
        is_met &= asyncio.run(repeat(twin, options.schedules, options.seconds))
    sys.exit(not is_met)


if __name__ == "__main__":
    main()
