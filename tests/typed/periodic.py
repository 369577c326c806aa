"""What a type checker is to accept and to refuse of schedules and services; never run."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Literal, assert_type

from bgtasks import (
    BackgroundTaskManager,
    FirstRun,
    OnRunError,
    Overlap,
    Restart,
    RunOutcome,
    Schedule,
    Service,
    started,
)


async def refresh(table: str) -> int:
    """Return a number."""
    return len(table)


def plain() -> int:
    """Return a number."""
    return 1


async def lock() -> bool:
    """Return a bool."""
    return True


def later(now: datetime) -> datetime:
    """Return a time."""
    return now + timedelta(hours=1)


def repeated(manager: BackgroundTaskManager, first: FirstRun, overlap: Overlap, on_error: OnRunError) -> None:
    """Each option of ``every``."""
    schedule = manager.every(60, refresh, "t", first=first, jitter=1, overlap=overlap, on_error=on_error, timeout=5)
    assert_type(schedule, Schedule)
    assert_type(schedule.outcomes, list[RunOutcome])
    assert_type(schedule.next_run_seconds, float | None)
    assert_type(schedule.state, Literal["active", "paused", "stopped"])
    manager.every(None, refresh, "t", next_time=later, lock=lock, name="n", context={"a": 1})
    assert_type(manager.schedules(), list[Schedule])
    manager.every(60, plain)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.every(60, refresh, first="soon")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.every("60", refresh)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.every(60, refresh, next_time=plain)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def alert(service: Service, error: BaseException) -> None:
    """Take what ``on_give_up`` is called with."""
    print(service.name, error)


async def kept(manager: BackgroundTaskManager) -> None:
    """Each option of ``service``."""
    service = manager.service(refresh, "t", restart=Restart(max=None, wait=2), on_give_up=alert, name="n")
    assert_type(manager.service(refresh, "t", after=[service]), Service)
    assert_type(manager.services(), list[Service])
    assert_type(await service.wait_started(5), bool)
    assert_type(service.restarts, int)
    started()
    Restart(10)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    manager.service(plain)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.service(refresh, after=["n"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
