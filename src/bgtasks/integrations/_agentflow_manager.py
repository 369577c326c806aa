"""The manager that replaces agentflow's and 10xGraph's, with their defaults, names and texts."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Collection, Coroutine, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from bgtasks import errors
from bgtasks._checks import check_seconds
from bgtasks._reporting import TaskLog, log_extra, users_part
from bgtasks._shutdown import SECOND_CANCEL_GRACE
from bgtasks.info import ShutdownStats, TimeoutAction
from bgtasks.manager import BackgroundTaskManager
from bgtasks.registry import Record

if TYPE_CHECKING:
    from bgtasks.integrations._agentflow_metrics import Totals

__all__ = ["FrameworkManager"]

Result = TypeVar("Result")

# The framework's name of a task without a given name.
DEFAULT_NAME: Final = "background_task"


class FrameworkLog(TaskLog):
    """Writes the framework's texts into the framework's logger.

    Args:
        framework: the module whose manager is replaced. Its logger is looked up at each use, because tests replace it.

    """

    def __init__(self, framework: ModuleType) -> None:
        self._framework = framework
        self._levels: dict[int, bool] = {}

    @property
    def logger(self) -> logging.Logger:
        """The framework's logger."""
        logger: logging.Logger = self._framework.logger
        return logger

    def muted_levels(self) -> dict[int, bool]:
        """Return a dict that ``is_debug`` fills, so that a replaced logger of the framework counts."""
        return self._levels

    def is_debug(self) -> bool:
        """Return whether the level DEBUG is on now."""
        debug = self._levels[logging.DEBUG] = self.logger.isEnabledFor(logging.DEBUG)
        return debug

    def ended(self, record: Record) -> None:
        """Log the end of a task that did not fail."""
        outcome = record.outcome
        if outcome == "abandoned":
            super().ended(record)
        else:
            arguments: tuple[Any, ...] = ("Background task '%s' was cancelled", record.name)
            if outcome == "completed":
                text = "Background task '%s' completed successfully (duration=%.2fs)"
                arguments = (text, record.name, record.duration)
            self.logger.debug(*arguments, extra=log_extra(record))

    def failed(self, record: Record, error: BaseException) -> None:
        """Log a task that raised."""
        # Formatted here, not by the logger: tests of the frameworks' programs read the text from a logger's arguments.
        text = f"Background task raised an exception - {record.name}: {error} (duration={record.duration:.2f}s)"
        self.logger.error(text, exc_info=users_part(error), extra=log_extra(record))

    def timed_out(self, record: Record) -> None:
        """Log a task whose timeout has expired, in the framework's words."""
        self.logger.warning(
            "Background task '%s' timed out after %s seconds", record.name, record.timeout, extra=log_extra(record)
        )

    def dropped(self, name: str, reason: str, in_flight: int, total: int) -> None:
        """Log a task that was dropped at the limit."""
        self.logger.warning(
            "Background task queue is full (%d in flight); dropping task '%s'. %d dropped so far.",
            in_flight,
            name,
            total,
        )

    def cancelling(self, count: int) -> None:
        """Log that tasks are cancelled."""
        self.logger.info("Cancelling %d background tasks...", count)


