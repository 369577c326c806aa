"""The dictionaries that a manager hands out: typed, and JSON-safe except for what the user put into ``context``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias, TypedDict

__all__ = [
    "DEFAULT_NAME",
    "FinishedTask",
    "ManagerStats",
    "NameStats",
    "Outcome",
    "Overflow",
    "ShutdownStats",
    "TaskInfo",
    "TaskState",
]

# The name of a task that was given none.
DEFAULT_NAME: Final = "background_task"

Outcome: TypeAlias = Literal["completed", "failed", "cancelled", "timed_out", "abandoned"]
TaskState: TypeAlias = Literal["queued", "running", "completed", "failed", "cancelled", "timed_out", "abandoned"]

# What becomes of new work that finds something full, for every option ``overflow`` of the package; each takes some of
# these values. ``raise`` an error; ``drop_newest`` or ``drop_oldest`` and count it; ``block`` the coroutine that waits
# for capacity; ``spool`` to the disk.
Overflow: TypeAlias = Literal["raise", "drop_newest", "drop_oldest", "block", "spool"]


class TaskInfo(TypedDict):
    """A task as it stands now.

    ``age_seconds`` counts from creation; for a task that waited for a concurrency slot, from its start.
    """

    task_id: int
    name: str
    coroutine: str
    state: TaskState
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

    ``in_flight`` is ``running`` plus ``queued``; ``dropped`` tasks never started. ``names`` holds at most 1,000 names;
    all others are counted together under ``"(other)"``.
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
