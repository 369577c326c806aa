"""One function handed to the sync executor, and the future that its submitter holds."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Callable
from concurrent.futures._base import FINISHED, PENDING
from contextvars import Context
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from bgtasks.executor._runners import Runner
    from bgtasks.executor._threads import BackgroundExecutor
    from bgtasks.registry import Record


# What is made late, and whether this Python's futures hold what CallFuture knows, and nothing else: then and only then
# it does without their constructor. They have been like this from Python 3.2 on.
_MADE_LATE: Final[dict[str, Callable[[], Any]]] = {
    "_condition": threading.Condition,
    "_done_callbacks": list,
    "_waiters": list,
}
_IS_KNOWN: Final = vars(concurrent.futures.Future()).keys() == _MADE_LATE.keys() | {"_state", "_result", "_exception"}
# Re-entrant: what is collected while something is made late may ask for something, too.
_watching = threading.RLock()


def _renew_lock() -> None:
    global _watching
    _watching = threading.RLock()


if hasattr(os, "register_at_fork"):
    # Another thread of the parent may hold it, and there is none in the child to let it go.
    os.register_at_fork(after_in_child=_renew_lock)


class Call:
    """A function with its arguments, from its submission to its end; stands where a task's record has its coroutine.

    Whether it waits, runs or has been settled says its record, under the executor's lock.
    """

    __slots__ = (
        "__qualname__",
        "args",
        "context",
        "executor",
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
        executor: BackgroundExecutor,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: Context,
        next_tick: bool,
        timeout: float | None,
    ) -> None:
        self.__qualname__ = getattr(fn, "__qualname__", None) or type(fn).__qualname__
        self.executor = executor
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.context: Context | None = context
        self.next_tick = next_tick
        self.timeout = timeout
        self.is_running = False

    @property
    def is_closed(self) -> bool:
        """Tell whether the function was let go of."""
        return self.context is None

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

    What the base class keeps for those who wait, a lock, a queue and two lists, is made when somebody asks for it: it
    is two thirds of a future's size and of the time to make one, and most futures settle before anybody looks.
    """

    # Somebody asked: from then on the base class's own methods settle it.
    _is_watched = False
    if _IS_KNOWN:
        _state = PENDING
        _result = None
        _exception = None

    def __init__(self, call: Call) -> None:
        if not _IS_KNOWN:
            super().__init__()
            self._is_watched = True
        self._call: Call | None = call

    def __repr__(self) -> str:
        if self.running():
            return f"<{type(self).__name__} at {id(self):#x} state=running>"
        return super().__repr__()

    def __getattr__(self, name: str) -> Any:
        make = _MADE_LATE.get(name)
        if make is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        with _watching:
            self._is_watched = True
            # Another thread may have been first.
            return self.__dict__.setdefault(name, make())

    def cancel(self, msg: Any = None) -> bool:
        """Cancel the function if it has not started, as ``concurrent.futures.Future.cancel`` does."""
        call = self._call
        return super().cancel() if call is None else call.executor._cancel_call(call)

    def running(self) -> bool:
        """Return True while the function runs."""
        call = self._call
        return call is not None and call.is_running and not self.done()

    def settle(self, result: Any, error: BaseException | None) -> None:
        """Set the outcome; called once, by whoever settled the record."""
        # The call goes last: until the outcome is set a canceller has to hear from the record that it is too late.
        with _watching:
            if not self._is_watched:
                # Nobody waits: to wait is to ask for the lock first.
                self._result = result
                self._exception = error
                self._state = FINISHED
                self._call = None
                return
        try:
            if error is None:
                self.set_result(result)
            else:
                self.set_exception(error)
        finally:
            self._call = None

    def settle_cancelled(self) -> None:
        """Become cancelled and wake whoever waits; called once, by whoever settled the record."""
        try:
            super().cancel()
        finally:
            # A callback may have raised what is no Exception: whoever waits is to hear of the end all the same.
            self.set_running_or_notify_cancel()
            self._call = None
