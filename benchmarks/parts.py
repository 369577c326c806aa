"""The parts of a benchmark run: each measures something and returns rows."""

from __future__ import annotations

import asyncio
import gc
import itertools
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from compare import (
    CONTEXT,
    TIMEOUT,
    Contender,
    bare,
    bytes_per_task,
    clock,
    creates,
    creates_with_different_timeouts,
    loops,
    noop,
    race,
    recipe,
    recipe_with_timeout,
    run_until_idle,
    tick,
)
from contenders import awaits, awaits_bare, contenders, gathers, gathers_bare
from rows import Row
from twins import manager_module

__all__ = ["PARTS", "Options", "Part"]

WORKS = {"trivial": noop, "suspends once": tick}
RATIO = "of a bare task's speed"
COST = "µs per task"


class Options(NamedTuple):
    """What is asked for."""

    rounds: int
    burst: int
    most: int


class Part(NamedTuple):
    """A part of a run: ``steps(options)`` calls of the function that ``measure`` is given show its progress."""

    title: str
    steps: Callable[[Options], int]
    measure: Callable[[Options, Callable[[], None]], list[Row]]


def _counted(found: dict[str, Contender], step: Callable[[], None]) -> dict[str, Contender]:
    """Return contenders that show their progress."""

    def counted(contender: Contender) -> Contender:
        async def run(work: Any, count: int) -> float:
            step()
            return await contender(work, count)

        return run

    return {name: counted(contender) for name, contender in found.items()}


def _race(found: dict[str, Contender], work: Any, options: Options, run: Any) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {}

    async def main() -> None:
        times.update(await race(found, work, options.burst, options.rounds))

    run(main())
    return times


def _ratios(times: dict[str, list[float]], over: str, under: str) -> list[float]:
    return [first / second for first, second in zip(times[over], times[under], strict=True)]


# -- tasks: bars -------------------------------------------------------------------------------------------------------


def _measure_tasks(options: Options, step: Callable[[], None]) -> list[Row]:
    rows = []
    for loop, run in loops().items():
        for what, work in WORKS.items():
            found = _counted(contenders()[0], step)
            times = _race(found, work, options, run)
            case = f"{loop}, {what}"
            rows += [Row.of(_ratios(times, "bare task", name), "tasks", case, name, RATIO) for name in found]
    return rows


def _steps_of_tasks(options: Options) -> int:
    return len(loops()) * len(WORKS) * len(contenders()[0]) * (options.rounds + 2)


def _measure_await(options: Options, step: Callable[[], None]) -> list[Row]:
    rows = []
    for loop, run in loops().items():
        manager = manager_module("cython").BackgroundTaskManager()
        found = {
            "bare, one by one": awaits_bare,
            "bgtasks, one by one": awaits(manager),
            "bare, gather of 100": gathers_bare,
            "bgtasks, gather of 100": gathers(manager),
        }
        times = _race(_counted(found, step), noop, options, run)
        for way in ("one by one", "gather of 100"):
            ratios = _ratios(times, f"bare, {way}", f"bgtasks, {way}")
            rows.append(Row.of(ratios, "await", f"{loop}, trivial", f"await create_task, {way}", RATIO))
    return rows


# -- growth: lines -----------------------------------------------------------------------------------------------------


def _powers(most: int) -> list[int]:
    return [10**exponent for exponent in range(len(str(most))) if 10**exponent <= most]


def _run_growing(found: dict[str, Contender], case: str, options: Options, grow: Any, step: Callable[[], None]) -> Any:
    """Return the rows of what contenders cost while something grows; ``grow(count)`` makes it that large."""
    rows: list[Row] = []

    async def main() -> None:
        for count in _powers(options.most):
            await grow(count)
            gc.collect()
            times = await race(found, noop, options.burst, options.rounds)
            for name, seconds in times.items():
                costs = [each / options.burst * 1e6 for each in seconds]
                rows.append(Row.of(costs, "growth", case, name, COST, x=count))
            step()
        if isinstance(grow, _Filling):
            await grow.end()

    # The fastest loop: there the share of the bookkeeping is largest.
    list(loops().values())[-1](main())
    return rows


