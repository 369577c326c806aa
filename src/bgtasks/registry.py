"""The bookkeeping of a manager: picks the compiled or the pure-Python hot half, and adds the cold half.

``BGTASKS_IMPLEMENTATION`` chooses: ``auto`` (the default) uses the compiled one if it was built and the GIL is on,
``cython`` requires it, ``python`` uses the other. ``IMPLEMENTATION`` is the one that runs. ``BGTASKS_WRAPPER`` chooses
what the tasks of the compiled one step; the other has native coroutines alone.
"""

from __future__ import annotations

import time
from asyncio import AbstractEventLoop, Task, current_task
from asyncio.events import _get_running_loop
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from bgtasks import errors
from bgtasks._hooks import RegistryHooks
from bgtasks._implementation import choose
from bgtasks._locks import Lock
from bgtasks._selection import check_selection, selected
from bgtasks._statistics import OTHER_NAMES, NameTotals, Snapshot
from bgtasks._task import record_of, starts_eagerly
from bgtasks.info import FinishedTask, LiveState, NameHistograms, TaskInfo, TaskOrder

__all__ = ["IMPLEMENTATION", "LoopRecords", "Record", "Registry", "Slots", "Submission", "TaskSet"]

IMPLEMENTATION: Final = choose("bgtasks._registry", "registry")

if TYPE_CHECKING or IMPLEMENTATION == "python":
    from bgtasks._registry_py import LoopRecords, Record, RegistryCore, Slots, Submission, TaskSet, TrackedTask
else:
    from bgtasks._registry import LoopRecords, Record, RegistryCore, Slots, Submission, TaskSet, TrackedTask


