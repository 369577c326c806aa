"""A thread with an event loop, for programs that run none: publishers empty their queues there."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

from bgtasks._fork import follow_forks
from bgtasks._locks import Lock

__all__ = ["LoopThread", "loop_thread"]

Result = TypeVar("Result")

# Called with the loop of the thread, on it.
OnLoop = Callable[[asyncio.AbstractEventLoop], object]


class LoopThread:
    """Runs functions on a loop in a thread of its own, which ends when nobody uses it any more.

    It is a daemon: a sink that hangs must not keep the process from ending.
    """

    def __init__(self) -> None:
        self._after_fork()
        follow_forks(self, LoopThread._after_fork)

    def _after_fork(self) -> None:
        """Begin without a thread: in the child of a fork it does not exist."""
        inherited: asyncio.AbstractEventLoop | None = getattr(self, "_loop", None)
        if inherited is not None:
            import ctypes

            # It cannot be closed here, because it runs in the parent; collected, it would warn of that. A list would be
            # emptied at the interpreter's exit, so the reference is leaked.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))
        # Re-entrant: what is collected meanwhile may emit.
        self._lock = Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[None] | None = None
        self._users = 0

    def is_on(self, loop: asyncio.AbstractEventLoop | None) -> bool:
        """Return whether ``loop`` is that of the thread."""
        return loop is not None and loop is self._loop

    def call_later(self, delay: float, function: OnLoop) -> None:
        """Have ``function(loop)`` called on the thread's loop after ``delay`` seconds; from any thread.

        Raises:
            RuntimeError: no thread can be started.

        """
        with self._lock:
            loop = self._loop or self._start()
            loop.call_soon_threadsafe(self._schedule, loop, delay, function, context=Context())
            self._users += 1

    def _schedule(self, loop: asyncio.AbstractEventLoop, delay: float, function: OnLoop) -> None:
        loop.call_later(delay, self._call, loop, function)

    def _call(self, loop: asyncio.AbstractEventLoop, function: OnLoop) -> None:
        try:
            function(loop)
        finally:
            self.release()

    def run(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Result]
    ) -> concurrent.futures.Future[Result] | None:
        """Run a coroutine on the thread's loop; from any thread.

        Returns:
            The future of its outcome; None, with the coroutine untouched, if ``loop`` is not that of the thread any
            more.

        """
        with self._lock:
            if not self.is_on(loop):
                return None
            future = asyncio.run_coroutine_threadsafe(self._hold(coro), loop)
            self._users += 1
        return future

    async def _hold(self, coro: Coroutine[Any, Any, Result]) -> Result:
        try:
            return await coro
        finally:
            self.release()

    def retain(self) -> None:
        """Keep the thread until ``release`` is called as often; on its loop."""
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """Undo ``retain``, and end the thread if nobody else uses it; on its loop."""
        with self._lock:
            self._users -= 1
            if self._users or self._ended is None:
                return
            ended, self._ended, self._loop = self._ended, None, None
        if not ended.done():
            ended.set_result(None)

    def _start(self) -> asyncio.AbstractEventLoop:
        runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        loop = runner.get_loop()
        ended = loop.create_future()
        thread = threading.Thread(target=_serve, args=(runner, ended), name="publishers", daemon=True)
        try:
            thread.start()
        except BaseException:
            if not thread.is_alive():
                runner.close()
            raise
        self._users = 0
        self._ended = ended
        self._loop = loop
        return loop


def _serve(runner: asyncio.Runner, ended: asyncio.Future[None]) -> None:
    with runner:
        runner.run(_wait(ended))


async def _wait(ended: asyncio.Future[None]) -> None:
    await ended


# The one of this process.
loop_thread = LoopThread()
