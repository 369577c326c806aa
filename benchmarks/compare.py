"""Compares ways to run background tasks, interleaved in one process, and prints medians of ratios.

Each round runs every contender once, so a slow moment of the machine hits all of them; what is printed is the median
over the rounds of (time of the bare task / time of the contender), never a single time. Run it with nothing else on the
machine::

    python benchmarks/compare.py            # everything, some five minutes
    python benchmarks/compare.py tasks      # one part: tasks, agentflow, scale, memory, shutdown, info

The parts print the goals beside the figures: ``must`` is the floor, ``aim`` what we work towards.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import platform
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

from internals import tasks_of
from twins import manager_module

Contender = Callable[[Callable[[], Coroutine[Any, Any, Any]], int], Awaitable[float]]

# The time of this thread: what other programs of the machine take does not count, and nothing here waits.
clock = time.thread_time

CONTEXT = {"user": "alice", "order": 7}
TIMEOUT = 30.0


async def noop() -> None:
    """End at once."""


async def tick() -> None:
    """Suspend once."""
    await asyncio.sleep(0)


async def run_until_idle(until: Callable[[], bool] | None = None) -> None:
    """Let a burst of tasks end."""
    for _ in range(3):
        await asyncio.sleep(0)
    while until is not None and not until():
        await asyncio.sleep(0)


# -- contenders: each starts `count` tasks, waits for their end and returns the seconds that took ---------------------


async def bare(work: Callable[[], Coroutine[Any, Any, Any]], count: int) -> float:
    """Run bare tasks: nothing keeps, names or times them."""
    create_task = asyncio.get_running_loop().create_task
    begin = clock()
    for _ in range(count):
        create_task(work())
    await run_until_idle()
    return clock() - begin


async def recipe(work: Callable[[], Coroutine[Any, Any, Any]], count: int) -> float:
    """Run tasks by the recipe of asyncio's documentation: a set, and a done callback that discards."""
    create_task = asyncio.get_running_loop().create_task
    tasks: set[asyncio.Task[Any]] = set()
    begin = clock()
    for _ in range(count):
        task = create_task(work())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await run_until_idle(lambda: not tasks)
    return clock() - begin


