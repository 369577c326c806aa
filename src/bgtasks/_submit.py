"""The types of ``BackgroundTaskManager.submit``, which check calls as far as the typing rules allow.

The rules allow no keyword between ``*args`` and ``**kwargs`` of a ``ParamSpec``. So a call without options is checked
against the function. A call with options matches an overload that requires one of them: its options and its result are
checked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Mapping
from typing import Any, Literal, ParamSpec, Protocol, TypeAlias, TypeVar, overload, runtime_checkable

__all__ = ["ManagerFire", "ManagerSubmit", "OnDuplicate", "RetryPolicy", "typed_fire", "typed_submit"]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# What ``submit`` does while a task with the same key has not ended: return that task; return None; cancel it and start
# after its end; wait for its end, and in the meantime give way to later calls.
OnDuplicate: TypeAlias = Literal["join", "skip", "replace", "queue_latest"]


@runtime_checkable
class RetryPolicy(Protocol):
    """Decides whether a failed attempt is followed by another one. ``Retry`` is one; a program may bring its own."""

    def next_wait(self, error: Exception, *, attempt: int, elapsed: float) -> float | None:
        """Return the seconds to wait before the next attempt, None to give up.

        Args:
            error: what the attempt raised; ``TimeoutError`` if its timeout expired.
            attempt: its number, from 1.
            elapsed: seconds since the first attempt began.

        """


class ManagerSubmit(Protocol):
    """``BackgroundTaskManager.submit``."""

    # It overlaps with the last overload only for a function that has parameters with the names of options.
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self,
        function: Callable[..., Awaitable[Result]],
        /,
        *args: Any,
        key: Hashable,
        on_duplicate: Literal["skip"],
        name: str | None = None,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
        retry: RetryPolicy | None = None,
        keep_result: float | None = None,
        **kwargs: Any,
    ) -> asyncio.Task[Result] | None: ...
    @overload
    def __call__(
        self,
        function: Callable[..., Awaitable[Result]],
        /,
        *args: Any,
        key: Hashable,
        on_duplicate: Literal["join", "replace", "queue_latest"] = "join",
        name: str | None = None,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
        retry: RetryPolicy | None = None,
        keep_result: float | None = None,
        **kwargs: Any,
    ) -> asyncio.Task[Result]: ...
    @overload
    def __call__(
        self,
        function: Callable[..., Awaitable[Result]],
        /,
        *args: Any,
        name: str | None,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
        retry: RetryPolicy | None = None,
        keep_result: float | None = None,
        **kwargs: Any,
    ) -> asyncio.Task[Result]: ...
    @overload
    def __call__(
        self,
        function: Callable[..., Awaitable[Result]],
        /,
        *args: Any,
        timeout: float | None,
        context: Mapping[str, Any] | None = None,
        retry: RetryPolicy | None = None,
        keep_result: float | None = None,
        **kwargs: Any,
    ) -> asyncio.Task[Result]: ...
    @overload
    def __call__(
        self,
        function: Callable[..., Awaitable[Result]],
        /,
        *args: Any,
        context: Mapping[str, Any] | None,
        retry: RetryPolicy | None = None,
        keep_result: float | None = None,
        **kwargs: Any,
    ) -> asyncio.Task[Result]: ...
    @overload
    def __call__(
        self,
        function: Callable[..., Awaitable[Result]],
        /,
        *args: Any,
        retry: RetryPolicy | None,
        keep_result: float | None = None,
        **kwargs: Any,
    ) -> asyncio.Task[Result]: ...
    @overload
    def __call__(
        self,
        function: Callable[..., Awaitable[Result]],
        /,
        *args: Any,
        keep_result: float | None,
        **kwargs: Any,
    ) -> asyncio.Task[Result]: ...
    @overload
    def __call__(
        self, function: Callable[Parameters, Awaitable[Result]], /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> asyncio.Task[Result]: ...


class ManagerFire(Protocol):
    """``BackgroundTaskManager.fire_function``."""

    @overload
    def __call__(
        self,
        function: Callable[..., Awaitable[Any]],
        /,
        *args: Any,
        name: str | None,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
        retry: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> bool: ...
    @overload
    def __call__(
        self,
        function: Callable[..., Awaitable[Any]],
        /,
        *args: Any,
        timeout: float | None,
        context: Mapping[str, Any] | None = None,
        retry: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> bool: ...
    @overload
    def __call__(
        self,
        function: Callable[..., Awaitable[Any]],
        /,
        *args: Any,
        context: Mapping[str, Any] | None,
        retry: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> bool: ...
    @overload
    def __call__(
        self,
        function: Callable[..., Awaitable[Any]],
        /,
        *args: Any,
        retry: RetryPolicy | None,
        **kwargs: Any,
    ) -> bool: ...
    @overload
    def __call__(
        self, function: Callable[Parameters, Awaitable[Any]], /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> bool: ...


def typed_submit(method: Callable[..., Any]) -> ManagerSubmit:
    """Give a method the type of ``ManagerSubmit``: its own signature cannot express the overloads."""
    return method


def typed_fire(method: Callable[..., Any]) -> ManagerFire:
    """Give a method the type of ``ManagerFire``."""
    return method
