"""What a manager writes into the log about its tasks, and where the errors of logging handlers and hooks go."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final

from bgtasks._task import users_traceback
from bgtasks.registry import Record

__all__ = ["DROP_WARNING_INTERVAL", "TaskLog", "guarded", "listed", "location_of", "log_extra", "users_part"]

logger = logging.getLogger("bgtasks")

# Seconds, at least, between two warnings that the manager is full.
DROP_WARNING_INTERVAL: Final = 5.0
# How many of the tasks that would not end the log names; it counts the others.
MOST_NAMED: Final = 20
ENDED: Final = {
    "completed": "Background task '%s' completed after %.3f s",
    "cancelled": "Background task '%s' was cancelled after %.3f s",
    "abandoned": "Background task '%s' was closed from outside after %.3f s",
    "timed_out": "Background task '%s' ended after its timeout, %.3f s old",
}


class TaskLog:
    """Writes log records about tasks: success and cancellation DEBUG, a timeout WARNING, a failure ERROR.

    A framework whose manager is replaced by ours derives from it, to write its own texts into its own logger.
    """

    @property
    def logger(self) -> logging.Logger:
        """The logger."""
        return logger

    def muted_levels(self) -> dict[int, bool] | None:
        """Return a dict in which the registry looks up whether only failures are reported; None to report all."""
        # While DEBUG is off the logger's own cache says so: one dict look-up per task instead of a call.
        return getattr(self.logger, "_cache", None)

    def is_debug(self) -> bool:
        """Return whether the level DEBUG is on now; ``ended`` is called only then."""
        return self.logger.isEnabledFor(logging.DEBUG)

    def ended(self, record: Record) -> None:
        """Log a task that ended otherwise than by a failure."""
        self.logger.debug(ENDED[record.outcome], record.name, record.duration, extra=log_extra(record))

    def failed(self, record: Record, error: BaseException) -> None:
        """Log a task that raised."""
        self.logger.error(
            "Background task '%s' failed after %.3f s: %s: %s",
            record.name,
            record.duration,
            type(error).__name__,
            error,
            exc_info=users_part(error),
            extra=log_extra(record),
        )

    def timed_out(self, record: Record) -> None:
        """Log a task whose timeout is over."""
        self.logger.warning(
            "Background task '%s' timed out after %s seconds", record.name, record.timeout, extra=log_extra(record)
        )

    def abandoned(self, names: dict[str, int]) -> None:
        """Log tasks that a closed loop left behind."""
        self.logger.warning(
            "A closed event loop left %d background tasks behind; they are abandoned: %s",
            sum(names.values()),
            listed(names),
        )

    def dropped(self, name: str, reason: str, in_flight: int, total: int) -> None:
        """Log a task that was dropped at the limit; called once in ``DROP_WARNING_INTERVAL``."""
        self.logger.warning(
            "%s Dropped %d so far; the next warning comes in %.0f s at the earliest.",
            reason,
            total,
            DROP_WARNING_INTERVAL,
        )

    def cancelling(self, count: int) -> None:
        """Take note that ``shutdown`` cancels tasks."""

    def still_running(self, records: Sequence[Record], when: str) -> None:
        """Log tasks that did not end, each with the place where it is suspended."""
        for record in records[:MOST_NAMED]:
            self.logger.warning(
                "Background task '%s' still runs at the end of %s, %s",
                record.name,
                when,
                location_of(record.coro),
                extra=log_extra(record),
            )
        if len(records) > MOST_NAMED:
            self.logger.warning("%d more background tasks still run at the end of %s", len(records) - MOST_NAMED, when)


def log_extra(record: Record) -> dict[str, Any]:
    """Return the attributes of every log record about a task."""
    return {"task_id": record.task_id, "task_name": record.name, "task_context": record.context}


def users_part(error: BaseException) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    """Return an error for ``exc_info``, its traceback from the user's first frame on."""
    return type(error), error, users_traceback(error)


def location_of(coro: Any) -> str:
    """Return where a suspended coroutine stands: file, line and function of its innermost frame."""
    frame = None
    while coro is not None and getattr(coro, "cr_frame", None) is not None:
        frame = coro.cr_frame
        coro = getattr(coro, "cr_await", None)
    if frame is None:
        return "location unknown"
    return f"at {frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"


def listed(names: dict[str, int]) -> str:
    """Return names as text, each with its number, sorted; those with none are left out."""
    return ", ".join(f"{name} ({count})" for name, count in sorted(names.items()) if count)


def guarded(record: Record, function: Callable[..., object], *args: Any) -> None:
    """Call a hook or a logging handler, which may be the user's; its error goes to the loop's exception handler."""
    try:
        function(*args)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        loop = record.loop
        if loop is not None:
            loop.call_exception_handler(
                {
                    "message": f"Reporting on background task {record.name!r} failed",
                    "exception": error,
                    # Not under the key "task": the loop would enter that task's context, which is entered now.
                    "task_id": record.task_id,
                    "task_name": record.name,
                }
            )