async def recipe_with_timeout(work: Callable[[], Coroutine[Any, Any, Any]], count: int) -> float:
    """Run tasks by the recipe with a timeout as written by hand: call_later, cancelled at the end."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[Any]] = set()

    def start() -> None:
        task = loop.create_task(work(), name="event")
        tasks.add(task)
        timer = loop.call_later(TIMEOUT, task.cancel)

        def done(task: asyncio.Task[Any]) -> None:
            timer.cancel()
            tasks.discard(task)

        task.add_done_callback(done)

    begin = clock()
    for _ in range(count):
        start()
    await run_until_idle(lambda: not tasks)
    return clock() - begin


def creates(manager: Any, **options: Any) -> Contender:
    """Return a contender: create_task with these options."""

    async def run(work: Callable[[], Coroutine[Any, Any, Any]], count: int) -> float:
        begin = clock()
        if options:
            for _ in range(count):
                manager.create_task(work(), name="event", timeout=TIMEOUT, context=CONTEXT)
        else:
            for _ in range(count):
                manager.create_task(work())
        await run_until_idle()
        return clock() - begin

    return run


def creates_with_different_timeouts(manager: Any) -> Contender:
    """Return a contender: create_task, no two timeouts alike."""
    chance = random.Random(7)
    timeouts = [chance.uniform(5, 60) for _ in range(100_000)]

    async def run(work: Callable[[], Coroutine[Any, Any, Any]], count: int) -> float:
        begin = clock()
        for timeout in timeouts[:count]:
            manager.create_task(work(), name="event", timeout=timeout, context=CONTEXT)
        await run_until_idle()
        return clock() - begin

    return run


def fires(manager: Any) -> Contender:
    """Return a contender: fire with name, timeout and context."""

    async def run(work: Callable[[], Coroutine[Any, Any, Any]], count: int) -> float:
        begin = clock()
        for _ in range(count):
            manager.fire(work(), name="event", timeout=TIMEOUT, context=CONTEXT)
        await run_until_idle()
        return clock() - begin

    return run


def sustained(manager: Any, timeout: float | None, burst: int) -> Contender:
    """Return a contender: bursts through one manager, agentflow's or ours, until ``count`` tasks have ended."""

    async def run(work: Callable[[], Coroutine[Any, Any, Any]], count: int) -> float:
        begin = clock()
        for _ in range(count // burst):
            for _ in range(burst):
                manager.create_task(work(), name="event", timeout=timeout, context=CONTEXT)
            await run_until_idle(lambda: manager.get_task_count() == 0)
        took = clock() - begin
        # Its timeouts are tasks that outlive their targets; the next contender shall not pay for them.
        current = asyncio.current_task()
        for task in asyncio.all_tasks():
            if task is not current:
                task.cancel()
        await run_until_idle()
        return took

    return run


async def race(
    contenders: dict[str, Contender], work: Callable[[], Coroutine[Any, Any, Any]], count: int, rounds: int
) -> dict[str, list[float]]:
    """Run the contenders in turn, in another order each round; return their times."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    chance = random.Random(7)
    for round_number in range(rounds + 2):
        chance.shuffle(order)
        for name in order:
            took = await contenders[name](work, count)
            # The first rounds warm caches and specialise bytecode.
            if round_number >= 2:
                times[name].append(took)
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    """Return the median of over / under, round by round."""
    return statistics.median(first / second for first, second in zip(times[over], times[under], strict=True))


def loops() -> dict[str, Callable[[Coroutine[Any, Any, None]], None]]:
    """Return the loops there are: name -> run function."""
    runs: dict[str, Callable[[Coroutine[Any, Any, None]], None]] = {"asyncio": asyncio.run}
    try:
        import uvloop
    except ImportError:
        print("uvloop is not installed: its columns are left out")
    else:
        runs["uvloop"] = uvloop.run
    return runs


GOALS: dict[tuple[str, str, str], tuple[float, float]] = {
    ("create_task, name + timeout + context", "asyncio", "noop"): (0.82, 0.95),
    ("create_task, name + timeout + context", "uvloop", "noop"): (0.74, 0.90),
    ("create_task, name + timeout + context", "asyncio", "tick"): (0.92, 1.00),
    ("create_task, name + timeout + context", "uvloop", "tick"): (0.80, 0.95),
    ("fire, name + timeout + context", "asyncio", "noop"): (2.0, 2.6),
    ("fire, name + timeout + context", "uvloop", "noop"): (1.5, 2.2),
}
RECIPE_GOALS = {"asyncio": (2.4, 3.0), "uvloop": (1.8, 2.3)}


def verdict(figure: float, must: float, aim: float | None = None) -> str:
    """Return the goal beside a figure."""
    text = f"must {must:g}" + ("" if aim is None else f", aim {aim:g}")
    return f"{text}: {'met' if figure >= must else 'MISSED'}"


def compare_tasks(burst: int, rounds: int) -> None:
    """Print what a task costs against a bare one, on both twins and both loops."""
    print(f"\n## Tasks: bursts of {burst}, {rounds} rounds; ratio to bare loop.create_task (higher is faster)\n")
    for loop_name, run in loops().items():
        compiled = manager_module("cython").BackgroundTaskManager()
        twin = manager_module("python").BackgroundTaskManager()
        contenders: dict[str, Contender] = {
            "bare": bare,
            "recipe: set + discard": recipe,
            "recipe + call_later": recipe_with_timeout,
            "create_task": creates(compiled),
            "create_task, name + timeout + context": creates(compiled, full=True),
            "create_task, every timeout different": creates_with_different_timeouts(compiled),
            "fire, name + timeout + context": fires(compiled),
            "Python twin: create_task, name + timeout + context": creates(twin, full=True),
            "Python twin: fire, name + timeout + context": fires(twin),
        }
        for work in (noop, tick):
            times: dict[str, list[float]] = {}

            async def main(work: Any = work, contenders: Any = contenders, times: Any = times) -> None:
                times.update(await race(contenders, work, burst, rounds))

            run(main())
            thousands = burst / statistics.median(times["bare"]) / 1000
            print(f"{loop_name}, {work.__name__} (bare: some {thousands:.0f}k tasks/s)")
            for name in contenders:
                figure = ratio(times, "bare", name)
                goal = GOALS.get((name, loop_name, work.__name__))
                print(f"  {name:52} {figure:6.3f}   {verdict(figure, *goal) if goal else ''}")
            full = "create_task, name + timeout + context"
            spread = ratio(times, full, "create_task, every timeout different")
            print(f"  {'different timeouts against equal ones':52} {spread:6.3f}   {verdict(spread, 0.93)}")
            if work is noop:
                figure = ratio(times, "recipe + call_later", full)
                goal = RECIPE_GOALS[loop_name]
                print(f"  {'create_task against recipe + call_later':52} {figure:6.3f}   {verdict(figure, *goal)}")
            print()


def compare_agentflow(count: int, burst: int, rounds: int) -> None:
    """Print how many times faster than agentflow's manager both twins are."""
    print(f"\n## agentflow's manager: {count} tasks in bursts of {burst}, {rounds} rounds; how many times faster\n")
    try:
        from agentflow.utils.background_task_manager import BackgroundTaskManager as Original
    except ImportError:
        print("agentflow is not installed (pip install 10xscale-agentflow, Python 3.12 or newer)")
        return
    for loop_name, run in loops().items():
        compiled = manager_module("cython").BackgroundTaskManager()
        twin = manager_module("python").BackgroundTaskManager()
        contenders: dict[str, Contender] = {
            "original": sustained(Original(max_pending_tasks=0), None, burst),
            "original with timeout": sustained(Original(max_pending_tasks=0), TIMEOUT, burst),
            "compiled": sustained(compiled, None, burst),
            "compiled with timeout": sustained(compiled, TIMEOUT, burst),
            "python": sustained(twin, None, burst),
            "python with timeout": sustained(twin, TIMEOUT, burst),
        }
        times: dict[str, list[float]] = {}

        async def main(contenders: Any = contenders, times: Any = times) -> None:
            times.update(await race(contenders, noop, count, rounds))

        run(main())
        musts = {"compiled": (2.5 if loop_name == "asyncio" else 2.3, 10.0), "python": (1.0, 4.0)}
        for name, (plain, with_timeout) in musts.items():
            for suffix, must in (("", plain), (" with timeout", with_timeout)):
                figure = ratio(times, f"original{suffix}", f"{name}{suffix}")
                print(f"  {loop_name:8} {name + suffix:22} {figure:7.2f} x   {verdict(figure, must)}")


def compare_scale(in_flight: int, rounds: int) -> None:
    """Print what a task costs while many others are in flight, against its cost with a thousand."""
    print(f"\n## Scale: cost of a task with {in_flight:,} in flight / with 1,000 (lower is better)\n")
    for loop_name, run in loops().items():
        for name in ("bare", "compiled"):
            figure = 0.0

            async def main(name: str = name) -> None:
                nonlocal figure
                manager = manager_module("cython").BackgroundTaskManager(default_shutdown_timeout=600)
                loop = asyncio.get_running_loop()
                contender = bare if name == "bare" else creates(manager, full=True)
                release = asyncio.Event()
                kept: set[asyncio.Task[Any]] = set()

                def fill(count: int) -> None:
                    for _ in range(count):
                        if name == "bare":
                            kept.add(loop.create_task(release.wait()))
                        else:
                            manager.create_task(release.wait(), name="waits", timeout=3600, context=CONTEXT)

                async def cost() -> float:
                    gc.collect()
                    return statistics.median([await contender(noop, 1000) for _ in range(rounds)])

                fill(1000)
                await run_until_idle()
                few = await cost()
                fill(in_flight - 1000)
                await run_until_idle()
                figure = await cost() / few
                release.set()
                await run_until_idle(lambda: len(asyncio.all_tasks()) == 1)

            run(main())
            goal = "" if name == "bare" else f"must at most 1.25: {'met' if figure <= 1.25 else 'MISSED'}"
            print(f"  {loop_name:8} {name:9} {figure:6.3f}   {goal}")


async def bytes_per_task(start: Callable[[Coroutine[Any, Any, Any]], Any], count: int) -> tuple[float, float]:
    """Return the memory of a task in flight, its coroutine included, and what is left of it when all have ended."""
    release = asyncio.Event()
    # Asyncio's set of all tasks grows once and never shrinks: that is no memory of either.
    await asyncio.gather(*[noop() for _ in range(count)])
    start(noop())
    await run_until_idle()
    gc.collect()
    kept: list[Any] = [None] * count  # made before, so that it does not count
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(count):
        kept[number] = start(release.wait())
    await run_until_idle()
    gc.collect()
    held = tracemalloc.get_traced_memory()[0] - before
    release.set()
    kept.clear()
    await run_until_idle(lambda: len(asyncio.all_tasks()) == 1)
    gc.collect()
    left = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return held / count, left / count


def compare_memory(count: int) -> None:
    """Print the memory of a task in flight above a bare one, and what is left when all have ended."""
    print(f"\n## Memory of a task in flight, {count:,} of them, above a bare task\n")

    async def of_bare() -> tuple[float, float]:
        return await bytes_per_task(asyncio.get_running_loop().create_task, count)

    def of_manager(twin: str) -> Callable[[], Awaitable[tuple[float, float]]]:
        async def run() -> tuple[float, float]:
            manager = manager_module(twin).BackgroundTaskManager()

            def start(coro: Coroutine[Any, Any, Any]) -> Any:
                return manager.create_task(coro, name="event", timeout=3600.0, context=CONTEXT)

            return await bytes_per_task(start, count)

        return run

    base, _ = asyncio.run(of_bare())
    print(f"  bare task: {base:.0f} bytes")
    for twin in ("cython", "python"):
        held, left = asyncio.run(of_manager(twin)())
        goal = f"must at most 450: {'met' if held - base <= 450 else 'MISSED'}" if twin == "cython" else ""
        print(f"  {twin:7} {held - base:6.0f} bytes more, {left:.2f} left afterwards   {goal}")


def compare_shutdown(count: int, rounds: int) -> None:
    """Print the time of shutdown against cancelling and awaiting as many bare tasks."""
    print(
        f"\n## shutdown() of {count:,} sleeping tasks / cancelling and awaiting as many bare ones (lower is better)\n"
    )
    for loop_name, run in loops().items():
        ratios: list[float] = []

        async def main(ratios: list[float] = ratios) -> None:
            loop = asyncio.get_running_loop()
            for _ in range(rounds):
                tasks = [loop.create_task(asyncio.sleep(3600)) for _ in range(count)]
                await run_until_idle()
                begin = clock()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                bare_time = clock() - begin
                del task
                tasks.clear()
                gc.collect()
                manager = manager_module("cython").BackgroundTaskManager(default_shutdown_timeout=600)
                for _ in range(count):
                    manager.create_task(asyncio.sleep(3600), name="sleeps", timeout=7200, context=CONTEXT)
                await run_until_idle()
                begin = clock()
                stats = await manager.shutdown()
                ratios.append((clock() - begin) / bare_time)
                assert stats["completed_tasks"] == count
                gc.collect()

        run(main())
        figure = statistics.median(ratios)
        print(f"  {loop_name:8} {figure:6.3f}   must at most 1.5: {'met' if figure <= 1.5 else 'MISSED'}")


def compare_info(count: int, rounds: int) -> None:
    """Print the time of get_task_info against building as many dicts by hand from a dict of metadata."""
    print(f"\n## get_task_info() of {count:,} tasks / a list of dicts from a dict of tasks, as agentflow has it\n")

    async def main() -> None:
        manager = manager_module("cython").BackgroundTaskManager()
        release = asyncio.Event()
        for _ in range(count):
            manager.create_task(release.wait(), name="event", timeout=3600.0, context=CONTEXT)
        await run_until_idle()
        metadata = dict.fromkeys(tasks_of(manager), ("event", time.time(), 3600.0, CONTEXT))
        ratios = []
        for _ in range(rounds):
            begin = clock()
            now = time.time()
            by_hand = [
                {
                    "name": name,
                    "age_seconds": now - created,
                    "timeout": timeout,
                    "context": context,
                    "done": task.done(),
                    "cancelled": task.cancelled() if task.done() else False,
                }
                for task, (name, created, timeout, context) in metadata.items()
            ]
            middle = clock()
            info = manager.get_task_info()
            ratios.append((clock() - middle) / (middle - begin))
            assert len(info) == len(by_hand) == count
            del info, by_hand
        print(f"  compiled {statistics.median(ratios):6.3f}   (with id, state and coroutine name besides)")
        release.set()
        await manager.wait_for_all()

    asyncio.run(main())


def run_parts(parser: argparse.ArgumentParser, parts: dict[str, Callable[[argparse.Namespace], None]]) -> None:
    """Run the parts that the command line names, or all of them, with the options that it gives."""
    parser.add_argument("part", nargs="*", help=f"parts to run: {', '.join(parts)}; all by default")
    options = parser.parse_args()
    unknown = set(options.part) - set(parts)
    if unknown:
        parser.error(f"unknown part: {', '.join(sorted(unknown))}")
    print(f"# CPython {platform.python_version()}, {platform.machine()}")
    for name in options.part or parts:
        parts[name](options)


def main() -> None:
    """Run the parts asked for."""
    parts: dict[str, Callable[[argparse.Namespace], None]] = {
        "tasks": lambda options: compare_tasks(options.burst, options.rounds),
        "agentflow": lambda options: compare_agentflow(100_000, options.burst, 5),
        "scale": lambda options: compare_scale(options.in_flight, 51),
        "memory": lambda options: compare_memory(100_000),
        "shutdown": lambda options: compare_shutdown(200_000, 3),
        "info": lambda options: compare_info(100_000, 9),
    }
    parser = argparse.ArgumentParser(description="Compare ways to run background tasks.")
    parser.add_argument("--burst", type=int, default=1000, help="tasks started before the loop runs them (1000)")
    parser.add_argument("--rounds", type=int, default=151, help="rounds of the part 'tasks' (151)")
    parser.add_argument("--in-flight", type=int, default=1_000_000, help="tasks of the part 'scale' (1000000)")
    run_parts(parser, parts)


if __name__ == "__main__":
    main()
