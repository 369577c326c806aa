"""What a type checker is to accept and to refuse of the executors; never run."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Awaitable
from typing import TypedDict, assert_type

from bgtasks import (
    AsyncBackgroundExecutor,
    AsyncSubmit,
    BackgroundExecutor,
    BackgroundFuture,
    BackgroundTaskManager,
    ExecutorKind,
    Submit,
)


class Config(TypedDict, total=False):
    """A mapping such as a ``RunnableConfig``."""

    max_concurrency: int | None
    tags: list[str]


def area(width: int, *, height: int = 1) -> float:
    """Return a float."""
    return float(width * height)


async def fetch(url: str) -> bytes:
    """Return bytes."""
    return url.encode()


def fetch_later(url: str) -> Awaitable[bytes]:
    """Return something to await."""
    return fetch(url)


def making(config: Config, manager: BackgroundTaskManager, kind: ExecutorKind) -> None:
    """The options of both executors."""
    BackgroundExecutor()
    BackgroundExecutor(config)
    BackgroundExecutor(max_concurrency=2, manager=manager, abandon_running=False, kind=kind)
    assert_type(BackgroundExecutor().manager, BackgroundTaskManager)
    BackgroundExecutor(4)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    BackgroundExecutor(None, 4)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    BackgroundExecutor(max_concurrency="4")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    BackgroundExecutor(manager=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    BackgroundExecutor(kind="fibers")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    BackgroundExecutor(max_workers=4)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

    AsyncBackgroundExecutor()
    AsyncBackgroundExecutor(config, max_concurrency=None, manager=manager)
    assert_type(AsyncBackgroundExecutor().manager, BackgroundTaskManager)
    AsyncBackgroundExecutor(4)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    AsyncBackgroundExecutor(None, 4)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    AsyncBackgroundExecutor(kind="threads")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def functions() -> None:
    """A call without options has its arguments checked, one with options has those checked; both know the result."""
    executor = BackgroundExecutor({"max_concurrency": 2, "tags": []})
    with executor as submit:
        assert_type(submit, Submit)
        assert_type(submit(area, 1), BackgroundFuture[float])
        assert_type(submit(area, 1).result(), float)
        assert_type(submit(area, 1, height=2, __name__="n", __timeout__=1), BackgroundFuture[float])
        assert_type(submit(area, 1, __next_tick__=True, __cancel_on_exit__=True), BackgroundFuture[float])
        assert_type(submit(area, 1, __reraise_on_exit__=False), BackgroundFuture[float])
        assert_type(submit(pow, 2, 3), BackgroundFuture[int])
        submit(area, "1")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
        submit(area)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
        submit(area, 1, height="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        submit(area, 1, __name__=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        submit(area, 1, __nmae__="n")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        submit(area(1))  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert_type(executor.submit(area, 1), BackgroundFuture[float])
    executor.submit(area, "1")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


async def functions_of_coroutines(manager: BackgroundTaskManager) -> None:
    """Futures of functions can be awaited, and are those of the standard library."""
    async with BackgroundExecutor() as submit:
        assert_type(submit, Submit)
        assert_type(await submit(area, 1), float)
        assert_type(await asyncio.gather(submit(area, 1), submit(pow, 2, 3)), tuple[float, int])
        future: concurrent.futures.Future[float] = submit(area, 1)
        print(future)
    executor = BackgroundExecutor(manager=manager)
    assert_type(executor.open(), Submit)
    await executor.close()
    await executor.close(timeout=5)
    await executor.close("5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.attach(executor)


async def coroutines() -> None:
    """The same of coroutine functions, whose results are awaited."""
    executor = AsyncBackgroundExecutor(max_concurrency=2)
    async with executor as submit:
        assert_type(submit, AsyncSubmit)
        assert_type(submit(fetch, "a"), asyncio.Task[bytes])
        assert_type(submit(fetch_later, "a"), asyncio.Task[bytes])
        assert_type(submit(fetch, "a", __reraise_on_exit__=False), asyncio.Task[bytes])
        assert_type(submit(fetch, url="a", __timeout__=None), asyncio.Task[bytes])
        assert_type(await submit(fetch, "a"), bytes)
        submit(fetch, 1)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
        submit(area, 1)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
        submit(fetch("a"))  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
        submit(fetch, "a", __timeout__="5")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    assert_type(executor.submit(fetch, "a"), asyncio.Task[bytes])
    executor.submit(fetch, 1)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    with executor:  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass


def handed_on(submit: Submit, submit_async: AsyncSubmit) -> None:
    """What the blocks give has a type by which a program hands it on."""
    assert_type(submit(area, 1), BackgroundFuture[float])
    assert_type(submit_async(fetch, "a"), asyncio.Task[bytes])
    submit(area)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    submit_async(area, 1)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    handed_on(submit_async, submit)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
