"""One thread of a publisher, for what would stop the loop: files, databases."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

__all__ = ["OwnThread"]

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class OwnThread:
    """Runs functions one after another in a thread that starts with the first of them.

    It is a daemon: a disk that hangs must not keep the process from ending. At the interpreter's exit, when no thread
    can start any more, functions run in the caller's.

    Args:
        name: the thread's name.

    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._start_lock = threading.Lock()
        self._jobs: SimpleQueue[Callable[[], None] | None] | None = None

    def run(
        self, function: Callable[Arguments, Result], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> asyncio.Future[Result]:
        """Run ``function(*args, **kwargs)`` in the thread, in a copy of this context.

        Returns:
            A future of the running loop with what the function returns or raises. Cancelling it does not stop the
            function.

        """
        loop = asyncio.get_running_loop()
        context = copy_context()
        future: asyncio.Future[Result] = loop.create_future()

        def work() -> None:
            result: Any = None
            error = None
            try:
                result = context.run(function, *args, **kwargs)
            except BaseException as caught:
                error = caught
            try:
                loop.call_soon_threadsafe(_settle, future, result, error)
            except RuntimeError:
                # The loop was closed, and whoever waited here with it.
                return
            finally:
                # The thread's frame must not keep the error, nor the error this frame.
                del result, error

        jobs = self._jobs or self._start()
        if jobs is None:
            work()
        else:
            jobs.put(work)
        return future

    def _start(self) -> SimpleQueue[Callable[[], None] | None] | None:
        with self._start_lock:
            if self._jobs is not None:
                return self._jobs
            jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
            try:
                threading.Thread(target=_work, args=(jobs,), name=self._name, daemon=True).start()
            except RuntimeError:
                return None
            self._jobs = jobs
            return jobs

    def stop(self) -> None:
        """End the thread after what it has to do; a later ``run`` starts another."""
        with self._start_lock:
            jobs, self._jobs = self._jobs, None
        if jobs is not None:
            jobs.put(None)

    def forget(self) -> None:
        """Let go of the thread without a word to it: in the child of a fork it does not exist."""
        self._start_lock = threading.Lock()
        self._jobs = None


def _work(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
