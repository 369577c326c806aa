"""Compares the executors with LangGraph's originals and a bare ThreadPoolExecutor, interleaved in one process.

Each round runs every contender once, so a slow moment of the machine hits all of them; what is printed is the median
over the rounds of (time of the other / time of ours), never a single time. Needs ``langgraph``. Run it with nothing
else on the machine::

    python benchmarks/executors.py                  # everything, some three minutes
    python benchmarks/executors.py async            # one part: async, threads, memory

The limit of the sync executor is the hand-over: a future with its lock and condition, a queue and two threads that want
one GIL. ``threads`` prints that limit, too: futures made, queued, taken by one other thread and resolved, nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import queue
import random
import statistics
import threading
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from compare import loops, noop, ratio, run_parts, tick, verdict

from bgtasks import AsyncBackgroundExecutor, BackgroundExecutor, BackgroundTaskManager

try:
    from langgraph.pregel._executor import AsyncBackgroundExecutor as AsyncOriginal
    from langgraph.pregel._executor import BackgroundExecutor as Original
except ImportError:
    raise SystemExit("langgraph is not installed: pip install langgraph") from None

# Work, limit and next tick -> how many times faster than the original it must be.
ASYNC_CASES: list[tuple[str, Callable[[], Awaitable[None]], int | None, bool, float]] = [
    ("trivial", noop, None, False, 2.0),
    ("suspends once", tick, None, False, 1.25),
    ("suspends once, max_concurrency=100", tick, 100, False, 2.0),
    ("trivial, next tick", noop, None, True, 1.5),
    ("suspends once, next tick", tick, None, True, 1.5),
]


async def burst(executor: Any, work: Callable[[], Awaitable[None]], count: int, next_tick: bool) -> float:
    """Run a burst of tasks in an executor's block; return the seconds that took."""
    begin = time.perf_counter()
    async with executor as submit:
        for _ in range(count):
            submit(work, __next_tick__=next_tick)
    return time.perf_counter() - begin


def compare_async(options: argparse.Namespace) -> None:
    """Print how many times faster than LangGraph's the async executor is."""
    print(f"\n## AsyncBackgroundExecutor: bursts of {options.burst}, {options.rounds} rounds; times faster\n")
    for loop_name, run in loops().items():
        for title, work, limit, next_tick, must in ASYNC_CASES:
            times: dict[str, list[float]] = {"original": [], "ours": []}

            async def main(
                work: Any = work, limit: Any = limit, next_tick: Any = next_tick, times: Any = times
            ) -> None:
                config = {} if limit is None else {"max_concurrency": limit}
                manager = BackgroundTaskManager()
                makers: dict[str, Callable[[], Any]] = {
                    "original": lambda: AsyncOriginal(config),
                    "ours": lambda: AsyncBackgroundExecutor(config, manager=manager),
                }
                order = list(makers)
                chance = random.Random(7)
                for round_number in range(options.rounds + 2):
                    chance.shuffle(order)
                    for name in order:
                        took = await burst(makers[name](), work, options.burst, next_tick)
                        if round_number >= 2:
                            times[name].append(took)

            run(main())
            figure = ratio(times, "original", "ours")
            thousands = options.burst / statistics.median(times["ours"]) / 1000
            print(f"  {loop_name:8} {title:36} {figure:6.2f}   ({thousands:.0f}k/s)   {verdict(figure, must)}")


def trivial() -> None:
    """End at once."""


def in_block(make: Callable[[], Any]) -> Callable[[int], None]:
    """Return a contender: an executor whose block gives ``submit``."""

    def run(count: int) -> None:
        with make() as submit:
            for _ in range(count):
                submit(trivial)

    return run


def bare_pool(count: int) -> None:
    """Submit to a bare ThreadPoolExecutor."""
    with ThreadPoolExecutor() as pool:
        submit = pool.submit
        for _ in range(count):
            submit(trivial)


def hand_over(count: int) -> None:
    """Do what no executor of such futures can leave out: make one, hand it over, resolve it there."""
    waiting: queue.SimpleQueue[Future[None] | None] = queue.SimpleQueue()

    def work() -> None:
        while (future := waiting.get()) is not None:
            trivial()
            future.set_result(None)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(count):
        waiting.put(Future())
    waiting.put(None)
    thread.join()


def compare_threads(options: argparse.Namespace) -> None:
    """Print how many times faster than LangGraph's the sync executor is."""
    count = options.functions
    print(f"\n## BackgroundExecutor: {count:,} trivial functions, {options.sync_rounds} rounds; times faster\n")
    contenders: dict[str, Callable[[int], None]] = {
        "LangGraph's": in_block(lambda: Original({})),
        "bare ThreadPoolExecutor": bare_pool,
        "hand-over alone": hand_over,
        "ours": in_block(BackgroundExecutor),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    chance = random.Random(7)
    for round_number in range(options.sync_rounds + 1):
        chance.shuffle(order)
        for name in order:
            gc.collect()
            begin = time.perf_counter()
            contenders[name](count)
            if round_number >= 1:
                times[name].append(time.perf_counter() - begin)
    for name, goal in (
        ("LangGraph's", (1.5, None)),
        ("bare ThreadPoolExecutor", (0.0, 1.0)),
        ("hand-over alone", None),
    ):
        figure = ratio(times, name, "ours")
        thousands = count / statistics.median(times[name]) / 1000
        print(f"  against {name:24} {figure:6.2f}   ({thousands:.0f}k/s)   {verdict(figure, *goal) if goal else ''}")
    print(f"  ours: {count / statistics.median(times['ours']) / 1000:.0f}k/s")


def compare_memory(options: argparse.Namespace) -> None:
    """Print what a queued submission costs, and what is left of finished ones."""
    count = options.queued
    print(f"\n## Memory: {count:,} submissions queued behind one that runs, in bytes each\n")

    async def main() -> None:
        release = asyncio.Event()
        async with AsyncBackgroundExecutor(max_concurrency=1) as submit:
            submit(release.wait)
            gc.collect()
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(count):
                submit(noop)
            gc.collect()
            show("async", (tracemalloc.get_traced_memory()[0] - before) / count)
            tracemalloc.stop()
            release.set()

    def show(name: str, cost: float) -> None:
        print(f"  {name:8} {cost:6.0f}   must at most 1024: {'met' if cost <= 1024 else 'MISSED'}")

    asyncio.run(main())
    release = threading.Event()
    with BackgroundExecutor(max_concurrency=1) as submit:
        submit(release.wait)
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(count):
            submit(trivial)
        gc.collect()
        show("threads", (tracemalloc.get_traced_memory()[0] - before) / count)
        tracemalloc.stop()
        release.set()


def main() -> None:
    """Run the parts asked for."""
    parts: dict[str, Callable[[argparse.Namespace], None]] = {
        "async": compare_async,
        "threads": compare_threads,
        "memory": compare_memory,
    }
    parser = argparse.ArgumentParser(description="Compare executors.")
    parser.add_argument("--burst", type=int, default=1000, help="tasks started before the loop runs them (1000)")
    parser.add_argument("--rounds", type=int, default=101, help="rounds of the part 'async' (101)")
    parser.add_argument("--functions", type=int, default=100_000, help="functions of the part 'threads' (100000)")
    parser.add_argument("--sync-rounds", type=int, default=7, help="rounds of the part 'threads' (7)")
    parser.add_argument("--queued", type=int, default=100_000, help="submissions of the part 'memory' (100000)")
    run_parts(parser, parts)


if __name__ == "__main__":
    main()
