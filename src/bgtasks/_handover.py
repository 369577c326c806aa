"""Coroutines that threads hand over to event loops, and the futures that the threads hold."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from bgtasks import errors

__all__ = ["Handovers"]

AnyFuture = concurrent.futures.Future[Any]


class Handovers:
    """Coroutines on their way to a loop, from the call of a thread to the end of their tasks.

    Args:
        on_end: called on the loop with a future and its task when the future has its outcome; the task is None if none
            could be started.

    """

    def __init__(self, on_end: Callable[[AnyFuture, asyncio.Task[Any] | None], object]) -> None:
        self._on_end = on_end
        # Coroutines that their loops have not started yet.
        self._pending: dict[AnyFuture, tuple[asyncio.AbstractEventLoop, Any]] = {}
        self._started: set[AnyFuture] = set()

    def __len__(self) -> int:
        """Return the number of coroutines that have no outcome yet."""
        return len(self._pending) + len(self._started)

    def hand_over(
        self,
        loop: asyncio.AbstractEventLoop,
        coro: Any,
        start: Callable[[AnyFuture], asyncio.Task[Any]],
        check: Callable[[], object] | None = None,
    ) -> AnyFuture:
        """Call ``start`` on a loop, and return a future. Safe from any thread.

        Args:
            loop: the loop.
            coro: the coroutine of the task; closed if the task is not started.
            start: called with the future; returns the task. Its errors are set on the future; a CancelledError cancels
                the future.
            check: called when the coroutine is counted here and not handed over yet; may raise to refuse it.

        Returns:
            A future with the outcome of the task. Cancelling it cancels the task.

        Raises:
            NoRunningLoopError: the loop is closed.
            BaseException: an error of ``check``.

        """
        future: AnyFuture = concurrent.futures.Future()
        try:
            self._pending[future] = (loop, coro)
            if check is not None:
                check()
            loop.call_soon_threadsafe(self._start, future, start)
        except BaseException as error:
            self._refuse(loop, future)
            if isinstance(error, errors.BgtasksError) or not isinstance(error, RuntimeError):
                raise
            raise errors.NoRunningLoopError("the event loop is closed: hand work over to a running loop") from None
        return future

    def _refuse(self, loop: asyncio.AbstractEventLoop, future: AnyFuture) -> None:
        """Remove a coroutine that was not handed over, and close it."""
        pending = self._pending.pop(future, None)
        if pending is not None:
            errors.close_refused(pending[1])
        # A coroutine on the loop may wait for this outcome; on a closed loop none does.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._on_end, future, None)

    def _start(self, future: AnyFuture, start: Callable[[AnyFuture], asyncio.Task[Any]]) -> None:
        """Start the task of a coroutine; runs on the loop."""
        pending = self._pending.pop(future, None)
        if pending is None:
            # The call that handed it over failed after all, and raised.
            return
        loop, coro = pending
        if future.cancelled():
            errors.close_refused(coro)
            _set_cancelled(future)
            self._on_end(future, None)
            return
        task: asyncio.Task[Any] | None = None
        try:
            # What can fail comes before the task, as far as it can.
            self._started.add(future)
            on_end = partial(self._finish, future)
            task = start(future)
            task.add_done_callback(on_end)
            future.add_done_callback(partial(_cancel_task, loop, task))
        except BaseException as error:
            self._started.discard(future)
            if task is None:
                errors.close_refused(coro)
            else:
                task.cancel()
            if isinstance(error, asyncio.CancelledError):
                _set_cancelled(future)
            else:
                set_outcome(future, None, error)
            self._on_end(future, None)
            if not isinstance(error, (Exception, asyncio.CancelledError)):
                raise

    def _finish(self, future: AnyFuture, task: asyncio.Task[Any]) -> None:
        """Set the outcome of a task on the future that its thread holds."""
        if future not in self._started:
            # It has its outcome: what should follow the start of the task failed.
            return
        try:
            if task.cancelled():
                _set_cancelled(future)
            else:
                error = task.exception()
                set_outcome(future, None if error else task.result(), error)
        finally:
            self._started.discard(future)
            self._on_end(future, task)

    def fail_on_closed_loops(self) -> None:
        """Fail the futures of coroutines that can never start because their loop was closed."""
        for future, (loop, _) in list(self._pending.items()):
            if loop.is_closed() and (pending := self._pending.pop(future, None)) is not None:
                errors.close_refused(pending[1])
                set_outcome(
                    future,
                    None,
                    errors.NoRunningLoopError("the event loop was closed before it could start the task"),
                )


def _cancel_task(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any], cancelled: AnyFuture) -> None:
    """Cancel the task of a future that its holder cancelled."""
    if cancelled.cancelled() and not loop.is_closed():
        loop.call_soon_threadsafe(task.cancel)


def _set_cancelled(future: AnyFuture) -> None:
    """Cancel a future, if its holder has not, and wake the threads that wait for it with others."""
    future.cancel()
    future.set_running_or_notify_cancel()


def set_outcome(future: AnyFuture, result: Any, error: BaseException | None) -> None:
    """Set the outcome of a future, unless it was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
