"""The dictionaries that a manager hands out: typed, JSON-safe but for what the user put into ``context``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypedDict

__all__ = ["FinishedTask", "ManagerStats", "NameStats", "Outcome", "ShutdownStats", "TaskInfo", "TaskMetadata"]

Outcome = Literal["completed", "failed", "cancelled", "timed_out", "abandoned"]


class TaskInfo(TypedDict):
    """A task as it stands now.

    ``age_seconds`` counts from creation, for a task that had to wait for a place from its start. ``state`` is
    ``"queued"``, ``"running"`` or an outcome.
    """

    task_id: int
    name: str
    coroutine: str
    state: str
    age_seconds: float
    timeout: float | None
    context: Mapping[str, Any]
    done: bool
    cancelled: bool


class FinishedTask(TypedDict):
    """A finished task as the history remembers it: plain values that keep nothing alive.

    ``ended_at`` is a point on the wall clock, in seconds since 1970; ``error`` is the text of a failure.
    """

    task_id: int
    name: str
    coroutine: str
    outcome: Outcome
    duration_seconds: float
    ended_at: float
    error: str | None


class NameStats(TypedDict):
    """Counters and durations of all tasks of one name; a percentile is None before the first task ended."""

    started: int
    in_flight: int
    completed: int
    failed: int
    cancelled: int
    timed_out: int
    abandoned: int
    p50_seconds: float | None
    p99_seconds: float | None


class ManagerStats(TypedDict):
    """Counters of one manager since it was made; ``started`` is the sum of ``in_flight`` and the five outcomes.

    ``in_flight`` is ``running`` plus ``queued``; ``dropped`` tasks never started. ``names`` holds at most 1,000 names,
    the rest is counted together under ``"(other)"``.
    """

    started: int
    in_flight: int
    running: int
    queued: int
    completed: int
    failed: int
    cancelled: int
    timed_out: int
    abandoned: int
    dropped: int
    names: dict[str, NameStats]


class ShutdownStats(TypedDict):
    """What ``shutdown`` did.

    ``status`` is ``"completed"``, ``"timeout"`` (tasks remained, ``remaining_names`` says which) or
    ``"already_shutdown"``.
    """

    status: Literal["completed", "timeout", "already_shutdown"]
    initial_tasks: int
    completed_tasks: int
    remaining_tasks: int
    duration_seconds: float
    remaining_names: list[str]


class TaskMetadata(NamedTuple):
    """What a manager's ``_task_metadata`` holds on one live task; ``created_at`` is a point on the wall clock."""

    name: str
    created_at: float
    timeout: float | None
    context: Mapping[str, Any]
