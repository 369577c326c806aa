"""Checks of the arguments of both executors, and the errors for refused ones."""

from __future__ import annotations

from collections.abc import Mapping

from bgtasks import errors
from bgtasks._checks import as_seconds, check_limit

__all__ = [
    "check_submit_options",
    "check_timeout",
    "closed",
    "limit_of",
    "not_callable",
    "wants_loop",
]


def limit_of(config: Mapping[str, object] | None, max_concurrency: int | None, zero_is_no_limit: bool) -> int | None:
    """Return how many functions may run at once, None for no limit; the keyword takes precedence over the config.

    Raises:
        InvalidOptionError: ``config`` is not a mapping, or the limit is not a whole number, 1 or more.

    """
    if config is not None and not isinstance(config, Mapping):
        raise errors.InvalidOptionError(
            f"config must be a mapping such as a RunnableConfig, or None; got {errors.describe(config)}"
        )
    limit: object = max_concurrency
    if limit is None and config is not None:
        limit = config.get("max_concurrency")
    if zero_is_no_limit and limit == 0:
        return None
    return check_limit("max_concurrency", limit)


def check_submit_options(options: Mapping[str, object]) -> None:
    """Refuse unknown options of ``submit``; all other keywords are the function's.

    Raises:
        InvalidOptionError: there is an unknown option.

    """
    for name in options:
        if name.startswith("__") and name.endswith("__"):
            raise errors.InvalidOptionError(
                f"submit() has no option {name}; it has __name__, __cancel_on_exit__, __reraise_on_exit__, "
                "__next_tick__, __timeout__ and __retry__"
            )


def check_timeout(timeout: float | None) -> None:
    """Check that a timeout is a finite number of seconds, greater than 0, or None.

    Raises:
        InvalidTimeoutError: it is neither.

    """
    if timeout is not None and not as_seconds(timeout):
        raise errors.invalid_timeout(timeout)


def closed(executor: object, entered: bool, has_block: bool = True) -> errors.ExecutorClosedError:
    """Return the error for work submitted outside the ``with`` block, or after the end of an executor without one."""
    name = type(executor).__name__
    if not has_block:
        text = f"this {name} was closed, by its manager's shutdown() or by close(): open another executor"
    elif entered:
        text = f"the 'with' block of this {name} has ended: submit inside the block, or open another executor"
    else:
        text = f"this {name} was not entered: open it with 'with' and call its result, not submit() itself"
    return errors.ExecutorClosedError(text)


def not_callable(value: object) -> errors.InvalidFunctionError:
    """Return the error for an object that cannot be called."""
    return errors.InvalidFunctionError(
        f"a function is needed, got {type(value).__name__}: {errors.describe(value)}; "
        "pass the function and its arguments, submit(function, 1, 2), not the result of a call"
    )


def wants_loop(function: str) -> errors.InvalidFunctionError:
    """Return the error for a coroutine function given to the executor of plain functions."""
    return errors.InvalidFunctionError(
        f"{function} returns a coroutine, and BackgroundExecutor has no event loop to run it: "
        "AsyncBackgroundExecutor runs coroutine functions"
    )
