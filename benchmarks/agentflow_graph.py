"""Compares a graph of ten nodes that publish events, on the framework's own manager and on ours.

Both run in one process, in turns of 50 invocations, each turn with a new graph in a new container; what is printed is
the median over the turns of (time on ours / time on the original). Then it says where the time goes, twice:

* from the profiler, for one turn each: the original's ``create_task`` and done callback with all that they call, our
  ``create_task`` with all that it calls and the coroutine around the user's, each without what asyncio's own Python
  functions take. The profiler does not see into our compiled part: asyncio's compiled task is in its figure,
  and what ends a task may not be.
* without one: as many tasks as a turn starts, in the same bursts, on each manager and on the bare loop. What a manager
  costs is the difference to the bare loop.

Run it with nothing else on the machine, in an environment with one of the frameworks::

    python benchmarks/agentflow_graph.py [--invocations 1000]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import gc
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import injectq

import bgtasks
from bgtasks.integrations import agentflow

NODES = 10
TURN = 50
PROFILED = 100
BURST = 50
REPEATS = 15
PROFILES = 5
# Where the profiler finds the two managers.
MANAGER_FILES = {False: "background_task_manager", True: "_agentflow_manager"}


@contextlib.contextmanager
def manager_of(name: str, ours: bool) -> Iterator[None]:
    """Run the block with our manager in the framework, or with its own."""
    if ours:
        agentflow.install(name)
    try:
        with injectq.InjectQ.test_mode():
            yield
    finally:
        agentflow.uninstall()


def make_app(name: str) -> Any:
    """Return a compiled graph whose events go to a publisher that takes them and does nothing."""
    core, utils = import_module(f"{name}.core"), import_module(f"{name}.utils")
    base = import_module(f"{name}.runtime.publisher").BasePublisher

    class Publisher(base):
        async def publish(self, event: Any) -> None:
            pass

        async def close(self) -> None:
            pass

        def sync_close(self) -> None:
            pass

    async def node(state: Any, config: Any) -> Any:
        return state

    graph = core.StateGraph(publisher=Publisher({}))
    for number in range(NODES):
        graph.add_node(f"node {number}", node)
    graph.set_entry_point("node 0")
    for number in range(NODES - 1):
        graph.add_edge(f"node {number}", f"node {number + 1}")
    graph.add_edge(f"node {NODES - 1}", utils.END)
    return graph.compile()


async def turn(name: str, invocations: int) -> tuple[float, int]:
    """Invoke a new graph so many times; return the seconds and the number of tasks."""
    app = make_app(name)
    manager = app._task_manager
    message = import_module(f"{name}.core.state").Message
    started = 0
    create_task = manager.create_task

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal started
        started += 1
        return create_task(*args, **kwargs)

    manager.create_task = counting
    await app.ainvoke({"messages": [message.text_message("hello")]}, {"thread_id": "first"})
    await manager.wait_for_all()
    del manager.create_task
    gc.collect()
    begun = time.perf_counter()
    for number in range(invocations):
        await app.ainvoke({"messages": [message.text_message("hello")]}, {"thread_id": f"thread {number}"})
    await manager.wait_for_all()
    taken = time.perf_counter() - begun
    assert manager.dropped_count == 0
    await app.aclose()
    return taken, started


def time_graphs(name: str, invocations: int) -> int:
    """Print the ratio of the times of whole graphs; return the number of tasks an invocation starts."""
    ratios, times = [], {True: 0.0, False: 0.0}
    tasks = 0
    for number in range(max(invocations // TURN, 1)):
        taken = {}
        for ours in (True, False) if number % 2 else (False, True):
            with manager_of(name, ours):
                taken[ours], tasks = asyncio.run(turn(name, TURN))
            times[ours] += taken[ours]
        ratios.append(taken[True] / taken[False])
    count = len(ratios) * TURN
    print(f"{count} invocations of {NODES} nodes, {tasks} events each")
    print(f"  on the original {times[False]:.2f} s, on ours {times[True]:.2f} s")
    print(f"  ours/original, median of {len(ratios)} turns: {statistics.median(ratios):.3f}   (must: 1.0 or less)")
    return tasks


def profile_graphs(name: str) -> None:
    """Print what the profiler says of the managers' part: of several runs the one that was disturbed least."""
    parts = {}
    for ours in (False, True):
        runs = [profile_graph(name, ours) for _ in range(PROFILES)]
        total, found = min(runs, key=lambda run: sum(seconds for _, seconds in run[1].values()))
        parts[ours] = sum(seconds for _, seconds in found.values())
        print(f"profile of {PROFILED} invocations on {'ours' if ours else 'the original'}: {total:.2f} s")
        for text, (calls, seconds) in found.items():
            print(f"  {text:45} {calls:7} calls {seconds * 1000:8.1f} ms {seconds / total:7.2%}")
    print(f"  the managers' part, original/ours: {parts[False] / parts[True]:.1f}   (must: 3 or more)")


