"""Coroutines out of functions: the result of a call that has to be awaitable."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from types import CoroutineType
from typing import Any, NoReturn, TypeVar

from bgtasks import errors

__all__ = ["async_generator", "coroutine_of", "next_attempt", "refuse_function"]

Result = TypeVar("Result")


def coroutine_of(function: Callable[..., Any], value: Any, starter: str) -> Any:
    """Return a coroutine for the result of a function.

    Args:
        function: the function.
        value: its result.
        starter: the name of what runs it, for the text of the error.

    Raises:
        InvalidFunctionError: the result is not awaitable.

    """
    if asyncio.iscoroutine(value):
        return value
    if inspect.isawaitable(value):
        coro: Any = _wait_for(value)
        coro.__qualname__ = getattr(function, "__qualname__", type(function).__qualname__)
        return coro
    if inspect.isasyncgen(value):
        raise async_generator(function)
    raise errors.InvalidFunctionError(
        f"{errors.describe(function)} is not a coroutine function: it ran at once and returned "
        f"{errors.describe(value)}. {starter} runs coroutine functions; BackgroundExecutor runs this one, in a thread"
    )


async def _wait_for(awaitable: Awaitable[Result]) -> Result:
    return await awaitable


def async_generator(function: object) -> errors.InvalidFunctionError:
    """Return the error for a function that returns an asynchronous generator, which no part of this package runs."""
    return errors.InvalidFunctionError(
        f"{errors.describe(function)} returns an asynchronous generator, which does nothing until it is iterated over: "
        "submit a coroutine function that iterates over it"
    )


def refuse_function(function: object, starter: str) -> NoReturn:
    """Refuse an object that cannot be called, or is a coroutine already.

    Args:
        function: the object.
        starter: the name of what was to run it, for the text of the error.

    Raises:
        InvalidFunctionError: always.

    """
    if asyncio.iscoroutine(function):
        errors.close_refused(function)
        raise errors.InvalidFunctionError(
            f"{starter} takes a function and its arguments, got the coroutine object {errors.describe(function)}: "
            f"pass the function, {starter}(function, *args), as it may run more than once"
        )
    raise errors.InvalidFunctionError(f"{starter} takes a coroutine function, got {errors.describe(function)}")


def next_attempt(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function once more, and return its coroutine; one that raises the error if the call fails."""
    try:
        coro = function(*args, **kwargs)
        return coro if type(coro) is CoroutineType else coroutine_of(function, coro, "submit")
    except BaseException as error:
        return _failed(error)


async def _failed(error: BaseException) -> None:
    try:
        raise error
    finally:
        # The traceback keeps this frame, which must not keep the error.
        del error
