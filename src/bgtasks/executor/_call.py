"""One function handed to the sync executor, and the future that its submitter holds."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from contextvars import Context
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bgtasks.executor._runners import Runner
    from bgtasks.registry import Record


class Call:
    """A function with its arguments, from its submission to its end; stands where a task's record has its coroutine.

    Whether it waits, runs or has been settled says its record, under the executor's lock.
    """

    __slots__ = (
        "__qualname__",
        "args",
        "context",
        "fn",
        "future",
        "is_running",
        "kwargs",
        "next_tick",
        "record",
        "runner",
        "timeout",
        "worker",
    )

    record: Record
    future: CallFuture
    # What runs it, once it runs.
    worker: threading.Thread
    runner: Runner

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: Context,
        next_tick: bool,
        timeout: float | None,
    ) -> None:
        self.__qualname__ = getattr(fn, "__qualname__", None) or type(fn).__qualname__
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.context: Context | None = context
        self.next_tick = next_tick
        self.timeout = timeout
        self.is_running = False

    def close(self) -> None:
        """Let go of the function and its arguments: they are not needed any more."""
        self.fn = close_nothing
        self.args = ()
        self.kwargs = {}
        self.context = None


def close_nothing() -> None:
    """Stand where the function of a closed call was."""


class CallFuture(concurrent.futures.Future[Any]):
    """A ``concurrent.futures.Future`` that its executor can cancel although the function runs.

    The base class never hears that the function runs: it would then refuse every cancellation, and has no way to take
    it back that is documented. So ``running`` and ``cancel`` are answered here.
    """

    def __init__(self, cancel_call: Callable[[Call], bool], call: Call) -> None:
        super().__init__()
        self._cancel_call = cancel_call
        self._call: Call | None = call

    def cancel(self, msg: Any = None) -> bool:
        """Cancel the function if it has not started, as ``concurrent.futures.Future.cancel`` does."""
        call = self._call
        return super().cancel() if call is None else self._cancel_call(call)

    def running(self) -> bool:
        """Return True while the function runs."""
        call = self._call
        return call is not None and call.is_running

    def settle(self, result: Any, error: BaseException | None) -> None:
        """Set the outcome; called once, by whoever settled the record."""
        self._call = None
        if error is None:
            self.set_result(result)
        else:
            self.set_exception(error)

    def settle_cancelled(self) -> None:
        """Become cancelled and wake whoever waits; called once, by whoever settled the record."""
        self._call = None
        super().cancel()
        self.set_running_or_notify_cancel()
