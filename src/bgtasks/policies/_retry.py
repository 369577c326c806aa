"""When a failed function runs again: the rules, without the waiting."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

from bgtasks._checks import as_seconds, check_limit, check_optional_seconds, check_seconds
from bgtasks._submit import RetryPolicy
from bgtasks.errors import InvalidOptionError, describe

__all__ = ["Retry", "RetryOn", "policy_of", "skip_retry_waits", "waits_are_skipped"]

RetryOn: TypeAlias = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool | float | timedelta]

# How many ``skip_retry_waits`` blocks are open.
_skipping = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """When a failed function runs again, and how long to wait before. The words are those of stamina.

    The wait after attempt *n* is ``wait * base ** (n - 1)`` plus a random part of ``jitter``, at most ``max_wait``.
    Cancellation, ``SystemExit`` and ``KeyboardInterrupt`` are never retried. An attempt whose timeout expired counts as
    one that raised ``TimeoutError``.

    Args:
        on: the exception class to retry on, or a tuple of them; or a function that takes the exception and returns
            True, False, or the wait, in seconds or as a ``timedelta``.
        attempts: how often the function is called at most, the first call included; None for no limit.
        timeout: seconds in all: no attempt begins later than this after the first; None for no limit.
        wait: seconds before the second attempt.
        max_wait: the longest wait, in seconds.
        jitter: the largest random addition to a wait, in seconds.
        base: the factor by which waits grow.

    Raises:
        InvalidOptionError: an argument has an invalid value.

    Example:
        >>> retry = Retry(on=(ConnectionError, TimeoutError), attempts=5, jitter=0)
        >>> [retry.next_wait(ConnectionError(), attempt=number, elapsed=0.0) for number in range(1, 6)]
        [0.1, 0.2, 0.4, 0.8, None]

    """

    on: RetryOn
    attempts: int | None = 3
    timeout: float | None = None
    wait: float = 0.1
    max_wait: float = 5.0
    jitter: float = 1.0
    base: float = 2.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_on(self.on)
        check_limit("attempts", self.attempts)
        check_optional_seconds("timeout", self.timeout)
        for option in ("wait", "max_wait", "jitter"):
            check_seconds(option, getattr(self, option))
        base = as_seconds(self.base)
        if base is None or base < 1:
            raise InvalidOptionError(f"base must be a finite number, 1 or more; got {describe(self.base)}")

    def next_wait(self, error: Exception, *, attempt: int, elapsed: float) -> float | None:
        """Return the seconds to wait before the next attempt, None to give up.

        Args:
            error: what the attempt raised.
            attempt: its number, from 1.
            elapsed: seconds since the first attempt began.

        Raises:
            InvalidOptionError: the function ``on`` returned something else than a bool or a wait.

        """
        if self.attempts is not None and attempt >= self.attempts:
            return None
        seconds = self._wait_after(error, attempt)
        if seconds is None or (self.timeout is not None and elapsed + seconds > self.timeout):
            return None
        return seconds

    def _wait_after(self, error: Exception, attempt: int) -> float | None:
        on: Any = self.on
        answer = isinstance(error, on) if isinstance(on, (type, tuple)) else on(error)
        if answer is False:
            return None
        if answer is not True:
            seconds = as_seconds(answer.total_seconds() if isinstance(answer, timedelta) else answer)
            if seconds is None:
                raise InvalidOptionError(
                    f"the function on= must return True, False, or a wait of 0 or more seconds; got {describe(answer)}"
                )
            return seconds
        try:
            # As floats: the power of a whole number would only grow.
            grown = self.wait * float(self.base) ** (attempt - 1)
        except OverflowError:
            return self.max_wait
        # Not for security: it spreads the load.
        return min(self.max_wait, grown + random.uniform(0, self.jitter))


def _check_on(on: Any) -> None:
    """Refuse what is neither exception classes nor a function."""
    kinds = on if isinstance(on, tuple) else (on,)
    if kinds and all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
        for kind in kinds:
            if not issubclass(kind, Exception):
                raise InvalidOptionError(
                    f"on must name subclasses of Exception: {kind.__name__} ends a task and is never retried"
                )
    elif isinstance(on, (type, tuple)) or not callable(on):
        raise InvalidOptionError(
            f"on must be an exception class, a tuple of them, or a function of the exception; got {describe(on)}"
        )


class _Tenacity:
    """The decisions of a ``tenacity`` retrying object: its ``retry``, ``stop`` and ``wait``."""

    def __init__(self, retrying: Any) -> None:
        self._retrying = retrying

    def next_wait(self, error: Exception, *, attempt: int, elapsed: float) -> float | None:
        """Ask tenacity."""
        from tenacity import RetryCallState

        state = RetryCallState(self._retrying, None, (), {})
        state.attempt_number = attempt
        state.set_exception((type(error), error, error.__traceback__))
        state.start_time = (state.outcome_timestamp or 0.0) - elapsed
        if not self._retrying.retry(state):
            return None
        seconds = float(self._retrying.wait(state)) if self._retrying.wait else 0.0
        state.upcoming_sleep = seconds
        return None if self._retrying.stop(state) else seconds


def policy_of(retry: Any) -> RetryPolicy | None:
    """Return the policy that an option ``retry`` means: itself, or that of a tenacity object.

    Raises:
        InvalidOptionError: it is neither.

    """
    if retry is None or isinstance(retry, Retry):
        return retry
    if isinstance(retry, RetryPolicy) and not isinstance(retry, type):
        return retry
    if all(callable(getattr(retry, part, None)) for part in ("retry", "stop", "wait", "iter")):
        return _Tenacity(retry)
    raise InvalidOptionError(
        f"retry must be a bgtasks.Retry(on=...), an object with its next_wait(), or a tenacity object; "
        f"got {describe(retry)}"
    )


@contextlib.contextmanager
def skip_retry_waits() -> Iterator[None]:
    """Make all waits between attempts zero inside a ``with`` block; for tests.

    How often a function is tried does not change.

    Example:
        >>> async def fail():
        ...     raise ValueError("down")
        >>> async def main():
        ...     async with BackgroundTaskManager(drain_timeout=5.0) as manager:
        ...         with skip_retry_waits():
        ...             await asyncio.wait([manager.submit(fail, retry=Retry(on=ValueError, wait=60.0))])
        ...     print(manager.stats()["retried"])
        >>> asyncio.run(main())
        2

    """
    global _skipping
    _skipping += 1
    try:
        yield
    finally:
        _skipping -= 1


def waits_are_skipped() -> bool:
    """Return whether a ``skip_retry_waits`` block is open."""
    return _skipping > 0
