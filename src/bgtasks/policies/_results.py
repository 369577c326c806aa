"""The results of submitted functions, kept for a time after their ends."""

from __future__ import annotations

import heapq
import time
from asyncio.events import _get_running_loop
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

from bgtasks import errors
from bgtasks._fork import ForkLock
from bgtasks._notifier import Notifier
from bgtasks.info import Progress, TaskState
from bgtasks.registry import Record

__all__ = ["MAX_RESULTS", "Results", "TaskResult"]

# How many results a manager keeps; then the oldest goes, even if its time has not come.
MAX_RESULTS: Final = 10_000


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The state of a submitted function and, once it has ended, its outcome and its result.

    Args:
        task_id: the id of the task.
        name: its name.
        state: how it stands, or how it ended.
        result: what the function returned; None unless ``state`` is ``"completed"``.
        error: the type and text of the failure, None unless ``state`` is ``"failed"``.
        progress: what it last passed to ``bgtasks.progress``, None if nothing.
        ended_at: a point on the wall clock, in seconds since 1970; None before its end.

    """

    task_id: int
    name: str
    state: TaskState
    result: Any = None
    error: str | None = None
    progress: Progress | None = None
    ended_at: float | None = None

    @property
    def done(self) -> bool:
        """True once the task has ended."""
        return self.ended_at is not None


class Results:
    """The results that a manager keeps, and the tasks whose results it will keep. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = ForkLock()
        self._live: dict[int, Record] = {}
        self._kept: OrderedDict[int, TaskResult] = OrderedDict()
        # (time on the monotonic clock, task id) of each kept result; ids that are gone are removed now and then.
        self._ends: list[tuple[float, int]] = []
        self._waiting: dict[int, Notifier] = {}
        self._has_timer = False

    def follow(self, record: Record) -> None:
        """Remember a task whose result is to be kept, unless it has ended."""
        if record.loop is not None:
            self._live[record.task_id] = record

    def _ended(self, record: Record, error: BaseException | None) -> None:
        """Keep the result of a task that has just ended; called by the registry."""
        submission = record.submission
        outcome: Any = record.outcome
        failure = errors.text_of(error) if outcome == "failed" and error is not None else None
        progress = record.info()["progress"]
        kept = TaskResult(record.task_id, record.name, outcome, submission.result, failure, progress, time.time())
        with self._lock.lock:
            self._drop_old()
            self._kept[kept.task_id] = kept
            heapq.heappush(self._ends, (time.monotonic() + submission.keep, kept.task_id))
            if len(self._kept) > MAX_RESULTS:
                self._kept.popitem(last=False)
            if len(self._ends) > 2 * MAX_RESULTS:
                self._ends = [entry for entry in self._ends if entry[1] in self._kept]
                heapq.heapify(self._ends)
            self._live.pop(kept.task_id, None)
            waiting = self._waiting.pop(kept.task_id, None)
        if waiting is not None:
            waiting.notify()
        self._set_timer()

    def _drop_old(self) -> None:
        now = time.monotonic()
        while self._ends and self._ends[0][0] <= now:
            self._kept.pop(heapq.heappop(self._ends)[1], None)

    def _set_timer(self) -> None:
        """Have the results whose time has come dropped although nothing asks for them."""
        loop = _get_running_loop()
        if not self._has_timer and loop is not None:
            self._has_timer = True
            loop.call_later(max(self._ends[0][0] - time.monotonic(), 0.0) + 0.001, self._on_timer)

    def _on_timer(self) -> None:
        self._has_timer = False
        with self._lock.lock:
            self._drop_old()
            is_empty = not self._ends
        if not is_empty:
            self._set_timer()

    def get(self, task_id: int) -> TaskResult:
        """Return the state of a task.

        Raises:
            UnknownTaskError: no result of this id is kept or to be kept.

        """
        with self._lock.lock:
            self._drop_old()
            kept = self._kept.get(task_id)
            record = self._live.get(task_id)
        if kept is not None:
            return kept
        if record is None or record.loop is None:
            raise errors.UnknownTaskError(
                f"no result is kept for the task {errors.describe(task_id)}: it was submitted without keep_result=, or "
                "its time is over"
            )
        info = record.info()
        return TaskResult(task_id, info["name"], info["state"], progress=info["progress"])

    async def wait(self, task_id: int, timeout: float | None) -> TaskResult:
        """Wait for the end of a task, at most ``timeout`` seconds; return its state."""
        result = self.get(task_id)
        if result.done:
            return result
        with self._lock.lock:
            waiting = self._waiting.setdefault(task_id, Notifier())
        await waiting.wait_until(lambda: task_id not in self._live, timeout)
        return self.get(task_id)
