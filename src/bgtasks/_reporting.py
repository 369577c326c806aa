"""Log records about the tasks of a manager, and the errors of logging handlers and hooks."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final

from bgtasks._locations import location_of
from bgtasks._task import users_traceback
from bgtasks.errors import describe, text_of
from bgtasks.registry import Record

__all__ = [
    "DROP_WARNING_INTERVAL",
    "TaskLog",
    "guarded",
    "listed",
    "log_extra",
    "names_of",
    "numbered",
    "place_of",
    "runs",
    "users_part",
]

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


def _complete(log_record: logging.LogRecord) -> bool:
    """Give a log record that is about no single task the attributes of those that are: a formatter may name them."""
    attributes = vars(log_record)
    attributes.setdefault("task_id", None)
    attributes.setdefault("task_name", None)
    attributes.setdefault("task_context", {})
    return True


# A filter of a logger sees what is logged there, not what comes from the loggers below it.
for _name in ("bgtasks", "bgtasks.events"):
    logging.getLogger(_name).addFilter(_complete)


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
            "Background task '%s' failed after %.3f s: %s%s%s",
            record.name,
            record.duration,
            text_of(error),
            _attempts_of(record),
            _context_of(record),
            exc_info=users_part(error),
            extra=log_extra(record),
        )

    def timed_out(self, record: Record) -> None:
        """Log a task whose timeout has expired."""
        self.logger.warning(
            "Background task '%s' timed out after %s seconds, %s%s",
            record.name,
            record.timeout,
            place_of(record),
            _context_of(record),
            extra=log_extra(record),
        )

    def abandoned(self, names: dict[str, int]) -> None:
        """Log tasks that a closed loop left behind."""
        self.logger.warning(
            "A closed event loop left %s behind, abandoned: %s",
            numbered(sum(names.values())),
            listed(names),
        )

    def cancelled_by_loop(self, names: dict[str, int]) -> None:
        """Log tasks that the owner of their loop cancels, for nobody has shut the manager down."""
        self.logger.warning(
            "The event loop ends and cancels %s, which nobody waited for: %s. Shut the manager down first: enter it "
            "with 'async with', or await shutdown()",
            numbered(sum(names.values())),
            listed(names),
        )

    def cancelled_by_shutdown(self, names: dict[str, int], initial: int) -> None:
        """Log tasks that ``shutdown`` cancelled, after their time to finish."""
        self.logger.warning("Shutdown cancelled %d of %s: %s", sum(names.values()), numbered(initial), listed(names))

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
                "Background task '%s' still runs at the end of %s, %s%s",
                record.name,
                when,
                place_of(record),
                _context_of(record),
                extra=log_extra(record),
            )
        if len(records) > MOST_NAMED:
            count = len(records) - MOST_NAMED
            self.logger.warning("%s still %s at the end of %s", numbered(count, "more "), runs(count), when)


def log_extra(record: Record) -> dict[str, Any]:
    """Return the attributes of every log record about a task."""
    return {"task_id": record.task_id, "task_name": record.name, "task_context": record.context}


def place_of(record: Record) -> str:
    """Return where the coroutine of a task stands, or the function of an executor."""
    return str(record.coro.location()) if hasattr(record.coro, "location") else location_of(record.coro)


def _context_of(record: Record) -> str:
    """Return the context of a task for the end of a log record, nothing where there is none."""
    return f"; context: {describe(dict(record.context))}" if record.context else ""


def _attempts_of(record: Record) -> str:
    """Return the end of the log record about a failure: the attempts, if there were several."""
    submission = record.submission
    failures = None if submission is None else submission.failures
    return "" if failures is None else str(failures.text(submission.attempt))


def users_part(error: BaseException) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    """Return an error for ``exc_info``, with its traceback from the user's first frame on."""
    return type(error), error, users_traceback(error)


def numbered(count: int, more: str = "") -> str:
    """Return a number of background tasks as text: "1 background task", "2 background tasks"."""
    return f"{count} {more}background task{'' if count == 1 else 's'}"


def runs(count: int) -> str:
    """Return the verb to ``numbered``."""
    return "runs" if count == 1 else "run"


def names_of(records: Sequence[Record]) -> Counter[str]:
    """Return the names of tasks, each with the number of tasks."""
    return Counter([record.name for record in records])


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
