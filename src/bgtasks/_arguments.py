"""Checks of the arguments that come with a coroutine; an error closes the coroutine."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Context
from typing import Any, NoReturn

from bgtasks import errors
from bgtasks._checks import as_seconds

__all__ = ["check_context", "check_timeout", "refuse_contextvars_context", "refuse_retry"]


def check_timeout(coro: Any, timeout: object) -> float:
    """Return the timeout of a task, in seconds.

    Raises:
        InvalidTimeoutError: it is not a finite number greater than 0.

    """
    seconds = as_seconds(timeout)
    if not seconds:
        errors.close_refused(coro)
        raise errors.invalid_timeout(timeout)
    return seconds


def check_context(coro: Any, context: object) -> None:
    """Check that the ``context`` of a task is a mapping.

    Raises:
        InvalidContextError: it is not.

    """
    if isinstance(context, Context) or not isinstance(context, Mapping):
        errors.close_refused(coro)
        raise errors.invalid_context(context)


def refuse_contextvars_context(coro: Any, context: object) -> NoReturn:
    """Refuse an object that is not a ``contextvars.Context``.

    Raises:
        InvalidContextError: always.

    """
    errors.close_refused(coro)
    raise errors.invalid_contextvars_context(context)


def refuse_retry(coro: Any) -> NoReturn:
    """Refuse to retry a coroutine object.

    Raises:
        InvalidOptionError: always.

    """
    errors.close_refused(coro)
    raise errors.InvalidOptionError(
        "create_task cannot retry: a coroutine object runs only once. Pass the function and its arguments, "
        "submit(function, *args, retry=...)"
    )
