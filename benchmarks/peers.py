"""Compares what runs background tasks inside one process, for the page docs/peers.md, interleaved in one process.

::

    python benchmarks/peers.py              # everything, half a minute
    python benchmarks/peers.py cost         # one part: cost, together, failures, engines

Costs are medians over the rounds, of the time of the thread, with the median of the ratios to ``asyncio.create_task``
beside them. A peer that is not installed is left out: starlette, anyio, aiojobs, taskiq; of the engines distributed and
pydocket, which needs a Redis server, too.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import importlib.util
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from compare import CONTEXT, TIMEOUT, Contender, clock, loops, noop, race, ratio, run_parts, tick
from servers import RedisServer

from bgtasks import BackgroundExecutor, BackgroundTaskManager

Work = Callable[[], Coroutine[Any, Any, Any]]
# Starts tasks, each of a function of its own, and waits until none is left.
Runner = Callable[[list[Work]], Awaitable[None]]


async def create_task(works: list[Work]) -> None:
    """Run bare tasks; their references are kept until all have ended."""
    tasks = [asyncio.create_task(work()) for work in works]
    for task in tasks:
        if not task.done():
            await asyncio.wait([task])
        task.exception()


async def task_group(works: list[Work]) -> None:
    """Run tasks in a group of the standard library."""
    async with asyncio.TaskGroup() as group:
        for work in works:
            group.create_task(work())


async def anyio_group(works: list[Work]) -> None:
    """Run tasks in a group of anyio."""
    import anyio

    async with anyio.create_task_group() as group:
        for work in works:
            group.start_soon(work)


async def aiojobs_scheduler(works: list[Work]) -> None:
    """Run tasks in a scheduler of aiojobs, without a limit."""
    import aiojobs

    scheduler = aiojobs.Scheduler(limit=None, exception_handler=lambda scheduler, context: None)
    for work in works:
        await scheduler.spawn(work())
    await scheduler.wait_and_close()


async def background_tasks(works: list[Work]) -> None:
    """Run tasks as Starlette and FastAPI do after a response: one after another."""
    from starlette.background import BackgroundTasks

    tasks = BackgroundTasks()
    for work in works:
        tasks.add_task(work)
    await tasks()


@functools.cache
def _broker() -> Any:
    """Return taskiq's broker in memory, with a job that runs one of the waiting functions."""
    from taskiq import InMemoryBroker

    broker = InMemoryBroker(max_async_tasks=100_000)
    broker.waiting = []

    @broker.task
    async def job(number: int) -> None:
        await broker.waiting[number]()

    broker.job = job
    return broker


async def taskiq_broker(works: list[Work]) -> None:
    """Run jobs through taskiq's broker in memory: each is serialised, as for a server."""
    broker = _broker()
    broker.waiting = works
    for number in range(len(works)):
        await broker.job.kiq(number)
    await broker.wait_all()


def manager_creates(manager: BackgroundTaskManager) -> Runner:
    """Return a runner: ``create_task`` of bgtasks with name, timeout and context."""

    async def run(works: list[Work]) -> None:
        for work in works:
            manager.create_task(work(), name="event", timeout=TIMEOUT, context=CONTEXT)
        await manager.wait_for_all(return_exceptions=True)

    return run


def manager_fires(manager: BackgroundTaskManager) -> Runner:
    """Return a runner: ``fire`` of bgtasks with name, timeout and context."""

    async def run(works: list[Work]) -> None:
        for work in works:
            manager.fire(work(), name="event", timeout=TIMEOUT, context=CONTEXT)
        await manager.wait_for_all(return_exceptions=True)

    return run


def runners() -> dict[str, Runner]:
    """Return the runners there are, by name."""
    manager = BackgroundTaskManager()
    found: dict[str, Runner] = {
        "asyncio.create_task": create_task,
        "bgtasks fire": manager_fires(manager),
        "bgtasks create_task": manager_creates(manager),
        "asyncio.TaskGroup": task_group,
    }
    others: dict[str, tuple[str, Runner]] = {
        "BackgroundTasks": ("starlette", background_tasks),
        "anyio TaskGroup": ("anyio", anyio_group),
        "aiojobs Scheduler": ("aiojobs", aiojobs_scheduler),
        "taskiq InMemoryBroker": ("taskiq", taskiq_broker),
    }
    for name, (package, runner) in others.items():
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: {name} is left out")
        else:
            found[name] = runner
    return found


def contender_of(runner: Runner, clock: Callable[[], float]) -> Contender:
    """Return a contender that runs one function as many tasks."""

    async def run(work: Work, count: int) -> float:
        works = [work] * count
        begin = clock()
        await runner(works)
        return clock() - begin

    return run


def compare_cost(burst: int, rounds: int) -> None:
    """Print what a task costs from its start to its end."""
    print(f"\n## Microseconds per task, bursts of {burst}, {rounds} rounds (lower is better)\n")
    for loop_name, run in loops().items():
        contenders = {name: contender_of(runner, clock) for name, runner in runners().items()}
        for work in (noop, tick):
            times: dict[str, list[float]] = {}

            async def main(work: Any = work, contenders: Any = contenders, times: Any = times) -> None:
                times.update(await race(contenders, work, burst, rounds))

            run(main())
            print(f"{loop_name}, a task that {'ends at once' if work is noop else 'suspends once'}")
            for name, seconds in times.items():
                cost = statistics.median(seconds) / burst * 1e6
                print(f"  {name:24} {cost:8.2f}   {ratio(times, name, 'asyncio.create_task'):6.2f} x")
        _broker.cache_clear()


