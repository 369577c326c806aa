"""Log records about the tasks of a manager, and the errors of logging handlers and hooks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final

from bgtasks._task import users_traceback
from bgtasks.registry import Record

__all__ = ["DROP_WARNING_INTERVAL", "TaskLog", "guarded", "listed", "location_of", "log_extra", "users_part"]

logger = logging.getLogger("bgtasks")

# Minimum seconds between two "manager is full" warnings.
DROP_WARNING_INTERVAL: Final = 5.0
# How many tasks that did not end are named in the log; the others are counted.
MOST_NAMED: Final = 20
ENDED: Final = {
    "completed": "Background task '%s' completed after %.3f s",
    "cancelled": "Background task '%s' was cancelled after %.3f s",
    "abandoned": "Background task '%s' was closed from outside after %.3f s",
    "timed_out": "Background task '%s' ended after its timeout, %.3f s old",
}


class TaskLog:
    """Writes log records about tasks: success and cancellation DEBUG, a timeout WARNING, a failure ERROR.

    A manager for a framework derives from it, to write the framework's texts into the framework's logger.
    """

    @property
    def logger(self) -> logging.Logger:
        """The logger."""
        return logger

    def muted_levels(self) -> dict[int, bool] | None:
        """Return a dict from which the registry reads whether only failures are reported; None to report all ends."""
        # The logger's own cache knows whether DEBUG is on: one dict look-up per task instead of a call.
        return getattr(self.logger, "_cache", None)

    def is_debug(self) -> bool:
        """Return whether the level DEBUG is on now; ``ended`` is called only then."""
        return self.logger.isEnabledFor(logging.DEBUG)

    def ended(self, record: Record) -> None:
        """Log the end of a task that did not fail."""
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
        """Log a task whose timeout has expired."""
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
        """Log a task that was dropped at the limit; called at most once per ``DROP_WARNING_INTERVAL``."""
        self.logger.warning(
            "%s Dropped %d so far; the next warning comes in %.0f s at the earliest.",
            reason,
            total,
            DROP_WARNING_INTERVAL,
        )

    def cancelling(self, count: int) -> None:
        """Log that ``shutdown`` cancels tasks; nothing by default."""

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
    """Return an error for ``exc_info``, with its traceback from the user's first frame on."""
    return type(error), error, users_traceback(error)


def location_of(coro: Any) -> str:
    """Return the location of a suspended coroutine: file, line and function of its innermost frame."""
    frame = None
    while coro is not None and getattr(coro, "cr_frame", None) is not None:
        frame = coro.cr_frame
        coro = getattr(coro, "cr_await", None)
    if frame is None:
        return "location unknown"
    return f"at {frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"


def listed(names: dict[str, int]) -> str:
    """Return names with their counts as text, sorted; a name with the count 0 is left out."""
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
                    # Not under the key "task": the loop would enter that task's context, which is entered already.
                    "task_id": record.task_id,
                    "task_name": record.name,
                }
            )
