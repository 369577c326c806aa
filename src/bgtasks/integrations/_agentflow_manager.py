"""The manager that takes the place of agentflow's and 10xGraph's: our own, with their defaults, names and texts."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Coroutine, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from bgtasks import errors
from bgtasks.info import ShutdownStats
from bgtasks.manager import SECOND_CANCEL_GRACE, BackgroundTaskManager, checked_wait, log_extra, users_part
from bgtasks.registry import DEFAULT_NAME, Record

if TYPE_CHECKING:
    from bgtasks.integrations._agentflow_metrics import Totals

Result = TypeVar("Result")


class FrameworkManager(BackgroundTaskManager):
    """A manager with the behaviour that the programs of one framework know; ``install`` derives one class for each.

    Args:
        default_shutdown_timeout: seconds that ``shutdown`` takes at most, >= 0.
        max_pending_tasks: how many tasks may be in flight; a new one is then dropped. 0 for no cap.

    """

    # The module whose class this one replaces. Its logger is looked up at each use: tests put another in its place.
    _framework: ClassVar[ModuleType]
    _totals: ClassVar[Totals]
    _drains: ClassVar[float]

    # InjectQ takes every annotated parameter for one that it may fill in: there are these two and no more.
    def __init__(self, default_shutdown_timeout: float = 30.0, max_pending_tasks: int = 1000) -> None:
        self._levels: dict[int, bool] = {}
        super().__init__(default_shutdown_timeout, max_pending_tasks, overflow="drop_new", drain_timeout=self._drains)
        self._totals.add(self)

    def __del__(self) -> None:
        self._totals.retire(self)

    def create_task(
        self,
        coro: Coroutine[Any, Any, Result],
        *,
        name: str = DEFAULT_NAME,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
        eager_start: bool = False,
        contextvars_context: contextvars.Context | None = None,
    ) -> asyncio.Task[Result]:
        """Do as ``BackgroundTaskManager.create_task``; a timeout of 0 is none, and a shut manager takes work, too."""
        logger = self._framework.logger
        debug = self._levels[logging.DEBUG] = logger.isEnabledFor(logging.DEBUG)
        task = super().create_task(
            coro,
            name=name,
            timeout=timeout or None,
            context=context,
            eager_start=eager_start,
            contextvars_context=contextvars_context,
        )
        if task is None:
            return task
        if task._source_traceback and task._source_traceback[-1].filename == __file__:  # type: ignore[attr-defined]
            # In debug mode a task tells where it was created: not here.
            del task._source_traceback[-1]  # type: ignore[attr-defined]
        if debug:
            logger.debug("Created background task: %s (timeout=%s)", name, timeout, extra={"task_context": context})
        return task

    async def cancel_all(self) -> None:
        """Do as ``BackgroundTaskManager.cancel_all``, and say so in the log."""
        if self._owned():
            self._logger.info("Cancelling %d background tasks...", self._owned())
            await super().cancel_all()

    async def wait_for_all(self, timeout: float | None = None, return_exceptions: bool = False) -> None:
        """Do as ``BackgroundTaskManager.wait_for_all``, and say so in the log; a timeout of 0 is none."""
        if not self._owned():
            return
        self._logger.info("Waiting for %d background tasks to finish...", self._owned())
        if await self._all_ended(timeout or None, return_exceptions):
            self._logger.info("All background tasks finished.")
        else:
            self._logger.warning("Timeout waiting for background tasks, some may still be running")
            self._totals.count("wait_timeout")

    async def shutdown(self, timeout: float | None = None, *, drain: float | None = None) -> ShutdownStats:
        """Do as ``BackgroundTaskManager.shutdown``, but take no longer than ``timeout``, draining included.

        The result of a second call has ``tasks_remaining``, too.
        """
        timeout = self._default_shutdown_timeout if timeout is None else timeout
        drain = self._drain_timeout if drain is None else drain
        checked_wait("timeout", timeout, errors.InvalidTimeoutError)
        drain = min(checked_wait("drain", drain, errors.InvalidTimeoutError), timeout)
        if self._phase == "open":
            self._logger.info(
                "Initiating graceful shutdown of BackgroundTaskManager (%d tasks, timeout=%ss)", self._owned(), timeout
            )
        else:
            self._logger.debug("BackgroundTaskManager already shut down")
        # Tasks that drained to the end of the time still need a moment to hear of their cancellation.
        rest = max(timeout - drain, SECOND_CANCEL_GRACE) if drain else timeout
        stats = await super().shutdown(rest, drain=drain)
        if stats["status"] == "completed":
            self._logger.info(
                "BackgroundTaskManager shutdown completed: %d/%d tasks finished (%.2fs)",
                stats["completed_tasks"],
                stats["initial_tasks"],
                stats["duration_seconds"],
            )
            self._totals.count("shutdown_completed")
        elif stats["status"] == "timeout":
            self._logger.warning(
                "BackgroundTaskManager shutdown timed out: %d tasks still running after %.2fs",
                stats["remaining_tasks"],
                stats["duration_seconds"],
            )
            self._totals.count("shutdown_timeout")
        else:
            again: Any = {**stats, "tasks_remaining": stats["remaining_tasks"]}
            stats = again
        return stats

    @property
    def _task_metadata(self) -> dict[asyncio.Task[Any], Any]:
        """A dict with the framework's own ``TaskMetadata`` for each live task, made for the caller."""
        return {task: self._framework.TaskMetadata(*data) for task, data in super()._task_metadata.items()}

    # -- the manager's choices ----------------------------------------------------------------------------------------

    @property
    def _logger(self) -> logging.Logger:
        logger: logging.Logger = self._framework.logger
        return logger

    def _muted_levels(self) -> dict[int, bool]:
        # Filled by create_task, so that a logger put in the place of the framework's is heeded.
        return self._levels

    def _takes_work(self) -> bool:
        # A default value of a function may hold the manager of a graph that is long closed.
        return True

    def _cancel_others(self) -> None:
        others = len(self._others())
        # Not for the second time, which is for stragglers.
        if others and self._phase != "cancelling":
            self._logger.info("Cancelling %d background tasks...", others)
        super()._cancel_others()

    def _log_drop(self, name: str) -> None:
        self._logger.warning(
            "Background task queue is full (%d in flight); dropping task '%s'. %d dropped so far.",
            self._owned(),
            name,
            self._dropped,
        )

    def _report(self, record: Record, error: BaseException | None) -> None:
        outcome = record.outcome
        if outcome not in ("completed", "cancelled", "timed_out"):
            super()._report(record, error)
        elif self._logger.isEnabledFor(logging.DEBUG):
            arguments: tuple[Any, ...] = ("Background task '%s' was cancelled", record.name)
            if outcome == "completed":
                text = "Background task '%s' completed successfully (duration=%.2fs)"
                arguments = (text, record.name, record.duration)
            self._guarded(record, self._logger.debug, *arguments, extra=log_extra(record))

    def _log_failure(self, record: Record, error: BaseException) -> None:
        # Formatted here, not by the logger: tests of the frameworks' programs read the text from a logger's arguments.
        text = f"Background task raised an exception - {record.name}: {error} (duration={record.duration:.2f}s)"
        self._logger.error(text, exc_info=users_part(error), extra=log_extra(record))