def compare_together(count: int, seconds: float) -> None:
    """Print how long many tasks take that wait for the network, say."""
    print(f"\n## Milliseconds until {count} tasks have ended that each wait {seconds * 1e3:g} ms\n")

    async def wait() -> None:
        await asyncio.sleep(seconds)

    async def main(contender: Contender) -> float:
        # The first run imports the peer.
        await contender(wait, 1)
        return await contender(wait, count)

    for name, runner in runners().items():
        took = asyncio.run(main(contender_of(runner, time.perf_counter)))
        print(f"  {name:24} {took * 1e3:8.0f}")
        _broker.cache_clear()


def compare_failures() -> None:
    """Print how many of ten tasks end well, if the third one raises."""
    print("\n## Of ten tasks the third raises: how many of the other nine finish\n")
    logging.disable()
    for name, runner in runners().items():
        finished = 0

        async def well() -> None:
            nonlocal finished
            await asyncio.sleep(0.01)
            finished += 1

        async def badly() -> None:
            raise LookupError("the third")

        async def main(runner: Runner = runner, well: Work = well, badly: Work = badly) -> str:
            try:
                await runner([well, well, badly, *[well] * 7])
            except (LookupError, ExceptionGroup) as error:
                return f"the starter gets {type(error).__name__}"
            return ""

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            how = asyncio.run(main())
        print(f"  {name:24} {finished:8}   {how}".rstrip())
        _broker.cache_clear()
    logging.disable(logging.NOTSET)


# -- engines: a job goes to another process, or through a server -------------------------------------------------------


def nothing(number: int) -> None:
    """Do nothing, in another process."""


async def processes(count: int) -> tuple[float, float]:
    """Run functions in a process of bgtasks."""
    with BackgroundExecutor(kind="processes", max_concurrency=1) as submit:
        await asyncio.wrap_future(submit(nothing, 0))
        begin = time.perf_counter()
        for number in range(count):
            await asyncio.wrap_future(submit(nothing, number))
        middle = time.perf_counter()
        await asyncio.gather(*[asyncio.wrap_future(submit(nothing, number)) for number in range(count)])
        return middle - begin, time.perf_counter() - middle


async def dask(count: int) -> tuple[float, float]:
    """Run functions through Dask's scheduler, with one worker in this process."""
    from distributed import Client

    async with Client(
        processes=False, asynchronous=True, dashboard_address=None, n_workers=1, threads_per_worker=1
    ) as client:
        await client.submit(nothing, 0, pure=False)
        begin = time.perf_counter()
        for number in range(count):
            await client.submit(nothing, number, pure=False)
        middle = time.perf_counter()
        await client.gather([client.submit(nothing, number, pure=False) for number in range(count)])
        return middle - begin, time.perf_counter() - middle


async def docket(count: int) -> tuple[float, float]:
    """Run jobs through docket, on a Redis server of this machine, as it is without settings."""
    from docket import Docket, Worker

    ended: asyncio.Queue[int] = asyncio.Queue()

    async def job(number: int) -> None:
        ended.put_nowait(number)

    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder)) as server:
        async with Docket(name="peers", url=server.url) as queue, Worker(queue) as worker:
            working = asyncio.create_task(worker.run_forever())
            await queue.add(job)(0)
            await ended.get()
            begin = time.perf_counter()
            for number in range(count):
                await queue.add(job)(number)
                await ended.get()
            middle = time.perf_counter()
            for number in range(count):
                await queue.add(job)(number)
            for _ in range(count):
                await ended.get()
            took = middle - begin, time.perf_counter() - middle
            working.cancel()
            await asyncio.wait([working])
            return took


def compare_engines(count: int) -> None:
    """Print what a job costs that does nothing, where it is run outside of the loop's process or through a server."""
    print(f"\n## Milliseconds per job that does nothing, {count} of them: one by one, and all at once\n")
    logging.disable()
    engines: dict[str, tuple[str, Callable[[int], Coroutine[Any, Any, tuple[float, float]]]]] = {
        "bgtasks, a process": ("bgtasks", processes),
        "Dask": ("distributed", dask),
        "docket": ("docket", docket),
    }
    for name, (package, run) in engines.items():
        if importlib.util.find_spec(package) is None or (run is docket and not RedisServer.is_installed()):
            print(f"{name} is left out: {package} or its server is not installed")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one_by_one, at_once = asyncio.run(run(count))
        print(f"  {name:24} {one_by_one / count * 1e3:8.2f} {at_once / count * 1e3:8.2f}")
    logging.disable(logging.NOTSET)


def main() -> None:
    """Run the parts asked for."""
    parts: dict[str, Callable[[argparse.Namespace], None]] = {
        "cost": lambda options: compare_cost(options.burst, options.rounds),
        "together": lambda options: compare_together(100, 0.01),
        "failures": lambda options: compare_failures(),
        "engines": lambda options: compare_engines(100),
    }
    parser = argparse.ArgumentParser(description="Compare what runs background tasks inside one process.")
    parser.add_argument("--burst", type=int, default=1000, help="tasks started before the loop runs them (1000)")
    parser.add_argument("--rounds", type=int, default=31, help="rounds of the part 'cost' (31)")
    run_parts(parser, parts)


if __name__ == "__main__":
    main()
