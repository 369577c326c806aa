"""The types of the executors' ``submit``, which check calls as far as the typing rules allow.

The rules allow no keyword between ``*args`` and ``**kwargs`` of a ``ParamSpec``. So a call without options is checked
against the function. A call with options matches an overload that requires one of them: its options and its result are
checked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, Protocol, TypeVar, overload

from bgtasks._submit import RetryPolicy
from bgtasks.executor._call import BackgroundFuture

__all__ = ["AsyncSubmit", "Submit", "typed_async_submit", "typed_submit"]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class AsyncSubmit(Protocol):
    """``AsyncBackgroundExecutor.submit``, called in the thread of its loop.

    From another thread the same call returns a ``concurrent.futures.Future``. No type can depend on the thread.
    """

    @overload
    def __call__(
        self,
        fn: Callable[..., Awaitable[Result]],
        /,
        *args: Any,
        __name__: str | None,
        __cancel_on_exit__: bool = False,
        __reraise_on_exit__: bool = True,
        __next_tick__: bool = False,
        __timeout__: float | None = None,
        __retry__: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> asyncio.Task[Result]: ...
    @overload
    def __call__(
        self,
        fn: Callable[..., Awaitable[Result]],
        /,
        *args: Any,
        __cancel_on_exit__: bool,
        __reraise_on_exit__: bool = True,
        __next_tick__: bool = False,
        __timeout__: float | None = None,
        __retry__: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> asyncio.Task[Result]: ...
    @overload
    def __call__(
        self,
        fn: Callable[..., Awaitable[Result]],
        /,
        *args: Any,
        __reraise_on_exit__: bool,
        __next_tick__: bool = False,
        __timeout__: float | None = None,
        __retry__: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> asyncio.Task[Result]: ...
    @overload
    def __call__(
        self,
        fn: Callable[..., Awaitable[Result]],
        /,
        *args: Any,
        __next_tick__: bool,
        __timeout__: float | None = None,
        __retry__: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> asyncio.Task[Result]: ...
    @overload
    def __call__(
        self,
        fn: Callable[..., Awaitable[Result]],
        /,
        *args: Any,
        __timeout__: float | None,
        __retry__: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> asyncio.Task[Result]: ...
    @overload
    def __call__(
        self,
        fn: Callable[..., Awaitable[Result]],
        /,
        *args: Any,
        __retry__: RetryPolicy | None,
        **kwargs: Any,
    ) -> asyncio.Task[Result]: ...
    @overload
    def __call__(
        self, fn: Callable[Parameters, Awaitable[Result]], /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> asyncio.Task[Result]: ...


class Submit(Protocol):
    """``BackgroundExecutor.submit``."""

    @overload
    def __call__(
        self,
        fn: Callable[..., Result],
        /,
        *args: Any,
        __name__: str | None,
        __cancel_on_exit__: bool = False,
        __reraise_on_exit__: bool = True,
        __next_tick__: bool = False,
        __timeout__: float | None = None,
        __retry__: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> BackgroundFuture[Result]: ...
    @overload
    def __call__(
        self,
        fn: Callable[..., Result],
        /,
        *args: Any,
        __cancel_on_exit__: bool,
        __reraise_on_exit__: bool = True,
        __next_tick__: bool = False,
        __timeout__: float | None = None,
        __retry__: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> BackgroundFuture[Result]: ...
    @overload
    def __call__(
        self,
        fn: Callable[..., Result],
        /,
        *args: Any,
        __reraise_on_exit__: bool,
        __next_tick__: bool = False,
        __timeout__: float | None = None,
        __retry__: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> BackgroundFuture[Result]: ...
    @overload
    def __call__(
        self,
        fn: Callable[..., Result],
        /,
        *args: Any,
        __next_tick__: bool,
        __timeout__: float | None = None,
        __retry__: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> BackgroundFuture[Result]: ...
    @overload
    def __call__(
        self,
        fn: Callable[..., Result],
        /,
        *args: Any,
        __timeout__: float | None,
        __retry__: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> BackgroundFuture[Result]: ...
    @overload
    def __call__(
        self,
        fn: Callable[..., Result],
        /,
        *args: Any,
        __retry__: RetryPolicy | None,
        **kwargs: Any,
    ) -> BackgroundFuture[Result]: ...
    @overload
    def __call__(
        self, fn: Callable[Parameters, Result], /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> BackgroundFuture[Result]: ...


def typed_async_submit(method: Callable[..., Any]) -> AsyncSubmit:
    """Give a method the type of ``AsyncSubmit``: its own signature cannot express the overloads."""
    return method


def typed_submit(method: Callable[..., Any]) -> Submit:
    """Give a method the type of ``Submit``."""
    return method
