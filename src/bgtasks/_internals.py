"""The one internal interface of managers, for executors, programs and integrations; users do not see it."""

# ruff: noqa: SLF001  this file gives access to the private parts of a manager

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bgtasks.errors import InvalidOptionError, describe
from bgtasks.manager import BackgroundTaskManager
from bgtasks.registry import LoopRecords, Record, Submission, TaskSet

__all__ = ["ManagerInternals"]


class _Owner(NamedTuple):
    """The functions of an executor that a ``TaskSet`` and the manager call."""

    on_idle: Callable[[], object]
    accept_failure: Callable[[Record, BaseException], bool]


class ManagerInternals:
    """The private parts of a manager that the rest of the package may use.

    Args:
        manager: the manager.

    Raises:
        InvalidOptionError: ``manager`` is not a manager.

    """

    def __init__(self, manager: BackgroundTaskManager) -> None:
        # Not by isinstance: the tests run a copy of the manager on each twin.
        if not hasattr(manager, "_live_records"):
            raise InvalidOptionError(f"manager must be a BackgroundTaskManager, or None; got {describe(manager)}")
        self._manager = manager

    def live_records(self) -> list[Record]:
        """Return the records of all tasks that have not ended."""
        return self._manager._live_records()

    def owned_records(self) -> list[Record]:
        """Return the records of all tasks that have not ended and that the manager owns."""
        return [record for record in self._manager._live_records() if not record.observed]

    def release_closed_loops(self) -> None:
        """Abandon the tasks of closed loops, and log them."""
        self._manager._release_closed_loops()

    def name_what_ends(self) -> None:
        """Have ``shutdown`` name in the log the tasks that it cancels, whether it drained before or not."""
        self._manager._shutdown.names_cancelled = True

    def times(self) -> tuple[float, float]:
        """Return the manager's own ``default_shutdown_timeout`` and ``drain_timeout``."""
        return self._manager._default_shutdown_timeout, self._manager._drain_timeout

    def announce(self, cause: str, seconds: float, hint: str) -> None:
        """Log the tasks that are left, and again every few seconds until they were cancelled; see ``DrainLog``."""
        self._manager._shutdown.drain_log.announce(cause, seconds, hint)

    def hurry(self) -> None:
        """Have ``shutdown`` wait no longer: for tasks to finish, and the second time for cancelled ones to end."""
        self._manager._shutdown.hurry()

    def make_task_set(
        self,
        on_idle: Callable[[], object],
        accept_failure: Callable[[Record, BaseException], bool],
        max_running: int | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> TaskSet:
        """Return a set for the tasks or functions of an executor.

        Args:
            on_idle: called when the last task of the set has ended.
            accept_failure: called with the record and the error of a task that failed; returns whether the manager
                reports it.
            max_running: how many of them may run at once; None for no limit.
            context: the mapping for the log records of the tasks.

        """
        return self._manager._make_task_set(_Owner(on_idle, accept_failure), max_running, context)

    def make_submission(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], retry: Any
    ) -> Submission | None:
        """Return a submission that runs again as ``retry`` says; None if that is None.

        Raises:
            InvalidOptionError: ``retry`` is no policy.

        """
        policy = self._manager._policy_of(retry)
        return None if policy is None else self._manager._make_submission(function, args, kwargs, policy, None)

    def wait_after(self, record: Record, error: BaseException) -> float | None:
        """Return the seconds to wait after a failed attempt of a submission, None if no other one follows."""
        return self._manager._wait_after(record, error)

    def add_loop(self, loop: Any) -> LoopRecords:
        """Return the records of the stand-in for a loop of an executor's threads."""
        return self._manager._add_loop(loop)

    def report_timeout(self, record: Record) -> None:
        """Log that the timeout of a function has expired."""
        self._manager._report_timeout(record)

    def report_still_running(self, records: list[Record], when: str) -> None:
        """Log tasks that did not end in time."""
        self._manager._log.still_running(records, when)