class FrameworkManager(BackgroundTaskManager):
    """A manager with the behaviour that the programs of one framework expect; ``install`` derives one class for each.

    Args:
        default_shutdown_timeout: seconds that ``shutdown`` takes at most, >= 0.
        max_pending_tasks: how many tasks may be in flight; further ones are dropped. 0 for no limit.

    """

    # The module whose class this one replaces.
    _framework: ClassVar[ModuleType]
    _totals: ClassVar[Totals]
    _drains: ClassVar[float]
    _log: FrameworkLog

    # No further parameters: InjectQ tries to fill in every annotated one.
    def __init__(self, default_shutdown_timeout: float = 30.0, max_pending_tasks: int = 1000) -> None:
        super().__init__(
            default_shutdown_timeout,
            None if max_pending_tasks == 0 else max_pending_tasks,
            overflow="drop_newest",
            drain_timeout=self._drains,
        )
        self._totals.add(self)

    def __del__(self) -> None:
        self._totals.retire(self)

    def _make_log(self) -> FrameworkLog:
        return FrameworkLog(self._framework)

    def create_task(
        self,
        coro: Coroutine[Any, Any, Result],
        *,
        name: str | None = DEFAULT_NAME,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
        eager_start: bool = False,
        contextvars_context: contextvars.Context | None = None,
        service: bool = False,
        retry: None = None,
    ) -> asyncio.Task[Result]:
        """Do as ``BackgroundTaskManager.create_task``, but return None for a task that is dropped at the limit.

        A timeout of 0 means no timeout, and a manager that was shut down still accepts work.
        """
        debug = self._log.is_debug()
        name = DEFAULT_NAME if name is None else name
        try:
            task = super().create_task(
                coro,
                name=name,
                timeout=timeout or None,
                context=context,
                eager_start=eager_start,
                contextvars_context=contextvars_context,
                service=service,
                retry=retry,
            )
        except errors.TaskRejectedError:
            self._count_drop(name)
            # The framework's programs expect None, although the inherited type excludes it.
            return None  # type: ignore[return-value]
        trace = task._source_traceback  # type: ignore[attr-defined]  # noqa: SLF001  asyncio's debug mode
        if trace and trace[-1].filename == __file__:
            # In debug mode a task shows where it was created; this frame is not the place.
            del trace[-1]
        if debug:
            self._log.logger.debug(
                "Created background task: %s (timeout=%s)", name, timeout, extra={"task_context": context}
            )
        return task

    async def cancel_all(self) -> None:
        """Do as ``BackgroundTaskManager.cancel_all``, and log it."""
        if self._owned():
            self._log.cancelling(self._owned())
            await super().cancel_all()

    async def wait_for_all(
        self,
        timeout: float | None = None,
        return_exceptions: bool = False,
        *,
        names: str | Collection[str] | None = None,
        as_group: bool = False,
        on_timeout: TimeoutAction = "warn",
    ) -> list[BaseException]:
        """Do as ``BackgroundTaskManager.wait_for_all``, and log it; a timeout of 0 means no limit."""
        if not self._owned():
            return []
        self._log.logger.info("Waiting for %d background tasks to finish...", self._owned())
        return await super().wait_for_all(
            timeout or None,
            names=names,
            return_exceptions=return_exceptions,
            as_group=as_group,
            on_timeout=on_timeout,
        )

    def _report_wait(self, expired: str | None) -> None:
        if expired is None:
            self._log.logger.info("All background tasks finished.")
        else:
            self._log.logger.warning("Timeout waiting for background tasks, some may still be running")
            self._totals.count("wait_timeout")

    async def shutdown(self, timeout: float | None = None, *, drain: float | None = None) -> ShutdownStats:
        """Do as ``BackgroundTaskManager.shutdown``, but take no longer than ``timeout``, draining included.

        The result of a second call has ``tasks_remaining``, too.
        """
        timeout = self._default_shutdown_timeout if timeout is None else timeout
        drain = self._drain_timeout if drain is None else drain
        check_seconds("timeout", timeout, error=errors.InvalidTimeoutError)
        drain = min(check_seconds("drain", drain, error=errors.InvalidTimeoutError), timeout)
        logger = self._log.logger
        if self._shutdown.phase == "open":
            logger.info(
                "Initiating graceful shutdown of BackgroundTaskManager (%d tasks, timeout=%ss)", self._owned(), timeout
            )
        else:
            logger.debug("BackgroundTaskManager already shut down")
        # Tasks that drained to the end of the time still need a moment to end after their cancellation.
        rest = max(timeout - drain, SECOND_CANCEL_GRACE) if drain else timeout
        stats = await super().shutdown(rest, drain=drain)
        if stats["status"] == "completed":
            logger.info(
                "BackgroundTaskManager shutdown completed: %d/%d tasks finished (%.2fs)",
                stats["completed_tasks"],
                stats["initial_tasks"],
                stats["duration_seconds"],
            )
            self._totals.count("shutdown_completed")
        elif stats["status"] == "timeout":
            logger.warning(
                "BackgroundTaskManager shutdown timed out: %d tasks still running after %.2fs",
                stats["remaining_tasks"],
                stats["duration_seconds"],
            )
            self._totals.count("shutdown_timeout")
        else:
            again: Any = {**stats, "tasks_remaining": stats["remaining_tasks"]}
            stats = again
        return stats

    # -- read by tests and programs of the framework --------------------------------------------------------------

    @property
    def _tasks(self) -> set[asyncio.Task[Any]]:
        """A new set of the live tasks."""
        return {record.task for record in self._live_records() if record.task is not None}

    @property
    def _task_metadata(self) -> dict[asyncio.Task[Any], Any]:
        """A new dict with the framework's own ``TaskMetadata`` for each live task."""
        now = time.time()
        return {
            record.task: self._framework.TaskMetadata(
                record.name, now - record.duration, record.timeout, record.context
            )
            for record in self._live_records()
            if record.task is not None
        }

    # -- admission ------------------------------------------------------------------------------------------------

    def _accepts_work(self) -> bool:
        # A default value of a function may hold the manager of a graph that is long closed.
        return True
