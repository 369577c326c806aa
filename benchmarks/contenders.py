"""Ways to run background tasks that people have: each starts tasks, waits for their end and returns the seconds."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Coroutine
from typing import Any

from compare import (
    CONTEXT,
    TIMEOUT,
    Contender,
    bare,
    clock,
    creates,
    fires,
    recipe,
    recipe_with_timeout,
    run_until_idle,
    sustained,
)
from twins import manager_module

__all__ = ["FULL", "awaits", "awaits_bare", "contenders", "gathers", "gathers_bare"]

Work = Callable[[], Coroutine[Any, Any, Any]]

FULL = "bgtasks create_task, name + timeout + context"


async def task_group(work: Work, count: int) -> float:
    """Run tasks in an ``asyncio.TaskGroup``."""
    begin = clock()
    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(work())
    return clock() - begin


def _anyio(anyio: Any) -> Contender:
    async def run(work: Work, count: int) -> float:
        begin = clock()
        async with anyio.create_task_group() as group:
            for _ in range(count):
                group.start_soon(work)
        return clock() - begin

    return run


def _aiojobs(aiojobs: Any) -> Contender:
    async def run(work: Work, count: int) -> float:
        async with aiojobs.Scheduler(limit=None) as scheduler:
            begin = clock()
            for _ in range(count):
                await scheduler.spawn(work())
            await run_until_idle(lambda: scheduler.active_count == 0)
            return clock() - begin

    return run


def _agentflow(module: Any) -> Contender:
    manager = module.BackgroundTaskManager(max_pending_tasks=0)

    async def run(work: Work, count: int) -> float:
        return await sustained(manager, None, count)(work, count)

    return run


def _langgraph(module: Any) -> Contender:
    async def run(work: Work, count: int) -> float:
        begin = clock()
        async with module.AsyncBackgroundExecutor({}) as submit:
            for _ in range(count):
                submit(work)
        return clock() - begin

    return run


def _taskiq(taskiq: Any) -> Contender:
    async def run(work: Work, count: int) -> float:
        broker = taskiq.InMemoryBroker(max_async_tasks=1_000_000)
        task = broker.register_task(work, task_name="work")
        await broker.startup()
        begin = clock()
        for _ in range(count):
            await task.kiq()
        await broker.wait_all()
        took = clock() - begin
        await broker.shutdown()
        return took

    return run


# What others offer: its name -> the module that it takes, and what makes the contender.
OTHERS: dict[str, tuple[str, Callable[[Any], Contender]]] = {
    "anyio task group": ("anyio", _anyio),
    "aiojobs": ("aiojobs", _aiojobs),
    "agentflow's manager": ("agentflow.utils.background_task_manager", _agentflow),
    "LangGraph's executor": ("langgraph.pregel._executor", _langgraph),
    "taskiq in memory": ("taskiq", _taskiq),
}


def contenders() -> tuple[dict[str, Contender], list[str]]:
    """Return all contenders that can run here, the bare task first, and the names of those that are not installed."""
    compiled = manager_module("cython").BackgroundTaskManager()
    twin = manager_module("python").BackgroundTaskManager()
    found: dict[str, Contender] = {
        "bare task": bare,
        "recipe: set + discard": recipe,
        "recipe + call_later": recipe_with_timeout,
        "asyncio.TaskGroup": task_group,
        "bgtasks create_task": creates(compiled),
        FULL: creates(compiled, full=True),
        "bgtasks fire, name + timeout + context": fires(compiled),
        "bgtasks create_task in Python": creates(twin, full=True),
    }
    missing = []
    for name, (module, make) in OTHERS.items():
        try:
            found[name] = make(importlib.import_module(module))
        except ImportError:
            missing.append(name)
    return found, missing


async def awaits_bare(work: Work, count: int) -> float:
    """Await bare tasks one by one."""
    create_task = asyncio.get_running_loop().create_task
    begin = clock()
    for _ in range(count):
        await create_task(work())
    return clock() - begin


def awaits(manager: Any) -> Contender:
    """Return a contender that awaits tasks of a manager one by one."""

    async def run(work: Work, count: int) -> float:
        begin = clock()
        for _ in range(count):
            await manager.create_task(work(), name="event", timeout=TIMEOUT, context=CONTEXT)
        return clock() - begin

    return run


async def gathers_bare(work: Work, count: int) -> float:
    """Gather bare tasks, a hundred at a time."""
    create_task = asyncio.get_running_loop().create_task
    begin = clock()
    for _ in range(count // 100):
        await asyncio.gather(*[create_task(work()) for _ in range(100)])
    return clock() - begin


def gathers(manager: Any) -> Contender:
    """Return a contender that gathers tasks of a manager, a hundred at a time."""

    async def run(work: Work, count: int) -> float:
        create_task = manager.create_task
        begin = clock()
        for _ in range(count // 100):
            tasks = [create_task(work(), name="event", timeout=TIMEOUT, context=CONTEXT) for _ in range(100)]
            await asyncio.gather(*tasks)
        return clock() - begin

    return run
