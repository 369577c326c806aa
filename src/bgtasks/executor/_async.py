"""The executor for coroutine functions: tasks on the loop that entered it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import inspect
import logging
from asyncio.events import _get_running_loop
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from types import CoroutineType, TracebackType
from typing import Any, ParamSpec, TypeVar

from bgtasks import errors
from bgtasks.executor import _options
from bgtasks.executor._rules import Rules
from bgtasks.executor._submit import AsyncSubmit
from bgtasks.manager import BackgroundTaskManager, _copy_outcome
from bgtasks.registry import CANCEL_ON_EXIT, RERAISE_ON_EXIT, Record

logger = logging.getLogger("bgtasks")

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class AsyncBackgroundExecutor(Rules):
    """Runs coroutine functions in the background of an ``async with`` block and waits for them at its end.

    The block gets ``submit``. At its end what was submitted with ``__cancel_on_exit__`` is cancelled and all else
    awaited, tasks started meanwhile included; then the first failure in the order of submission is raised, unless it
    was submitted with ``__reraise_on_exit__=False`` or the block itself raised. If that wait is cancelled, every task
    is cancelled and awaited, and the cancellation goes on. Tasks that swallow it are named in the log after the
    manager's ``default_shutdown_timeout``, and let go.

    Args:
        config: a mapping; its ``max_concurrency`` counts where the keyword is not given. A LangChain
            ``RunnableConfig`` is one.
        max_concurrency: how many coroutines may run at once; the others wait in order, not entered, shown as queued.
            None for no limit.
        manager: the manager that keeps the books; one of its own by default.

    Raises:
        InvalidOptionError: an argument is outside its values.

    Example:
        >>> async def main():
        ...     async with AsyncBackgroundExecutor(max_concurrency=10) as submit:
        ...         page = submit(fetch, "https://example.org", __name__="front page", __timeout__=5.0)
        ...         print(await page)

    """

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        max_concurrency: int | None = None,
        manager: BackgroundTaskManager | None = None,
    ) -> None:
        super().__init__()
        self._limit = _options.limit_of(config, max_concurrency, self._zero_is_no_limit)
        self.manager = _options.manager_for(manager)
        self._group = self.manager._make_group(self, self._limit or 0)
        self._create_task = self._group.create_task
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_open = False
        self._is_exiting = False
        self._is_settling = False
        # Something was submitted with __cancel_on_exit__: to find it takes a look at all that the manager has.
        self._has_to_cancel = False
        self._quiet: asyncio.Future[None] | None = None
        # What other threads handed over: not started yet, or not settled.
        self._handed_over: set[concurrent.futures.Future[Any]] = set()

    def submit(  # type: ignore[valid-type]  # see _submit
        self,
        fn: Callable[Parameters, Awaitable[Result]],
        /,
        *args: Parameters.args,
        __name__: str | None = None,
        __cancel_on_exit__: bool = False,
        __reraise_on_exit__: bool = True,
        __next_tick__: bool = False,
        __timeout__: float | None = None,
        **kwargs: Parameters.kwargs,
    ) -> asyncio.Task[Result]:
        """Start ``fn(*args, **kwargs)`` in the background.

        The coroutine starts at once and runs up to its first suspension where the interpreter can (from Python 3.12
        on; before, in the next iteration of the loop), in a copy of the submitter's context.

        Args:
            fn: a coroutine function, or what else returns an awaitable when called. It is called here and now.
            args: its positional arguments.
            __name__: what the task is called; the qualified name of the coroutine by default.
            __cancel_on_exit__: cancel the task at the end of the block instead of waiting for it.
            __reraise_on_exit__: raise its failure at the end of the block.
            __next_tick__: start the coroutine in the next iteration of the loop.
            __timeout__: seconds after which the task is cancelled, > 0, counted from its start.
            kwargs: its keyword arguments.

        Returns:
            The task; from a thread other than that of the loop a ``concurrent.futures.Future``.

        Raises:
            ExecutorClosedError: the block has not begun or has ended.
            InvalidFunctionError: ``fn`` cannot be called, or returned what cannot be awaited.
            InvalidOptionError: an unknown option.
            InvalidTimeoutError: ``__timeout__`` is no positive number.
            ManagerClosedError: the manager was shut down.
            TaskRejectedError: the manager is at its cap.
            NoRunningLoopError: the executor's loop was closed.
            BaseException: what calling ``fn`` raised.

        """
        if not self._is_open:
            raise _options.closed(self, self._loop is not None)
        if not callable(fn):
            raise _options.not_callable(fn)
        if kwargs:
            _options.check_options(kwargs)
        coro: Any = fn(*args, **kwargs)
        if type(coro) is not CoroutineType:
            coro = _coroutine_of(fn, coro)
        if __name__ is None:
            __name__ = coro.__qualname__
        marks = RERAISE_ON_EXIT if __reraise_on_exit__ else 0
        if __cancel_on_exit__:
            marks |= CANCEL_ON_EXIT
            self._has_to_cancel = True
        if _get_running_loop() is not self._loop:
            return self._hand_over(coro, __name__, __timeout__, marks)  # type: ignore[return-value]
        task: asyncio.Task[Result] | None = self._create_task(
            coro, __name__, __timeout__, not __next_tick__, None, marks
        )
        try:
            if task is None or self._is_exiting:
                self._review(task, __name__, marks)
            return task  # type: ignore[return-value]
        finally:
            # The error of an eager task keeps this frame through its traceback: the frame must not keep the task.
            del task

    def _review(self, task: asyncio.Task[Any] | None, name: str | None, marks: int) -> None:
        """Refuse a task that the manager dropped; cancel one that came too late to be left running."""
        if task is None:
            raise errors.TaskRejectedError(self.manager._full_text(str(name)))
        if self._is_settling or marks & CANCEL_ON_EXIT:
            task.cancel()

    # -- submitting from other threads --------------------------------------------------------------------------------

    def _hand_over(
        self, coro: Coroutine[Any, Any, Any], name: str, timeout: float | None, marks: int
    ) -> concurrent.futures.Future[Any]:
        """Have a coroutine started by the loop's thread."""
        assert self._loop is not None, "the executor is open"
        try:
            _options.check_timeout(timeout)
        except errors.InvalidTimeoutError:
            errors.close_refused(coro)
            raise
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._handed_over.add(future)
        try:
            if not self._is_open:
                raise _options.closed(self, True)
            self._loop.call_soon_threadsafe(
                self._start_handed_over, future, coro, (name, timeout, False, contextvars.copy_context(), marks)
            )
        except RuntimeError as error:
            errors.close_refused(coro)
            try:
                # The end of the block may wait for what was in there for a moment.
                self._loop.call_soon_threadsafe(self._settle_handed_over, future)
            except RuntimeError:
                self._handed_over.discard(future)
            if isinstance(error, errors.BgtasksError):
                raise
            raise errors.NoRunningLoopError(
                "the event loop of this executor is closed: submit while its block runs"
            ) from None
        return future

    def _start_handed_over(
        self,
        future: concurrent.futures.Future[Any],
        coro: Coroutine[Any, Any, Any],
        arguments: tuple[str, float | None, bool, contextvars.Context, int],
    ) -> None:
        """Start a coroutine that another thread handed over; runs on the loop."""
        name, marks = arguments[0], arguments[4]
        if self._is_settling or future.cancelled():
            errors.close_refused(coro)
            future.cancel()
            self._settle_handed_over(future)
            return
        try:
            # The future re-raises for the task: it is what the submitter holds.
            task: asyncio.Task[Any] | None = self._create_task(coro, *arguments[:4], marks & ~RERAISE_ON_EXIT)
            if task is None or self._is_exiting:
                self._review(task, name, marks)
            assert task is not None, "a dropped task was refused"
        except BaseException as error:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
            self._settle_handed_over(future)
            if not isinstance(error, Exception):
                raise
            return
        order = self.manager.get_task_id(task) or 0
        loop = task.get_loop()

        def end(task: asyncio.Task[Any]) -> None:
            _copy_outcome(future, task)
            # A future that its holder cancelled has no failure to raise, whatever the task did about it.
            if marks & RERAISE_ON_EXIT and not future.cancelled() and future.exception() is not None:
                self._failures.keep(order, future)
            self._settle_handed_over(future)

        def cancel_task(cancelled: concurrent.futures.Future[Any]) -> None:
            if cancelled.cancelled() and not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)

        task.add_done_callback(end)
        future.add_done_callback(cancel_task)

    def _settle_handed_over(self, future: concurrent.futures.Future[Any]) -> None:
        self._handed_over.discard(future)
        self._on_quiet()

    # -- what the manager and the registry tell ------------------------------------------------------------------------

    def _takes_failure(self, record: Record, error: BaseException) -> bool:
        """Keep a failed task for the exit; say whether the manager is to report it."""
        if record.marks & RERAISE_ON_EXIT:
            self._failures.keep(record.task_id, record.task)
        return super()._takes_failure(record, error)

    def _on_quiet(self) -> None:
        """Hear that no task may be left."""
        if self._quiet is not None and not self._quiet.done() and not self._quiet.get_loop().is_closed():
            self._quiet.set_result(None)

    # -- the block -----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> AsyncSubmit:
        """Open the executor on the running loop and return ``submit``."""
        if self._loop is not None:
            raise _options.closed(self, True)
        self._loop = asyncio.get_running_loop()
        self._is_open = True
        return self.submit  # type: ignore[return-value]

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Cancel what asked for it, wait for the rest, raise the first failure unless the block raised."""
        self._is_exiting = True
        try:
            if self._has_to_cancel:
                self._cancel(CANCEL_ON_EXIT)
            await self._close_when_quiet()
        except asyncio.CancelledError:
            await self._settle()
            raise
        finally:
            self._is_open = False
        self._end_block(kind)

    async def _close_when_quiet(self) -> None:
        """Wait until every task has ended, those submitted meanwhile included, and take no more."""
        while True:
            while self._is_busy():
                await self._next_quiet()
            self._is_open = False
            if not self._is_busy():
                return
            # Another thread submitted just now.
            self._is_open = True

    def _is_busy(self) -> bool:
        return bool(self._group.live or self._handed_over)

    async def _next_quiet(self, timeout: float | None = None) -> None:
        """Wait until no task may be left, and their done callbacks have run; those may submit others."""
        assert self._loop is not None, "the executor is open"
        self._quiet = self._loop.create_future()
        try:
            await asyncio.wait((self._quiet,), timeout=timeout)
            await asyncio.sleep(0)
        finally:
            self._quiet = None

    def _records(self) -> list[Record]:
        """Return the records of the tasks that have not ended."""
        if not self._group.live:
            return []
        return [record for record in self.manager._live_records() if record.group is self._group]

    def _cancel(self, marks: int) -> None:
        """Cancel the tasks that have these marks."""
        for record in self._records():
            if record.marks & marks == marks:
                record.cancel()

    async def _settle(self) -> None:
        """Cancel every task and wait until all have ended, however often this is cancelled meanwhile."""
        assert self._loop is not None, "the executor is open"
        self._is_settling = True
        self._cancel(0)
        deadline = self._loop.time() + self.manager._default_shutdown_timeout
        while self._is_busy():
            remaining = deadline - self._loop.time()
            if remaining <= 0:
                self.manager._log_stragglers(self._records(), "its executor's cancelled exit")
                return
            try:
                await self._next_quiet(remaining)
            except asyncio.CancelledError:
                continue


def _coroutine_of(fn: Callable[..., Any], value: Any) -> Any:
    """Return the coroutine of what a function returned; refuse what cannot be awaited."""
    if asyncio.iscoroutine(value):
        return value
    if inspect.isawaitable(value):
        coro: Any = _wait_for(value)
        coro.__qualname__ = getattr(fn, "__qualname__", type(fn).__qualname__)
        return coro
    if inspect.isasyncgen(value):
        raise _options.async_generator(fn)
    raise errors.InvalidFunctionError(
        f"{errors.describe(fn)} is no coroutine function: it ran at once and returned {errors.describe(value)}. "
        "AsyncBackgroundExecutor runs coroutine functions; BackgroundExecutor runs this one, in a thread"
    )


async def _wait_for(awaitable: Awaitable[Result]) -> Result:
    return await awaitable