def profile_graph(name: str, ours: bool) -> tuple[float, dict[str, tuple[int, float]]]:
    """Profile one turn; return its seconds and, for each part of the manager, the calls and seconds."""
    profiler = cProfile.Profile()
    with manager_of(name, ours):
        asyncio.run(turn(name, 1))
        # A collection is charged to whoever happens to allocate.
        gc.disable()
        profiler.enable()
        asyncio.run(turn(name, PROFILED))
        profiler.disable()
        gc.enable()
    stats = pstats.Stats(profiler)
    rows: dict[Any, Any] = stats.stats  # type: ignore[attr-defined]
    found = {}
    for key, (_, calls, own, total, _) in rows.items():
        file, _, function = key
        if MANAGER_FILES[ours] in file and function in ("create_task", "_task_done_callback"):
            found[f"{function} without asyncio's part"] = (calls, total - in_asyncio(rows, key))
        elif ours and "bgtasks" in file and function == "run":
            found["the coroutine around the user's"] = (calls, own)
    return stats.total_tt, found  # type: ignore[attr-defined]


def in_asyncio(rows: dict[Any, Any], caller: Any) -> float:
    """Return the seconds that a function spent in asyncio, which makes and schedules a task."""
    return sum(
        callers[caller][3]
        for (file, _, _), (_, _, _, _, callers) in rows.items()
        if caller in callers and ("asyncio" in file or "_weakrefset" in file)
    )


async def publish() -> None:
    """Do what a publisher with nothing to do does."""


async def replay(create_task: Callable[..., Any], bursts: int) -> float:
    """Start and end tasks in bursts, as nodes do; return the seconds a task."""
    begun = time.perf_counter()
    for _ in range(bursts):
        for _ in range(BURST):
            create_task(publish())
        # One iteration runs the tasks, the next one their done callbacks.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    return (time.perf_counter() - begun) / (bursts * BURST)


def time_managers(name: str, tasks: int) -> None:
    """Print what a task costs on each manager, above what it costs on the bare loop."""
    module = import_module(f"{name}.utils.background_task_manager")
    original = module.BackgroundTaskManager
    agentflow.install(name)
    ours = module.BackgroundTaskManager
    agentflow.uninstall()
    bursts = max(tasks * PROFILED // BURST, 1)

    async def compare() -> dict[str, list[float]]:
        loop = asyncio.get_running_loop()
        contenders = {"bare": loop.create_task, "original": original().create_task, "ours": ours().create_task}
        times: dict[str, list[float]] = {contender: [] for contender in contenders}
        for _ in range(REPEATS):
            for contender, create_task in contenders.items():
                times[contender].append(await replay(create_task, bursts))
        return times

    times = asyncio.run(compare())
    rows = list(zip(times["bare"], times["original"], times["ours"], strict=True))
    micro = {contender: statistics.median(values) * 1e6 for contender, values in times.items()}
    print(f"{bursts * BURST} tasks in bursts of {BURST}, medians of {REPEATS} repeats")
    print(f"  a task on the bare loop {micro['bare']:.2f} us, on the original {micro['original']:.2f}, ", end="")
    print(f"on ours {micro['ours']:.2f}; whole task, original/ours: {micro['original'] / micro['ours']:.1f}")
    spent = [(original - bare, ours - bare) for bare, original, ours in rows]
    theirs, own = (statistics.median(column) * 1e6 for column in zip(*spent, strict=True))
    print(f"  above the bare loop: original {theirs:.2f} us, ours {own:.2f} us, original/ours: ", end="")
    print(f"{theirs / own:.1f}   (must: 3 or more)" if own > 0 else "ours costs nothing that can be measured")


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--invocations", type=int, default=1000)
    parser.add_argument("--framework", choices=agentflow.FRAMEWORKS, default=agentflow._found()[0])
    options = parser.parse_args()
    print(f"{options.framework} on Python {sys.version.split()[0]}, registry: {bgtasks.IMPLEMENTATION}")
    tasks = time_graphs(options.framework, options.invocations)
    profile_graphs(options.framework)
    time_managers(options.framework, tasks)


if __name__ == "__main__":
    main()
