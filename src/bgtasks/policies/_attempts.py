"""The attempts of a submitted function: what is between them, and what the log says of them."""

from __future__ import annotations

import logging
from asyncio import CancelledError
from collections.abc import Callable
from typing import Any, Final

from bgtasks import errors
from bgtasks._reporting import guarded, log_extra
from bgtasks.policies._retry import waits_are_skipped
from bgtasks.registry import Record

__all__ = ["Attempts", "Failures"]

logger = logging.getLogger("bgtasks")

# How many failed attempts are quoted in the log when the last one fails.
MOST_QUOTED: Final = 10


class Failures:
    """The failed attempts of one submission; made at its first failure."""

    __slots__ = ("is_given_up", "last", "next_at", "texts")

    def __init__(self) -> None:
        self.texts: list[str] = []
        # While the task waits, the failure of the last attempt; and when the next one is to begin, or the one that
        # runs began, on the loop's clock.
        self.last: BaseException | None = None
        self.next_at = 0.0
        self.is_given_up = False

    def text(self, attempt: int) -> str:
        """Return the end of the log record about the failure of the last attempt."""
        if self.is_given_up:
            return f" (given up by shutdown after attempt {attempt}: {'; '.join(self.texts)})"
        return f" (attempt {attempt}; before: {'; '.join(self.texts)})"


class Attempts:
    """Decides whether another attempt follows, for all submitted functions of one manager.

    Args:
        is_open: returns whether the manager is neither shutting down nor shut down.

    """

    def __init__(self, is_open: Callable[[], bool]) -> None:
        self._is_open = is_open
        # Attempts after the first ones.
        self.count = 0

    def wait_after(self, record: Record, error: BaseException) -> float | None:
        """Return the seconds to wait after a failed attempt, None if no other one follows."""
        submission = record.submission
        is_timeout = isinstance(error, CancelledError) and record.expired
        if is_timeout:
            error = TimeoutError(f"attempt {submission.attempt} timed out after {record.timeout} seconds")
        if not isinstance(error, Exception) or not self._is_open():
            return None
        answers: list[float | None] = []
        guarded(record, _ask, record, error, answers)
        if not answers or answers[0] is None:
            if is_timeout and submission.failures is not None:
                # A failure of the last attempt is logged as that of the task.
                guarded(record, _give_up_after_timeout, record)
            return None
        seconds = 0.0 if waits_are_skipped() else answers[0]
        failures = submission.failures
        if failures is None:
            failures = submission.failures = Failures()
        failures.last = error
        failures.texts = [*failures.texts[1 - MOST_QUOTED :], errors.text_of(error)]
        failures.next_at = _now(record) + seconds
        self.count += 1
        if not is_timeout:
            # An expired timeout is logged as such.
            guarded(record, _warn, record, error, seconds)
        return seconds

    @staticmethod
    def give_up(record: Record) -> None:
        """Fail a task that waits for its next attempt with the error of the last one; called on its loop."""
        submission, turn = record.submission, record.turn
        failures = None if submission is None else submission.failures
        if not record.waiting or failures is None or failures.last is None or (turn is not None and turn.done()):
            return
        failures.is_given_up = True
        error, failures.last = failures.last, None
        if turn is not None:
            turn.set_exception(error)
        else:
            # A function in a thread.
            record.coro.give_up(record.coro, error)

    @staticmethod
    def describe(record: Record, info: Any) -> None:
        """Add to the ``TaskInfo`` of a task that has not ended."""
        # Both are read once: the task may end in its own thread meanwhile.
        submission, loop = record.submission, record.loop
        if submission is None or loop is None:
            return
        info["attempt"] = submission.attempt
        if record.waiting and submission.failures is not None:
            info["next_attempt_seconds"] = max(submission.failures.next_at - loop.time(), 0.0)


def _ask(record: Record, error: Exception, answers: list[float | None]) -> None:
    submission = record.submission
    answers.append(submission.retry.next_wait(error, attempt=submission.attempt, elapsed=record.duration))


def _give_up_after_timeout(record: Record) -> None:
    submission = record.submission
    logger.error(
        "Background task '%s' timed out for the last time%s",
        record.name,
        submission.failures.text(submission.attempt),
        extra=log_extra(record),
    )


def _warn(record: Record, error: Exception, seconds: float) -> None:
    logger.warning(
        "Attempt %d of background task '%s' failed, the next one begins in %.3f s: %s",
        record.submission.attempt,
        record.name,
        seconds,
        errors.text_of(error),
        extra=log_extra(record),
    )


def _now(record: Record) -> float:
    loop = record.loop
    return 0.0 if loop is None else loop.time()