class Registry(RegistryCore, RegistryHooks):
    """The records of all event loops of one manager, and the queries about them.

    Only managers derive from it. Queries may be called from any thread and change nothing: the records of a closed loop
    are released when the manager is first used on another loop, and by ``shutdown``. It keeps no loop alive that has no
    live record.

    Args:
        history: how many finished tasks to remember as plain values; 0 for none.
        tracks_origin: whether to note the line that creates each task.
        cap: the number of owned tasks from which ``create_task`` and ``fire`` ask ``_admit``; None for no cap.
        max_running: how many coroutines may run at once; None for no limit.
        muted: the cache of a logger; while ``muted.get(muted_level)`` is False, only failures are reported.
        muted_level: the logging level of that report.

    """

    def __init__(
        self,
        *,
        history: int = 0,
        tracks_origin: bool = False,
        cap: int | None = None,
        max_running: int | None = None,
        muted: dict[int, bool] | None = None,
        muted_level: int = 0,
    ) -> None:
        super().__init__(cap or 0, max_running, history > 0, tracks_origin, muted, muted_level)
        # Guards the table of loops, the counters of closed loops and the ids, which several threads share.
        self._lock = Lock()
        self._history: deque[FinishedTask] = deque(maxlen=history)
        self._ids_taken = 0
        # The counters of closed loops.
        self._retired = NameTotals()
        self._eager_tasks: bool | None = None

    def _after_fork(self) -> None:
        """Make a new lock in the child of a fork, where no thread is left to release the old one."""
        self._lock = Lock()

    # -- loops ----------------------------------------------------------------------------------------------------

    def _add_loop(self, loop: AbstractEventLoop, make: Callable[..., LoopRecords] = LoopRecords) -> LoopRecords:
        records = self._by_loop.get(id(loop))
        if records is not None and records.loop is loop:
            return records
        # An earlier loop may have had the same id: it is gone.
        self._release_closed_loops()
        with self._lock:
            records = self._by_loop.get(id(loop))
            if records is None or records.loop is not loop:
                records = self._by_loop[id(loop)] = make(self, loop)
        return records

    def _bind_running_loop(self) -> None:
        """Make the running loop known before its first task, so that other threads can hand work over to it."""
        loop = _get_running_loop()
        if loop is None:
            raise errors.no_running_loop()
        self._add_loop(loop)

    def _release_closed_loops(self) -> None:
        """Abandon the tasks of closed loops, keep their counters and report the abandoned tasks by name."""
        abandoned: list[Counter[str]] = []
        try:
            with self._lock:
                for loop_id, records in list(self._by_loop.items()):
                    if _is_gone(records):
                        abandoned.append(self._abandon_all(loop_id, records))
        finally:
            # Without the lock: a handler of the log may wait for a thread that asks the manager.
            for names in filter(None, abandoned):
                self._on_abandoned(names)

    def _abandon_all(self, loop_id: int, records: LoopRecords) -> Counter[str]:
        """Abandon the tasks of a closed loop and keep its counters; return the names of the tasks."""
        live = records.snapshot()
        names = Counter([record.name for record in live])
        # Closing a coroutine may run code that comes here, too.
        self._forget_loop(loop_id)
        try:
            for record in live:
                record.abandon()
        except BaseException:
            self._by_loop[loop_id] = records
            raise
        self._retired.add(_snapshots(records))
        return names

    def _open_loops(self) -> list[LoopRecords]:
        """Return the records of every loop that is not closed."""
        with self._lock:
            return [records for records in self._by_loop.values() if not _is_gone(records)]

    # -- called by the hot half -----------------------------------------------------------------------------------

    def _has_eager_tasks(self, loop: AbstractEventLoop) -> bool:
        if self._eager_tasks is None:
            self._eager_tasks = starts_eagerly(loop)
        return self._eager_tasks

    def _reserve_ids(self, count: int) -> int:
        with self._lock:
            self._ids_taken += count
            return self._ids_taken - count

    def _make_task_set(self, owner: Any, max_running: int | None, context: Mapping[str, Any] | None) -> TaskSet:
        """Return a ``TaskSet`` for the tasks or functions of an executor."""
        return TaskSet(self, owner, max_running, context)

    # -- queries, from any thread ---------------------------------------------------------------------------------

    def get_task_count(self) -> int:
        """Return the number of tasks that have not ended, queued ones included."""
        return sum([records.owned + records.observed for records in self._open_loops()])

    def get_task_info(
        self,
        *,
        name: str | None = None,
        state: LiveState | None = None,
        older_than: float | None = None,
        limit: int | None = None,
        sort: TaskOrder | None = None,
    ) -> list[TaskInfo]:
        """Return a ``TaskInfo`` for every task that has not ended and matches all given arguments.

        Args:
            name: the name of the tasks.
            state: ``"running"``, ``"queued"`` for a concurrency slot, or ``"waiting"`` for the next attempt.
            older_than: seconds; the tasks with a greater ``age_seconds``.
            limit: how many to return at most, the first ones in the order of ``sort``; None for no limit.
            sort: ``"oldest"`` or ``"newest"`` first by ``age_seconds``, or by ``"name"``; by default in the order in
                which they were created on each loop.

        Raises:
            InvalidOptionError: an argument has an invalid value.

        """
        check_selection(name, state, older_than, limit, sort)
        found: list[TaskInfo] = []
        for records in self._open_loops():
            found += records.infos()
        return selected(found, name, state, older_than, limit, sort)

    def get_history(self) -> list[FinishedTask]:
        """Return the finished tasks that are remembered, oldest first; empty unless ``history`` was given."""
        with self._lock:
            return [finished.copy() for finished in self._history]

    def _remember(self, record: Record, error: BaseException | None) -> None:
        finished: Any = {
            "task_id": record.task_id,
            "name": record.name,
            "coroutine": record.coroutine_name,
            "outcome": record.outcome,
            "duration_seconds": record.duration,
            "ended_at": time.time(),
            "error": None if error is None else errors.text_of(error),
        }
        with self._lock:
            self._history.append(finished)

    def _owned(self) -> int:
        """Return the number of tasks that the manager owns: all but those that its task factory built."""
        return sum([records.owned for records in self._open_loops()])

    def _queued(self) -> int:
        """Return the number of tasks that wait for a concurrency slot, and of functions that wait for a thread."""
        return sum([records.queued for records in self._open_loops()])

    def _owned_by_loop(self) -> list[tuple[AbstractEventLoop, int]]:
        """Return a list of (loop, number of owned tasks)."""
        found = [(records.loop, records.owned) for records in self._open_loops()]
        # A loop without tasks may go at any time.
        return [(loop, owned) for loop, owned in found if loop is not None]

    def _live_records(self) -> list[Record]:
        """Return the records of all tasks that have not ended."""
        found: list[Record] = []
        for records in self._open_loops():
            found += records.snapshot()
        return found

    def _record_of(self, task: Task[Any]) -> Record | None:
        """Return the record of a live task of this manager, None for any other."""
        if not isinstance(task, TrackedTask):
            # A foreign factory built it, or no manager has it.
            found = [record for record in self._live_records() if record.task is task]
            return found[0] if found else None
        record: Record | None = record_of(task)
        return record if record is not None and record.registry is self else None

    def _current_record(self) -> Record | None:
        """Return the record of the running task if it is one of this manager."""
        loop = _get_running_loop()
        task = None if loop is None else current_task(loop)
        return None if task is None else self._record_of(task)

    def _waiting_record(self) -> Record | None:
        """Return the record of the running task if it is one that waits would wait for."""
        current = self._current_record()
        return None if current is None or current.observed or current.service else current

    def _others(self) -> list[Record]:
        """Return the records of all tasks that the manager owns but the calling one."""
        current = self._current_record()
        return [record for record in self._live_records() if record is not current and not record.observed]

    def _only_running_loop(self) -> AbstractEventLoop:
        """Return the one running loop that the manager serves."""
        # The stand-in for a loop of an executor's threads runs no coroutines.
        loops = [loop for loop, _ in self._owned_by_loop() if loop.is_running() and isinstance(loop, AbstractEventLoop)]
        if len(loops) == 1:
            return loops[0]
        if loops:
            raise errors.NoRunningLoopError(
                f"the manager serves {len(loops)} running event loops: pass the one to use as loop="
            )
        raise errors.NoRunningLoopError(
            "the manager knows no running event loop: enter it with 'async with', or create a task in the loop first, "
            "or pass loop="
        )

    def _counters(self) -> dict[str, Any]:
        """Return the counters of all loops, closed ones included, in total and by name."""
        totals, queued, waiting = self._merged()
        counters: dict[str, Any] = {**totals.counters(), "names": totals.by_name()}
        counters["queued"] = queued
        counters["waiting"] = waiting
        counters["running"] = counters["in_flight"] - queued - waiting
        return counters

    def histograms(self) -> dict[str, NameHistograms]:
        """Return the histograms of durations and waits by name, since the manager was made. Safe from any thread."""
        return self._merged()[0].histograms()

    def _merged(self) -> tuple[NameTotals, int, int]:
        """Return the counters of all loops, closed ones included, and the numbers of queued and of waiting tasks."""
        totals = NameTotals()
        queued = waiting = 0
        with self._lock:
            totals.add(self._retired.snapshots())
            for records in self._by_loop.values():
                totals.add(_snapshots(records))
                if _is_gone(records):
                    for record in records.snapshot():
                        totals.add_abandoned(record.name)
                else:
                    queued += records.queued
                    waiting += records.waiting
        return totals, queued, waiting

    def _request_cancel(self, record: Record) -> bool:
        """Cancel the task of a record on its own loop; return False if there is nothing to cancel."""
        loop = record.loop
        if loop is None:
            return False
        if loop is _get_running_loop():
            return bool(record.cancel())
        try:
            loop.call_soon_threadsafe(record.cancel)
        except RuntimeError:
            return False
        return True

    def _set_idle_threshold(self, loop: AbstractEventLoop, count: int) -> None:
        """Have ``_on_idle`` called each time a task ends and ``loop`` has at most ``count`` owned tasks left."""
        records = self._by_loop.get(id(loop))
        if records is not None and records.loop is loop:
            records.idle_threshold = count


def _is_gone(records: LoopRecords) -> bool:
    """Return whether the loop of these records is closed, or does not exist any more."""
    loop = records.loop
    return loop is None or loop.is_closed()


def _snapshots(records: LoopRecords) -> Iterator[tuple[str, Snapshot]]:
    for name, stats in list(records.names.items()):
        yield name, stats.snapshot()
    other = records.other_names.snapshot()
    if other[0]:
        yield OTHER_NAMES, other
