"""The typed dictionaries that a manager returns, and the types of options that several modules name.

The dictionaries are JSON-safe except for the values in ``context``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Context
from typing import Any, Literal, TypeAlias, TypedDict

__all__ = [
    "FinishedTask",
    "Histogram",
    "LiveState",
    "LoopBlock",
    "LoopStats",
    "ManagerStats",
    "NameHistograms",
    "NameStats",
    "Outcome",
    "Overflow",
    "Progress",
    "ShutdownStats",
    "TaskFactoryOptions",
    "TaskInfo",
    "TaskOrder",
    "TaskOverflow",
    "TaskState",
    "TimeoutAction",
    "TimeoutPolicy",
]

Outcome: TypeAlias = Literal["completed", "failed", "cancelled", "timed_out", "abandoned"]
TaskState: TypeAlias = Literal[
    "queued", "waiting", "running", "completed", "failed", "cancelled", "timed_out", "abandoned"
]
# The states of tasks that have not ended.
LiveState: TypeAlias = Literal["queued", "waiting", "running"]

# The orders of ``get_task_info``: by age, or by name.
TaskOrder: TypeAlias = Literal["oldest", "newest", "name"]

# The values of all options ``overflow`` of the package, for new work at a limit; each option takes some of them:
# ``raise`` an error; ``drop_newest`` or ``drop_oldest`` and count it; ``block`` the coroutine until there is capacity;
# ``spool`` to the disk.
Overflow: TypeAlias = Literal["raise", "drop_newest", "drop_oldest", "block", "spool"]
TaskOverflow: TypeAlias = Literal["raise", "drop_newest"]

# What ``wait_for_all`` does at its own timeout: log a warning and return, or raise a TimeoutError.
TimeoutAction: TypeAlias = Literal["warn", "raise"]

# What awaiting a task whose timeout is over raises: the CancelledError of its cancellation, or a TimeoutError.
TimeoutPolicy: TypeAlias = Literal["cancel", "raise"]


class Progress(TypedDict):
    """What a task last passed to ``bgtasks.progress``."""

    done: float
    total: float | None
    text: str | None


class TaskInfo(TypedDict):
    """The current state of a task.

    ``age_seconds`` counts from creation; for a task that waited for a concurrency slot, from its start. A submitted
    function that failed is ``"waiting"`` until its next ``attempt`` begins, in ``next_attempt_seconds``.
    ``time_left_seconds`` is what is left of ``timeout``, None without one. ``parent_id`` is the task of the same
    manager and loop that created it. ``loop`` is a label of its loop, or of the threads of its executor; ``thread`` the
    name of the thread that first used the manager on that loop, None for functions. ``origin`` is file and line of its
    creation where the manager has ``track_origin=True``; ``progress`` what it passed to ``bgtasks.progress``.
    """

    task_id: int
    name: str
    coroutine: str
    state: TaskState
    age_seconds: float
    timeout: float | None
    context: Mapping[str, Any]
    attempt: int
    next_attempt_seconds: float | None
    done: bool
    cancelled: bool
    service: bool
    time_left_seconds: float | None
    parent_id: int | None
    loop: str | None
    thread: str | None
    origin: str | None
    progress: Progress | None


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
    """Counters and durations of all tasks of one name; a percentile is None before the first task ended.

    Durations are counted in buckets, eight for each doubling from a microsecond on. A percentile is the middle of a
    bucket: at most 6.25 % off, rounded to three digits. A wait is the time from the creation of a task to its first
    step: in the queue of the loop, and for a concurrency slot; in a burst of tasks, the compiled registry may count 3 %
    less. ``last_error`` is the type of the last failure.
    """

    started: int
    in_flight: int
    completed: int
    failed: int
    cancelled: int
    timed_out: int
    abandoned: int
    p50_seconds: float | None
    p90_seconds: float | None
    p99_seconds: float | None
    max_seconds: float | None
    wait_p50_seconds: float | None
    wait_p99_seconds: float | None
    wait_max_seconds: float | None
    last_error: str | None


class Histogram(TypedDict):
    """A histogram of lengths of time.

    ``buckets`` has a pair for each bucket in use: its index in ``bgtasks.BUCKET_EDGES``, the tuple of upper edges in
    seconds, and its count. ``max_seconds`` is None before the first.
    """

    count: int
    sum_seconds: float
    max_seconds: float | None
    buckets: list[tuple[int, int]]


class NameHistograms(TypedDict):
    """The durations of all tasks of one name, and their waits from the creation to the first step."""

    duration: Histogram
    wait: Histogram


class LoopBlock(TypedDict):
    """A time during which an event loop was blocked; ``stack`` has its frames, the innermost of the user first.

    ``task_id``, ``task`` and ``age_seconds`` are None if it was blocked by a callback, and ``task_id`` for a task of no
    manager. ``seconds`` is None while it lasts.
    """

    task_id: int | None
    task: str | None
    age_seconds: float | None
    stack: list[str]
    seconds: float | None


class LoopStats(TypedDict):
    """Figures of an event loop since ``watch_loop``.

    ``lag`` has the lateness of each beat. ``blocked`` counts the times at which the loop was blocked for longer than
    ``threshold_seconds``, ``blocked_seconds`` is their sum, ``last_block`` the last of them.
    """

    loop: str
    thread: str
    threshold_seconds: float
    blocked: int
    blocked_seconds: float
    last_block: LoopBlock | None
    lag: Histogram


class ManagerStats(TypedDict):
    """Counters of one manager since it was made; ``started`` is the sum of ``in_flight`` and the five outcomes.

    ``in_flight`` is ``running`` plus ``queued`` plus ``waiting``; ``dropped`` tasks never started; ``retried`` counts
    the attempts of submitted functions after their first ones, ``given_up`` the services that are not restarted any
    more. ``names`` holds at most 1,000 names; all others are counted together under ``"(other)"``.
    """

    started: int
    in_flight: int
    running: int
    queued: int
    waiting: int
    completed: int
    failed: int
    cancelled: int
    timed_out: int
    abandoned: int
    dropped: int
    retried: int
    given_up: int
    names: dict[str, NameStats]


class ShutdownStats(TypedDict):
    """The result of ``shutdown``.

    ``status`` is ``"completed"``, ``"timeout"`` (tasks remained, ``remaining_names`` says which) or
    ``"already_shutdown"``.
    """

    status: Literal["completed", "timeout", "already_shutdown"]
    initial_tasks: int
    completed_tasks: int
    remaining_tasks: int
    duration_seconds: float
    remaining_names: list[str]


class TaskFactoryOptions(TypedDict, total=False):
    """The arguments that an event loop passes to ``task_factory`` besides the coroutine."""

    name: str | None
    context: Context | None
    eager_start: bool | None
