"""The executor for coroutine functions: tasks on the loop that entered it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
from asyncio.events import _get_running_loop
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from types import CoroutineType, TracebackType
from typing import Any, TypeVar

from bgtasks import errors
from bgtasks._coroutines import coroutine_of
from bgtasks._handover import Handovers
from bgtasks._internals import ManagerInternals
from bgtasks._submit import RetryPolicy
from bgtasks.executor import _refusals
from bgtasks.executor._base import CANCEL_ON_EXIT, RERAISE_ON_EXIT, RERAISE_TIMEOUT, ExecutorBase
from bgtasks.executor._submit import AsyncSubmit, typed_async_submit
from bgtasks.manager import BackgroundTaskManager
from bgtasks.registry import Record

__all__ = ["AsyncBackgroundExecutor"]

Result = TypeVar("Result")


class AsyncBackgroundExecutor(ExecutorBase):
    """Runs coroutine functions in the background of an ``async with`` block and waits for them at its end.

    Entering the block returns ``submit``. Leaving it cancels the tasks submitted with ``__cancel_on_exit__`` and waits
    for all others, those submitted meanwhile included. Then it raises the first failure in the order of submission,
    unless the block itself raised; a failure with ``__reraise_on_exit__=False`` does not count. If the wait is
    cancelled, every task is cancelled and awaited, and the cancellation is raised. Tasks that swallow it are named in
    the log after the manager's ``default_shutdown_timeout``, and left.

    Args:
        config: a mapping, such as a LangChain ``RunnableConfig``; its ``max_concurrency`` is used if the keyword is not
            given.
        max_concurrency: how many coroutines may run at once; the others wait in order, not entered, shown as queued.
            None for no limit.
        manager: the manager that keeps the tasks; a new one by default.

    Raises:
        InvalidOptionError: an argument has an invalid value.

    Example:
        >>> async def main():
        ...     async with AsyncBackgroundExecutor(max_concurrency=10) as submit:
        ...         page = submit(fetch, "https://example.org", __name__="front page", __timeout__=5.0)
        ...     print(page.result())
        >>> asyncio.run(main())
        <h1>Example Domain</h1>

    """

    def __init__(
        self,
        config: Mapping[str, object] | None = None,
        *,
        max_concurrency: int | None = None,
        manager: BackgroundTaskManager | None = None,
    ) -> None:
        super().__init__()
        limit = _refusals.limit_of(config, max_concurrency, self._zero_is_no_limit)
        self.manager: BackgroundTaskManager = BackgroundTaskManager() if manager is None else manager
        self._internals = ManagerInternals(self.manager)
        context = self._context_of(config)
        self._task_set = self._internals.make_task_set(self._on_idle, self._accept_failure, limit, context)
        self._create_task = self._task_set.create_task
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_open = False
        self._is_exiting = False
        self._is_ending_all = False
        # A task has __cancel_on_exit__: only then are all tasks of the manager searched at the end of the block.
        self._has_to_cancel = False
        self._idle: asyncio.Future[None] | None = None
        # The coroutines that other threads submitted.
        self._handovers = Handovers(lambda future, task: self._on_idle())

    # Long, in one body: this is the hot path, and each further call costs measurable time.
    @typed_async_submit
    def submit(  # noqa: PLR0912
        self,
        fn: Callable[..., Awaitable[Result]],
        /,
        *args: Any,
        __name__: str | None = None,
        __cancel_on_exit__: bool = False,
        __reraise_on_exit__: bool = True,
        __next_tick__: bool = False,
        __timeout__: float | None = None,
        __retry__: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> asyncio.Task[Result] | concurrent.futures.Future[Result]:
        """Start ``fn(*args, **kwargs)`` in the background.

        The coroutine runs in a copy of the submitter's context. From Python 3.12 on it starts at once and runs up to
        its first suspension; before, it starts in the next iteration of the loop.

        Args:
            fn: a coroutine function, or a function that returns another awaitable. It is called at once.
            args: its positional arguments.
            __name__: the name of the task; the qualified name of the coroutine by default.
            __cancel_on_exit__: cancel the task at the end of the block instead of waiting for it.
            __reraise_on_exit__: raise its failure at the end of the block.
            __next_tick__: start the coroutine in the next iteration of the loop.
            __timeout__: seconds after which the task is cancelled, > 0, counted from its start; with ``__retry__`` from
                the start of each attempt.
            __retry__: when to run it again after a failure, as for ``BackgroundTaskManager.submit``; None for never.
                All attempts are one task; the block waits for the last one, and raises its failure.
            kwargs: its keyword arguments.

        Returns:
            The task; outside the thread of the loop, a ``concurrent.futures.Future``.

        Raises:
            ExecutorClosedError: the block has not begun or has ended.
            InvalidFunctionError: ``fn`` is not callable, or its result is not awaitable.
            InvalidOptionError: an unknown option, or ``__retry__`` is no policy.
            InvalidTimeoutError: ``__timeout__`` is not a finite number greater than 0.
            ManagerClosedError: the manager was shut down.
            TaskRejectedError: the manager is at its cap.
            NoRunningLoopError: the executor's loop was closed.
            BaseException: an error of the call of ``fn``.

        """
        if not self._is_open:
            raise _refusals.closed(self, self._loop is not None)
        if not callable(fn):
            raise _refusals.not_callable(fn)
        if kwargs:
            _refusals.check_submit_options(kwargs)
        submission = None if __retry__ is None else self._internals.make_submission(fn, args, kwargs, __retry__)
        coro: Any = fn(*args, **kwargs)
        if type(coro) is not CoroutineType:
            coro = coroutine_of(fn, coro, "AsyncBackgroundExecutor")
        if __name__ is None:
            __name__ = coro.__qualname__
        flags = RERAISE_ON_EXIT if __reraise_on_exit__ else 0
        if __cancel_on_exit__:
            flags |= CANCEL_ON_EXIT
            self._has_to_cancel = True
        if _get_running_loop() is not self._loop:
            return self._hand_over(coro, __name__, __timeout__, flags, submission)
        task = self._create_task(coro, __name__, __timeout__, not __next_tick__, None, flags, submission)
        try:
            if self._is_exiting:
                self._cancel_late(task, flags)
            return task
        finally:
            # The error of an eager task keeps this frame through its traceback: the frame must not keep the task.
            del task

    def _cancel_late(self, task: asyncio.Task[Any], flags: int) -> None:
        """Cancel a task that was submitted during the exit, if such tasks are cancelled at the exit."""
        if self._is_ending_all or flags & CANCEL_ON_EXIT:
            task.cancel()

    # -- submitting from other threads ----------------------------------------------------------------------------

    def _hand_over(
        self, coro: Coroutine[Any, Any, Any], name: str, timeout: float | None, flags: int, submission: Any
    ) -> concurrent.futures.Future[Any]:
        """Hand a coroutine over to the thread of the loop."""
        assert self._loop is not None, "the executor is open"
        try:
            _refusals.check_timeout(timeout)
            arguments = (name, timeout, False, contextvars.copy_context())
            start = partial(self._start_handed_over, coro, arguments, flags, submission)
            return self._handovers.hand_over(self._loop, coro, start, self._check_open)
        except BaseException:
            errors.close_refused(coro)
            raise

    def _check_open(self) -> None:
        if not self._is_open:
            raise _refusals.closed(self, True)

    def _start_handed_over(
        self,
        coro: Coroutine[Any, Any, Any],
        arguments: tuple[str, float | None, bool, contextvars.Context],
        flags: int,
        submission: Any,
        future: concurrent.futures.Future[Any],
    ) -> asyncio.Task[Any]:
        """Start a coroutine that another thread handed over; runs on the loop."""
        if self._is_ending_all:
            raise asyncio.CancelledError
        # The future's failure is raised in place of the task's: the submitter holds the future.
        is_raised = flags & RERAISE_ON_EXIT
        own_flags = flags & ~RERAISE_ON_EXIT | (RERAISE_TIMEOUT if is_raised else 0)
        task = self._create_task(coro, *arguments, own_flags, submission)
        if is_raised:
            task.add_done_callback(partial(self._keep_handed_over, self.manager.get_task_id(task) or 0, future))
        if self._is_exiting:
            self._cancel_late(task, flags)
        return task

    def _keep_handed_over(self, order: int, future: concurrent.futures.Future[Any], task: asyncio.Task[Any]) -> None:
        # A future that its holder cancelled has no failure to raise, even if its task failed.
        if not task.cancelled() and task.exception() is not None and not future.cancelled():
            self._failures.keep(order, future)

    # -- called by the manager and the registry -------------------------------------------------------------------

    def _accept_failure(self, record: Record, error: BaseException) -> bool:
        """Keep a failed task for the end of the block; return whether the manager reports it."""
        if record.outcome == "timed_out":
            if record.flags & (RERAISE_ON_EXIT | RERAISE_TIMEOUT):
                self._failures.keep(record.task_id, record.task, error)
        elif record.flags & RERAISE_ON_EXIT:
            self._failures.keep(record.task_id, record.task)
        return super()._accept_failure(record, error)

    def _on_idle(self) -> None:
        """Wake the exit, because no task may be left."""
        if self._idle is not None and not self._idle.done() and not self._idle.get_loop().is_closed():
            self._idle.set_result(None)

    # -- the block ------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> AsyncSubmit:
        """Open the executor on the running loop and return ``submit``."""
        if self._loop is not None:
            raise _refusals.closed(self, True)
        self._loop = asyncio.get_running_loop()
        self._is_open = True
        return self.submit

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the block as the class says: cancel, wait, raise the first failure."""
        self._is_exiting = True
        try:
            if self._has_to_cancel:
                self._cancel(CANCEL_ON_EXIT)
            await self._close_when_idle()
        except asyncio.CancelledError:
            await self._end_all()
            raise
        finally:
            self._is_open = False
        self._end_block(kind)

    async def _close_when_idle(self) -> None:
        """Wait until every task has ended, those submitted meanwhile included, and accept no more."""
        while True:
            while self._is_busy():
                await self._next_idle()
            self._is_open = False
            if not self._is_busy():
                return
            # Another thread submitted just now.
            self._is_open = True

    def _is_busy(self) -> bool:
        return bool(self._task_set.live or self._handovers)

    async def _next_idle(self, timeout: float | None = None) -> None:
        """Wait until no task may be left, and their done callbacks have run; those may submit others."""
        assert self._loop is not None, "the executor is open"
        self._idle = self._loop.create_future()
        try:
            await asyncio.wait((self._idle,), timeout=timeout)
            await asyncio.sleep(0)
        finally:
            self._idle = None

    def _records(self) -> list[Record]:
        """Return the records of the tasks that have not ended."""
        if not self._task_set.live:
            return []
        return [record for record in self._internals.live_records() if record.task_set is self._task_set]

    def _cancel(self, flags: int) -> None:
        """Cancel the tasks with these flags."""
        for record in self._records():
            if record.flags & flags == flags:
                record.cancel()

    async def _end_all(self) -> None:
        """Cancel every task and wait until all have ended, however often this is cancelled meanwhile."""
        assert self._loop is not None, "the executor is open"
        self._is_ending_all = True
        self._cancel(0)
        deadline = self._loop.time() + self.manager.default_shutdown_timeout
        while self._is_busy():
            remaining = deadline - self._loop.time()
            if remaining <= 0:
                self._internals.report_still_running(self._records(), "its executor's cancelled exit")
                return
            try:
                await self._next_idle(remaining)
            except asyncio.CancelledError:
                continue
