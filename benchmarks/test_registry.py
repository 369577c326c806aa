"""Benchmarks of each operation alone, for profiles and for before and after; ``compare.py`` ranks contenders.

Run with ``pytest benchmarks``.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from loops import LOOPS
from twins import MODULES, manager_module

CONTEXT = {"user": "alice", "order": 7}
BURST = 1000
KINDS = [kind for kind in LOOPS if kind != "eager"]
DIFFERENT = itertools.cycle([5 + number * 0.00037 for number in range(100_003)])


async def noop() -> None:
    """End at once."""


async def tick() -> None:
    """Suspend once."""
    await asyncio.sleep(0)


async def run_until_idle() -> None:
    """Let a burst end."""
    for _ in range(3):
        await asyncio.sleep(0)


@pytest.fixture(params=KINDS)
def loop(request: pytest.FixtureRequest) -> Iterator[asyncio.AbstractEventLoop]:
    """Give a loop, not in debug mode."""
    loop = LOOPS[request.param]()
    yield loop
    loop.close()


@pytest.fixture(params=list(MODULES))
def manager(request: pytest.FixtureRequest) -> Any:
    """Give a manager on each twin."""
    return manager_module(request.param).BackgroundTaskManager(default_shutdown_timeout=600)


STARTS: dict[str, Callable[[Any, Callable[[], Any]], Any]] = {
    "create": lambda manager, work: manager.create_task(work()),
    "create full": lambda manager, work: manager.create_task(work(), name="event", timeout=30.0, context=CONTEXT),
    "create different timeouts": lambda manager, work: manager.create_task(
        work(), name="event", timeout=next(DIFFERENT), context=CONTEXT
    ),
    "fire full": lambda manager, work: manager.fire(work(), name="event", timeout=30.0, context=CONTEXT),
}


@pytest.mark.parametrize("work", [noop, tick])
@pytest.mark.parametrize("start", list(STARTS))
def test_burst(benchmark: Any, loop: asyncio.AbstractEventLoop, manager: Any, start: str, work: Any) -> None:
    """Start a thousand tasks and let them end."""
    call = STARTS[start]

    async def burst() -> None:
        for _ in range(BURST):
            call(manager, work)
        await run_until_idle()

    benchmark(lambda: loop.run_until_complete(burst()))
    assert manager.get_task_count() == 0


@pytest.mark.parametrize("in_flight", [1_000, 100_000, 1_000_000])
def test_burst_with_others_in_flight(
    benchmark: Any, loop: asyncio.AbstractEventLoop, manager: Any, in_flight: int
) -> None:
    """Start a thousand tasks and let them end while many more wait."""

    async def fill() -> asyncio.Event:
        release = asyncio.Event()
        for _ in range(in_flight):
            manager.create_task(release.wait(), name="waits", timeout=3600.0, context=CONTEXT)
        await run_until_idle()
        return release

    async def burst() -> None:
        for _ in range(BURST):
            manager.create_task(noop(), name="event", timeout=30.0, context=CONTEXT)
        await run_until_idle()

    async def empty(release: asyncio.Event) -> None:
        release.set()
        await manager.wait_for_all()

    release = loop.run_until_complete(fill())
    gc.collect()
    benchmark.pedantic(lambda: loop.run_until_complete(burst()), rounds=20, warmup_rounds=2)
    loop.run_until_complete(empty(release))


@pytest.mark.parametrize("end", ["cancel_all", "shutdown"])
def test_end_of_200_000(benchmark: Any, loop: asyncio.AbstractEventLoop, manager: Any, end: str) -> None:
    """Cancel and await 200,000 sleeping tasks."""
    module = type(manager)

    def fill() -> tuple[tuple[Any], dict[str, Any]]:
        fresh = module(default_shutdown_timeout=600)

        async def start() -> None:
            for _ in range(200_000):
                fresh.create_task(asyncio.sleep(3600), name="sleeps", timeout=7200.0, context=CONTEXT)
            await run_until_idle()

        loop.run_until_complete(start())
        return (fresh,), {}

    benchmark.pedantic(lambda fresh: loop.run_until_complete(getattr(fresh, end)()), setup=fill, rounds=2)


def test_get_task_info_of_100_000(benchmark: Any, loop: asyncio.AbstractEventLoop, manager: Any) -> None:
    """List 100,000 tasks."""

    async def fill() -> None:
        for _ in range(100_000):
            manager.create_task(asyncio.sleep(3600), name="sleeps", timeout=7200.0, context=CONTEXT)
        await run_until_idle()

    loop.run_until_complete(fill())
    assert len(benchmark.pedantic(manager.get_task_info, rounds=5)) == 100_000
    loop.run_until_complete(manager.shutdown())


def test_memory_of_a_task_in_flight(benchmark: Any, loop: asyncio.AbstractEventLoop, manager: Any) -> None:
    """Hold 10,000 tasks; the bytes of each stand in the report's extra info."""

    async def hold() -> float:
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(10_000):
            manager.create_task(asyncio.sleep(3600), name="sleeps", timeout=7200.0, context=CONTEXT)
        await run_until_idle()
        held = (tracemalloc.get_traced_memory()[0] - before) / 10_000
        tracemalloc.stop()
        await manager.cancel_all()
        return held

    benchmark.extra_info["bytes"] = benchmark.pedantic(lambda: loop.run_until_complete(hold()), rounds=1)
