"""Checks of what is passed with a coroutine: what is refused is an error, and the coroutine is closed."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Context
from typing import Any, NoReturn

from bgtasks import errors
from bgtasks._checks import as_seconds

__all__ = ["check_context", "check_timeout", "refuse_contextvars_context"]


def check_timeout(coro: Any, timeout: object) -> float:
    """Return the timeout of a task, in seconds.

    Raises:
        InvalidTimeoutError: it is no finite number greater than 0.

    """
    seconds = as_seconds(timeout)
    if not seconds:
        errors.close_refused(coro)
        raise errors.invalid_timeout(timeout)
    return seconds


def check_context(coro: Any, context: object) -> None:
    """See that the ``context`` of a task is a mapping.

    Raises:
        InvalidContextError: it is none.

    """
    if isinstance(context, Context) or not isinstance(context, Mapping):
        errors.close_refused(coro)
        raise errors.invalid_context(context)


def refuse_contextvars_context(coro: Any, context: object) -> NoReturn:
    """Refuse what is no ``contextvars.Context``.

    Raises:
        InvalidContextError: always.

    """
    errors.close_refused(coro)
    raise errors.invalid_contextvars_context(context)
