"""What a type checker is to accept and to refuse of a manager; never run."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
from collections.abc import Mapping
from typing import Any, Literal, TypedDict, Unpack, assert_type

from bgtasks import (
    BUCKET_EDGES,
    IMPLEMENTATION,
    Attachable,
    BackgroundTaskManager,
    FinishedTask,
    Histogram,
    LiveState,
    LoopBlock,
    LoopStats,
    ManagerOptions,
    ManagerStats,
    NameHistograms,
    NameStats,
    Outcome,
    Overflow,
    Progress,
    ShutdownStats,
    TaskFactoryOptions,
    TaskInfo,
    TaskOrder,
    TaskOverflow,
    TaskState,
    TimeoutAction,
    TimeoutPolicy,
    progress,
)


async def fetch(url: str) -> bytes:
    """Return bytes."""
    return url.encode()


def plain(url: str) -> bytes:
    """Return bytes."""
    return url.encode()


def report(info: TaskInfo, error: BaseException) -> None:
    """Take what ``on_error`` is called with."""
    print(info["name"], error)


def options() -> None:
    """Each option of a manager by itself and all of them."""
    BackgroundTaskManager()
    BackgroundTaskManager(5, 10)
    BackgroundTaskManager(
        default_shutdown_timeout=5.0,
        max_pending_tasks=None,
        overflow="drop_newest",
        max_concurrency=None,
        drain_timeout=1,
        on_error=report,
        history=10,
    )
    BackgroundTaskManager(on_error=lambda info, error: print(info["task_id"], error))
    BackgroundTaskManager("5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    BackgroundTaskManager(5, 10, "raise")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    BackgroundTaskManager(overflow="drop_oldest")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    BackgroundTaskManager(drain_timeout=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    BackgroundTaskManager(history=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    BackgroundTaskManager(on_error=print, max_tasks=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    BackgroundTaskManager(on_error=plain)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def handed_on(**options: Unpack[ManagerOptions]) -> BackgroundTaskManager:
    """Make a manager of options that a caller gave."""
    return BackgroundTaskManager(**options)


def options_handed_on() -> None:
    """A function that hands options on has them checked at its calls."""
    handed_on(history=5, overflow="raise")
    kept: ManagerOptions = {"max_concurrency": None}
    handed_on(**kept)
    handed_on(histroy=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    handed_on(history="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    wrong: ManagerOptions = {"overflow": "block"}  # type: ignore[typeddict-item]  # pyright: ignore[reportAssignmentType]
    print(wrong)


async def starting(manager: BackgroundTaskManager, loop: asyncio.AbstractEventLoop) -> None:
    """What starts a coroutine has the type of its result."""
    assert_type(manager.create_task(fetch("a")), asyncio.Task[bytes])
    assert_type(await manager.create_task(fetch("a")), bytes)
    manager.create_task(
        fetch("a"),
        name="fetch",
        timeout=5,
        context={"url": "a"},
        eager_start=True,
        contextvars_context=contextvars.copy_context(),
    )
    manager.create_task(fetch)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.create_task(plain("a"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.create_task(fetch("a"), "fetch")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    manager.create_task(fetch("a"), timeout="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.create_task(fetch("a"), context=[("url", "a")])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.create_task(fetch("a"), contextvars_context={})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.create_task(fetch("a"), deadline=5.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

    assert_type(manager.fire(fetch("a"), name="fetch", timeout=5.0, context={}), bool)
    manager.fire(plain("a"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.fire(fetch("a"), eager_start=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

    assert_type(await manager.spawn(fetch("a"), name="fetch", eager_start=False), asyncio.Task[bytes])
    assert_type(await (await manager.spawn(fetch("a"))), bytes)
    await manager.spawn(plain("a"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await manager.spawn(fetch("a"), "fetch")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

    assert_type(manager.create_task_threadsafe(fetch("a"), loop=loop), concurrent.futures.Future[bytes])
    manager.create_task_threadsafe(fetch("a"), loop)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await manager.create_task_threadsafe(fetch("a"))  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]


def by_the_loop(manager: BackgroundTaskManager, loop: asyncio.AbstractEventLoop) -> None:
    """A loop takes the factory; a program calls it with what the loop passes."""
    loop.set_task_factory(manager.task_factory)
    assert_type(manager.task_factory(loop, fetch("a"), name="fetch", eager_start=False), asyncio.Task[bytes])
    passed: TaskFactoryOptions = {"name": None, "context": None}
    manager.task_factory(loop, fetch("a"), **passed)
    manager.task_factory(loop, fetch)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.task_factory(loop, fetch("a"), timeout=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    manager.task_factory(loop, fetch("a"), name=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def looking(manager: BackgroundTaskManager) -> None:
    """Questions answer with typed dictionaries."""
    assert_type(manager.get_task_count(), int)
    assert_type(manager.pending_count, int)
    assert_type(manager.dropped_count, int)
    assert_type(manager.default_shutdown_timeout, float)
    manager.dropped_count = 0  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]

    info = manager.get_task_info()
    assert_type(info, list[TaskInfo])
    assert_type(info[0]["task_id"], int)
    assert_type(info[0]["state"], TaskState)
    assert_type(info[0]["age_seconds"], float)
    assert_type(info[0]["timeout"], float | None)
    assert_type(info[0]["context"], Mapping[str, Any])
    info[0]["age"]  # type: ignore[typeddict-item]  # pyright: ignore[reportGeneralTypeIssues]
    info[0]["state"] == "done"  # type: ignore[comparison-overlap]  # pyright: ignore[reportUnnecessaryComparison]

    state: LiveState = "queued"
    sort: TaskOrder = "oldest"
    assert_type(manager.get_task_info(name="a", state=state, older_than=5, limit=3, sort=sort), list[TaskInfo])
    manager.get_task_info(state="completed")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.get_task_info(sort="age")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.get_task_info("a")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    assert_type(info[0]["service"], bool)

    history = manager.get_history()
    assert_type(history, list[FinishedTask])
    assert_type(history[0]["outcome"], Outcome)
    assert_type(history[0]["duration_seconds"], float)
    assert_type(history[0]["ended_at"], float)
    assert_type(history[0]["error"], str | None)

    stats = manager.stats()
    assert_type(stats, ManagerStats)
    assert_type(stats["started"], int)
    assert_type(stats["names"]["fetch"], NameStats)
    assert_type(stats["names"]["fetch"]["p99_seconds"], float | None)
    assert_type(stats["names"]["fetch"]["last_error"], str | None)
    assert_type(info[0]["progress"], Progress | None)
    histograms = manager.histograms()
    assert_type(histograms, dict[str, NameHistograms])
    assert_type(histograms["fetch"]["wait"], Histogram)
    assert_type(BUCKET_EDGES[histograms["fetch"]["wait"]["buckets"][0][0]], float)
    manager.watch_loop(0.2)
    manager.watch_loop(threshold="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    (loop,) = manager.loop_stats()
    assert_type(loop, LoopStats)
    assert_type(loop["last_block"], LoopBlock | None)
    assert_type(progress(1, 2.5, "files"), bool)
    progress("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    stats["refused"]  # type: ignore[typeddict-item]  # pyright: ignore[reportGeneralTypeIssues]

    assert_type(manager.get_task(5), asyncio.Task[Any] | None)
    manager.get_task("fetch")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.get_task(5).cancel()  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]


def stopping(manager: BackgroundTaskManager, task: asyncio.Task[bytes]) -> None:
    """A task, an id or a name."""
    assert_type(manager.get_task_id(task), int | None)
    assert_type(manager.cancel(task), int)
    manager.cancel(5)
    manager.cancel("fetch")
    manager.cancel()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    manager.cancel(fetch("a"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.cancel(name="fetch")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def ending(manager: BackgroundTaskManager) -> None:
    """Times are lengths; flags are keywords."""
    await manager.wait_for_all()
    await manager.wait_for_all(5, return_exceptions=True)
    await manager.wait_for_all(None)
    on_timeout: TimeoutAction = "raise"
    found = await manager.wait_for_all(names=["a", "b"], as_group=True, on_timeout=on_timeout)
    assert_type(found, list[BaseException])
    await manager.wait_for_all(names="a")
    await manager.wait_for_all(names=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await manager.wait_for_all(on_timeout="stop")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await manager.wait_for_all(5, True)  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]
    await manager.wait_for_all("5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await manager.cancel_all()
    await manager.cancel_all(5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    done = await manager.shutdown(5, drain=1)
    assert_type(done, ShutdownStats)
    assert_type(done["status"], Literal["completed", "timeout", "already_shutdown"])
    assert_type(done["remaining_names"], list[str])
    await manager.shutdown(5, 1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await manager.shutdown(deadline=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await manager.aclose()
    async with BackgroundTaskManager() as entered:
        assert_type(entered, BackgroundTaskManager)
    with manager:  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass


class Held:
    """What a manager can flush and close."""

    def attached(self, manager: BackgroundTaskManager, /) -> None:
        """Do nothing."""

    async def flush(self, timeout: float, /) -> int:
        """Return a number, which nobody asks for."""
        return int(timeout)

    async def close(self, timeout: float, /) -> None:
        """Do nothing."""


class NotHeld:
    """What has no ``flush``."""

    def attached(self, manager: BackgroundTaskManager, /) -> None:
        """Do nothing."""

    async def close(self, timeout: float, /) -> None:
        """Do nothing."""


def attaching(manager: BackgroundTaskManager) -> None:
    """A manager takes whatever has the methods."""
    held: Attachable = Held()
    manager.attach(held)
    manager.detach(held)
    manager.attach(NotHeld())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.detach(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


class Settings(TypedDict):
    """A program's own settings, in the types of the options."""

    overflow: TaskOverflow
    timeouts: TimeoutPolicy


def named_types(settings: Settings, overflow: Overflow, outcome: Outcome, state: TaskState) -> None:
    """The closed sets of values have names."""
    BackgroundTaskManager(overflow=settings["overflow"], timeouts=settings["timeouts"])
    BackgroundTaskManager(timeouts="kill")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    BackgroundTaskManager(overflow=overflow)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    overflow = settings["overflow"]
    other: Outcome = state  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    state = outcome
    state = "done"  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    print(overflow, other, state)


def constants() -> None:
    """Which of the twins runs, and a value of an option."""
    timeouts: TimeoutPolicy = "raise"
    BackgroundTaskManager(timeouts=timeouts)
    assert_type(IMPLEMENTATION, Literal["cython", "python"])
