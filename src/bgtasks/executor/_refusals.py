"""What both executors check of what they are given, and the errors by which they refuse it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bgtasks import errors
from bgtasks._checks import as_seconds, check_limit

__all__ = [
    "async_generator",
    "check_submit_options",
    "check_timeout",
    "closed",
    "limit_of",
    "not_callable",
    "wants_loop",
]


def limit_of(config: Mapping[str, Any] | None, max_concurrency: int | None, zero_is_no_limit: bool) -> int | None:
    """Return how many functions may run at once, None for no limit; the keyword takes precedence over the config.

    Raises:
        InvalidOptionError: ``config`` is no mapping, or the limit no whole number, 1 or more.

    """
    if config is not None and not isinstance(config, Mapping):
        raise errors.InvalidOptionError(
            f"config must be a mapping such as a RunnableConfig, or None; got {errors.describe(config)}"
        )
    if max_concurrency is None and config is not None:
        max_concurrency = config.get("max_concurrency")
    if zero_is_no_limit and max_concurrency == 0:
        return None
    return check_limit("max_concurrency", max_concurrency)


def check_submit_options(options: Mapping[str, Any]) -> None:
    """Refuse options of ``submit`` that it does not have; all other keywords are the function's.

    Raises:
        InvalidOptionError: there is one.

    """
    for name in options:
        if name.startswith("__") and name.endswith("__"):
            raise errors.InvalidOptionError(
                f"submit() has no option {name}; it has __name__, __cancel_on_exit__, __reraise_on_exit__, "
                "__next_tick__ and __timeout__"
            )


def check_timeout(timeout: float | None) -> None:
    """Refuse a timeout that is no finite number of seconds, greater than 0.

    Raises:
        InvalidTimeoutError: it is none.

    """
    if timeout is not None and not as_seconds(timeout):
        raise errors.invalid_timeout(timeout)


def closed(executor: object, entered: bool) -> errors.ExecutorClosedError:
    """Return the error for work handed in outside the ``with`` block."""
    name = type(executor).__name__
    if entered:
        text = f"the 'with' block of this {name} has ended: submit inside the block, or open another executor"
    else:
        text = f"this {name} was not entered: open it with 'with' and call what that gives, not submit() itself"
    return errors.ExecutorClosedError(text)


def not_callable(value: object) -> errors.InvalidFunctionError:
    """Return the error for what cannot be called."""
    return errors.InvalidFunctionError(
        f"a function is needed, got {type(value).__name__}: {errors.describe(value)}; "
        "pass the function and its arguments, submit(function, 1, 2), not the result of a call"
    )


def async_generator(fn: object) -> errors.InvalidFunctionError:
    """Return the error for a function that gives an asynchronous generator, which neither executor runs."""
    return errors.InvalidFunctionError(
        f"{errors.describe(fn)} gives an asynchronous generator, which does nothing until somebody iterates over it: "
        "submit a coroutine function that does, to AsyncBackgroundExecutor"
    )


def wants_loop(function: str) -> errors.InvalidFunctionError:
    """Return the error for a coroutine function given to the executor of plain functions."""
    return errors.InvalidFunctionError(
        f"{function} gives a coroutine, and BackgroundExecutor has no event loop to run it: "
        "AsyncBackgroundExecutor runs coroutine functions"
    )