class _Filling:
    """A ``grow`` that keeps tasks in flight."""

    def __init__(self, start: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._start = start
        self._release = asyncio.Event()
        self._tasks: list[Any] = []

    async def __call__(self, count: int) -> None:
        """Have this many tasks in flight."""
        self._tasks.extend(self._start(self._release.wait()) for _ in range(count - len(self._tasks)))
        await run_until_idle()

    async def end(self) -> None:
        """Have all of them end."""
        self._release.set()
        await run_until_idle(lambda: all(task.done() for task in self._tasks))


def _in_flight(options: Options, step: Callable[[], None]) -> list[Row]:
    manager = manager_module("cython").BackgroundTaskManager(default_shutdown_timeout=600)
    fill = _Filling(lambda coro: manager.create_task(coro, name="waits", timeout=3600, context=CONTEXT))
    rows = _run_growing({"bgtasks": creates(manager, full=True)}, "tasks in flight", options, fill, step)
    fill = _Filling(lambda coro: asyncio.get_running_loop().create_task(coro))
    rows += _run_growing({"bare task": bare, "recipe: set + discard": recipe}, "tasks in flight", options, fill, step)
    return rows


def _timeouts(options: Options, step: Callable[[], None]) -> list[Row]:
    manager = manager_module("cython").BackgroundTaskManager(default_shutdown_timeout=600)
    seconds = itertools.count(600)
    fill = _Filling(lambda coro: manager.create_task(coro, name="waits", timeout=float(next(seconds)), context=CONTEXT))
    tracked = {"bgtasks": creates_with_different_timeouts(manager)}
    rows = _run_growing(tracked, "timeouts armed, no two alike", options, fill, step)
    handles = []

    async def arm(count: int) -> None:
        loop = asyncio.get_running_loop()
        handles.extend(loop.call_later(600 + number, run_until_idle) for number in range(len(handles), count))

    by_hand = {"recipe + call_later": recipe_with_timeout}
    rows += _run_growing(by_hand, "timeouts armed, no two alike", options, arm, step)
    return rows


def _names(options: Options, step: Callable[[], None]) -> list[Row]:
    manager = manager_module("cython").BackgroundTaskManager()
    names = itertools.cycle(["one"])

    async def use(count: int) -> None:
        nonlocal names
        names = itertools.cycle([f"name {number}" for number in range(count)])

    async def run(work: Any, count: int) -> float:
        begin = clock()
        for _ in range(count):
            manager.create_task(work(), name=next(names), timeout=TIMEOUT, context=CONTEXT)
        await run_until_idle()
        return clock() - begin

    return _run_growing({"bgtasks": run}, "different names", options._replace(most=10_000), use, step)


def _loops(options: Options, step: Callable[[], None]) -> list[Row]:
    manager = manager_module("cython").BackgroundTaskManager()
    with _idle_loops(manager) as use:
        return _run_growing(
            {"bgtasks": creates(manager, full=True)}, "loops of one manager", options._replace(most=100), use, step
        )


@contextmanager
def _idle_loops(manager: Any) -> Iterator[Any]:
    """Give a ``grow`` that starts threads with a loop and a task of the manager each, the first of them excepted."""
    release = threading.Event()
    threads: list[threading.Thread] = []

    async def idle(ready: threading.Event) -> None:
        task = manager.create_task(asyncio.Event().wait(), name="waits")
        ready.set()
        await asyncio.to_thread(release.wait)
        task.cancel()

    async def use(count: int) -> None:
        while len(threads) < count - 1:
            ready = threading.Event()
            threads.append(threading.Thread(target=asyncio.run, args=(idle(ready),)))
            threads[-1].start()
            ready.wait()

    try:
        yield use
    finally:
        release.set()
        for thread in threads:
            thread.join()


def _measure_growth(options: Options, step: Callable[[], None]) -> list[Row]:
    rows = []
    for measure in (_in_flight, _timeouts, _names, _loops):
        rows += measure(options._replace(rounds=min(options.rounds, 21)), step)
    return rows


def _steps_of_growth(options: Options) -> int:
    return 4 * len(_powers(options.most)) + len(_powers(10_000)) + len(_powers(100))


# -- memory: bars ------------------------------------------------------------------------------------------------------


def _starts() -> dict[str, Callable[[Coroutine[Any, Any, Any]], Any]]:
    kept: set[Any] = set()

    def by_recipe(coro: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(coro)
        kept.add(task)
        task.add_done_callback(kept.discard)

    def by(twin: str) -> Callable[[Coroutine[Any, Any, Any]], Any]:
        manager = manager_module(twin).BackgroundTaskManager()
        return lambda coro: manager.create_task(coro, name="event", timeout=3600.0, context=CONTEXT)

    return {
        "bare task": lambda coro: asyncio.get_running_loop().create_task(coro),
        "recipe: set + discard": by_recipe,
        "bgtasks, name + timeout + context": by("cython"),
        "bgtasks in Python": by("python"),
    }


def _measure_memory(options: Options, step: Callable[[], None]) -> list[Row]:
    rows = []
    for name in _starts():
        values = []
        for _ in range(3):
            held, _ = asyncio.run(bytes_per_task(_starts()[name], min(options.most, 20_000)))
            values.append(held)
            step()
        rows.append(Row.of(values, "memory", "a task in flight", name, "bytes"))
    return rows


# -- events: bars ------------------------------------------------------------------------------------------------------


def _measure_events(options: Options, step: Callable[[], None]) -> list[Row]:
    import msgspec  # noqa: F401  without it there are no events to measure
    from events import AT_ONCE, NullSink, flat_out, node_event, paced

    from bgtasks.events import Publisher
    from bgtasks.events.sinks.jsonl import JsonlSink
    from bgtasks.events.sinks.sqlite import SqliteSink

    run = list(loops().values())[-1]
    rounds = min(options.rounds, 5)
    ready = [node_event(number) for number in range(AT_ONCE)]
    figures: dict[tuple[str, str, str], list[float]] = {}

    def note(case: str, name: str, unit: str, value: float) -> None:
        figures.setdefault((case, name, unit), []).append(value)

    async def measure(name: str, make: Callable[[], Any]) -> None:
        note(
            "as fast as it goes", name, "events/s", await flat_out(Publisher(make()), ready, min(options.most, 200_000))
        )
        share, lag = await paced(Publisher(make()), 100_000, 1.0)
        note("100,000 offered a second", name, "ms of lag, 99th percentile", lag)
        note("CPU at 100,000 offered a second", name, "% of a core", share)

    for _ in range(rounds):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            paths = (folder / str(number) for number in itertools.count())
            sinks: dict[str, Callable[[], Any]] = {
                "none: encoded and counted": NullSink,
                "JSON lines": lambda paths=paths: JsonlSink(next(paths)),
                "SQLite, a row per batch": lambda paths=paths: SqliteSink(next(paths), rows="batch"),
            }
            for name, make in sinks.items():
                run(measure(name, make))
                step()
    found = sorted(figures.items(), key=lambda item: item[0][0])
    return [Row.of(values, "events", case, name, unit) for (case, name, unit), values in found]


PARTS = {
    "tasks": Part("Tasks: how fast against bare ones", _steps_of_tasks, _measure_tasks),
    "await": Part("Awaiting a task", lambda options: len(loops()) * 4 * (options.rounds + 2), _measure_await),
    "growth": Part("How the cost of a task grows", _steps_of_growth, _measure_growth),
    "memory": Part("Memory of a task in flight", lambda options: 3 * len(_starts()), _measure_memory),
    "events": Part("Events by sink", lambda options: 3 * min(options.rounds, 5), _measure_events),
}
