"""A function submitted to ``BackgroundExecutor``, its future, and the interface of its runner."""

# ruff: noqa: SLF001  the outcome of a future is set here, by functions that are not among its methods

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Generator
from concurrent.futures._base import FINISHED, PENDING
from contextvars import Context
from typing import Any, Final, Protocol, TypeVar

from bgtasks._fork import at_fork
from bgtasks._locks import Lock
from bgtasks.registry import Record

__all__ = ["BackgroundFuture", "Call", "Runner", "set_cancelled", "set_outcome"]

Result = TypeVar("Result")


class Runner(Protocol):
    """Runs one call after another, for one worker thread."""

    def run(self, call: Call) -> Any:
        """Run the function and return its result or raise its error."""

    def interrupt(self) -> None:
        """Stop the function that runs, if that is possible; called from another thread."""

    def location(self, worker: threading.Thread) -> str:
        """Return where the function stands that runs for this worker thread, as text for the log."""

    def close(self) -> None:
        """Release the resources of the runner; no call runs."""


class Call:
    """A submitted function with its arguments, until its end; its record holds it in the place of a coroutine.

    The record says whether it waits, runs or has ended.
    """

    __slots__ = (
        "__qualname__",
        "args",
        "cancel",
        "context",
        "fn",
        "future",
        "give_up",
        "is_running",
        "kwargs",
        "next_tick",
        "record",
        "runner",
        "timeout",
        "worker",
    )

    record: Record
    future: BackgroundFuture[Any]
    # Fails the call while it waits for its next attempt; only for one that is retried.
    give_up: Callable[[Call, BaseException], object]
    # Set when it runs: its thread and its runner.
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
        cancel: Callable[[Call], bool],
    ) -> None:
        self.__qualname__ = getattr(fn, "__qualname__", None) or type(fn).__qualname__
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.context: Context | None = context
        self.next_tick = next_tick
        self.timeout = timeout
        self.is_running = False
        # Cancels the call unless it runs; returns whether its future is cancelled.
        self.cancel = cancel

    @property
    def is_closed(self) -> bool:
        """True once the function was released."""
        return self.context is None

    @property
    def attempt(self) -> int:
        """The number of the attempt that runs or waits, from 1; 0 for a call that is not retried, or has ended."""
        submission = self.record.submission
        return 0 if submission is None else submission.attempt

    def location(self) -> str:
        """Return where the function stands, as text for the log."""
        return self.runner.location(self.worker) if self.is_running else "not started"

    def close(self) -> None:
        """Release the function and its arguments: they are not needed any more."""
        self.fn = _closed
        self.args = ()
        self.kwargs = {}
        self.context = None


def _closed() -> None:
    """Replace the function of a closed call."""


# The fields that BackgroundFuture makes late. If a future of this Python has these fields and those that
# BackgroundFuture sets, and no others, as it has since Python 3.2, BackgroundFuture skips the constructor of its base
# class.
_MADE_LATE: Final = {"_condition", "_done_callbacks", "_waiters"}
_IS_KNOWN: Final = vars(concurrent.futures.Future()).keys() == _MADE_LATE | {"_state", "_result", "_exception"}
# Re-entrant: a finaliser that runs while a field is made may use another future.
_making = Lock()


def _renew_lock() -> None:
    global _making
    _making = Lock()


at_fork(in_child=_renew_lock)


class _MadeLate:
    """A field of a ``BackgroundFuture`` that is made at its first use, and stays."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, future: BackgroundFuture[Any] | None, owner: type) -> Any:
        if future is None:
            return self
        with _making:
            future._is_watched = True
            # Another thread may have been first.
            return vars(future).setdefault(self._name, self._make())


class BackgroundFuture(concurrent.futures.Future[Result]):
    """The future of a function: a ``concurrent.futures.Future``, which a coroutine can await, too.

    Awaiting it gives the result or raises the error. If the wait is cancelled, a function that has not started is
    cancelled, and one that runs goes on.

    Example:
        >>> async def main():
        ...     async with BackgroundExecutor() as submit:
        ...         print(await submit(pow, 2, 10))
        >>> asyncio.run(main())
        1024

    """

    # Its executor can cancel it although the function runs. So the state of the base class is never set to running: the
    # base class would then refuse every cancellation, and has no documented way to undo that. Hence ``running`` and
    # ``cancel`` here.
    #
    # The base class has a lock and two lists for waiting threads and for callbacks. They take two thirds of a future's
    # size and of the time to make one, and most futures have their outcome before any use. So they are made at their
    # first use.

    # A field was used: from then on the base class's own methods set the outcome.
    _is_watched = False
    if _IS_KNOWN:
        _state = PENDING
        _result = None
        _exception: BaseException | None = None
        _condition = _MadeLate(threading.Condition)
        _done_callbacks = _MadeLate(list)
        _waiters = _MadeLate(list)

    # Any: the class is public, and Call is not.
    def __init__(self, call: Any) -> None:
        if not _IS_KNOWN:
            super().__init__()
            self._is_watched = True
        self._call: Call | None = call

    def __repr__(self) -> str:
        if self.running():
            return f"<{type(self).__name__} at {id(self):#x} state=running>"
        return super().__repr__()

    def __await__(self) -> Generator[Any, None, Result]:
        """Wait in a coroutine, and leave the loop free meanwhile."""
        return asyncio.wrap_future(self).__await__()

    def cancel(self, msg: Any = None) -> bool:
        """Cancel the function if it has not started, as ``concurrent.futures.Future.cancel`` does."""
        call = self._call
        return super().cancel() if call is None else call.cancel(call)

    def running(self) -> bool:
        """Return True while the function runs."""
        call = self._call
        return call is not None and call.is_running and not self.done()


def set_outcome(future: BackgroundFuture[Any], result: Any, error: BaseException | None) -> None:
    """Set the outcome; called once, by the thread that finished the record."""
    # ``_call`` is cleared last: until the outcome is set, cancel() asks the record, which is finished.
    with _making:
        if not future._is_watched:
            # No thread waits: a wait uses the lock first.
            future._result = result
            future._exception = error
            future._state = FINISHED
            future._call = None
            return
    try:
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
    finally:
        future._call = None


def set_cancelled(future: BackgroundFuture[Any]) -> None:
    """Make a future cancelled and wake the waiting threads; called once, by the thread that finished the record."""
    try:
        concurrent.futures.Future.cancel(future)
    finally:
        # A callback may have raised a BaseException: the waiting threads are woken all the same.
        future.set_running_or_notify_cancel()
        future._call = None
