"""A thread for calls that would block the loop: files, databases."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

from bgtasks._fork import follow_forks
from bgtasks._locks import Lock

__all__ = ["WorkerThread"]

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class WorkerThread:
    """Runs functions one after another in a thread, which starts at the first call.

    The thread is a daemon: a disk that hangs must not keep the process from ending. At the interpreter's exit, when
    threads can no longer be started, functions run in the calling thread.

    Args:
        name: the thread's name.

    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._after_fork()
        follow_forks(self, WorkerThread._after_fork)

    def _after_fork(self) -> None:
        """Forget the thread: it does not exist in the child of a fork."""
        self._start_lock = Lock()
        self._calls: SimpleQueue[Callable[[], None] | None] | None = None

    def run(
        self, function: Callable[Arguments, Result], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> asyncio.Future[Result]:
        """Run ``function(*args, **kwargs)`` in the thread, in a copy of the current context.

        Returns:
            A future of the running loop with the function's result or exception. Cancelling it does not stop the
            function.

        """
        loop = asyncio.get_running_loop()
        context = copy_context()
        future: asyncio.Future[Result] = loop.create_future()

        def call() -> None:
            result: Any = None
            error = None
            try:
                result = context.run(function, *args, **kwargs)
            except BaseException as caught:
                error = caught
            try:
                loop.call_soon_threadsafe(_set_outcome, future, result, error)
            except RuntimeError:
                # The loop was closed, and the coroutine that waited for the result is gone.
                return
            finally:
                # The thread's frame must not keep the error alive, nor the error this frame.
                del result, error

        calls = self._calls or self._start()
        if calls is None:
            call()
        else:
            calls.put(call)
        return future

    def _start(self) -> SimpleQueue[Callable[[], None] | None] | None:
        with self._start_lock:
            if self._calls is not None:
                return self._calls
            calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
            try:
                threading.Thread(target=_work, args=(calls,), name=self._name, daemon=True).start()
            except RuntimeError:
                return None
            self._calls = calls
            return calls

    def stop(self) -> None:
        """End the thread after its pending calls; a later ``run`` starts another."""
        with self._start_lock:
            calls, self._calls = self._calls, None
        if calls is not None:
            calls.put(None)


def _work(calls: SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call


def _set_outcome(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
