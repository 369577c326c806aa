"""What a type checker is to accept and to refuse of submitted functions; never run."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta
from typing import assert_type

from bgtasks import (
    BackgroundFuture,
    BackgroundTaskManager,
    Limit,
    ManagerFire,
    ManagerSubmit,
    OnDuplicate,
    Progress,
    Rate,
    Retry,
    RetryOn,
    RetryPolicy,
    Submit,
    TaskInfo,
    TaskResult,
    UnknownTaskError,
    skip_retry_waits,
)


async def fetch(url: str, depth: int = 1) -> bytes:
    """Return bytes."""
    return url.encode() * depth


class Always:
    """A policy of the program."""

    def next_wait(self, error: Exception, *, attempt: int, elapsed: float) -> float | None:
        """Wait as many seconds as there were attempts."""
        return float(attempt)


def rules() -> None:
    """Each form of ``on``, and wrong arguments."""
    classes: RetryOn = (OSError, ValueError)
    Retry(on=OSError)
    Retry(on=classes, attempts=None, timeout=5, wait=1, max_wait=2, jitter=0, base=3)
    Retry(on=lambda error: timedelta(seconds=len(error.args)))
    policy: RetryPolicy = Retry(on=OSError)
    assert_type(policy.next_wait(OSError(), attempt=1, elapsed=0.0), float | None)
    Retry()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Retry(OSError)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Retry(on="OSError")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with skip_retry_waits():
        pass


async def submitted(manager: BackgroundTaskManager) -> None:
    """Without options a call is checked against the function; with options these are."""
    assert_type(manager.submit, ManagerSubmit)
    assert_type(manager.submit(fetch, "u"), asyncio.Task[bytes])
    assert_type(manager.submit(fetch, "u", depth=2), asyncio.Task[bytes])
    assert_type(manager.submit(fetch, "u", name="fetch", timeout=5.0, context={"a": 1}), asyncio.Task[bytes])
    assert_type(manager.submit(fetch, "u", retry=Retry(on=OSError)), asyncio.Task[bytes])
    assert_type(manager.submit(fetch, "u", retry=Always(), timeout=1), asyncio.Task[bytes])
    assert_type(await manager.submit(fetch, "u", timeout=None), bytes)
    manager.submit(fetch)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    manager.submit(fetch, 1)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    manager.submit(fetch("u"))  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    manager.submit(fetch, "u", retry=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    manager.create_task(fetch("u"), retry=Retry(on=OSError))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def keyed(manager: BackgroundTaskManager) -> None:
    """Only ``"skip"`` may return None."""
    assert_type(manager.submit(fetch, "u", key=("a", 1)), asyncio.Task[bytes])
    assert_type(manager.submit(fetch, "u", key="k", on_duplicate="replace", name="n"), asyncio.Task[bytes])
    assert_type(manager.submit(fetch, "u", name="n", key="k", on_duplicate="skip"), asyncio.Task[bytes] | None)
    manager.submit(fetch, "u", key=[])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    manager.submit(fetch, "u", key="k", on_duplicate="drop")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def kept(manager: BackgroundTaskManager) -> None:
    """Results by id."""
    assert_type(manager.submit(fetch, "u", keep_result=60), asyncio.Task[bytes])
    with contextlib.suppress(UnknownTaskError):
        assert_type(manager.result(1), TaskResult)
    result = await manager.wait(1, timeout=5)
    assert_type(result.progress, Progress | None)
    assert_type(result.done, bool)
    await manager.wait(1, 5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    result.state = "failed"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def shown(info: TaskInfo) -> None:
    """The state of an attempt."""
    assert_type(info["next_attempt_seconds"], float | None)
    assert_type(info["attempt"], int)


def chosen(mode: OnDuplicate) -> None:
    """Name the modes."""
    print(mode)


def in_threads(submit: Submit) -> None:
    """Retry plain functions."""
    assert_type(submit(len, "a", __retry__=Retry(on=ValueError)), BackgroundFuture[int])
    assert_type(submit(len, "a", __timeout__=1.0, __retry__=Always()), BackgroundFuture[int])
    submit(len, "a", __retry__=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def limits(manager: BackgroundTaskManager) -> None:
    """Fire functions, and limit how many begin."""
    fire: ManagerFire = manager.fire_function
    assert_type(fire(fetch, "url"), bool)
    assert_type(manager.fire_function(fetch, "url"), bool)
    assert_type(manager.fire_function(fetch, "url", name="fetch", timeout=1.0, retry=Retry(on=ValueError)), bool)
    manager.fire_function(fetch, 1)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    rate = Rate(100, per=1.0, burst=20)
    webhook = Limit(concurrency=10, rate=rate)
    limited = BackgroundTaskManager(rate=rate, limits={"webhook": webhook, ("user", 1): Limit(rate=rate)})
    assert_type(limited, BackgroundTaskManager)
    BackgroundTaskManager(rate=100)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Limit(10)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
