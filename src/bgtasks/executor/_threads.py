"""The executor for plain functions: worker threads that end with the block."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import copy_context
from types import TracebackType
from typing import Any, Literal, TypeVar

from bgtasks import errors
from bgtasks._checks import check_seconds
from bgtasks._coroutines import async_generator
from bgtasks._internals import ManagerInternals
from bgtasks._locks import Lock, Signal
from bgtasks._notifier import Notifier
from bgtasks._reporting import log_extra
from bgtasks._submit import RetryPolicy
from bgtasks.executor import _refusals
from bgtasks.executor._base import CANCEL_ON_EXIT, RERAISE_ON_EXIT, ExecutorBase
from bgtasks.executor._call import BackgroundFuture, Call, Runner, set_cancelled, set_outcome
from bgtasks.executor._deadlines import WAIT, Deadlines
from bgtasks.executor._kinds import ExecutorKind, default_concurrency, runners_of
from bgtasks.executor._submit import Submit, typed_submit
from bgtasks.executor._threads_loop import ThreadsLoop
from bgtasks.manager import BackgroundTaskManager
from bgtasks.registry import LoopRecords

logger = logging.getLogger("bgtasks")

Result = TypeVar("Result")

_ASYNC_FUNCTION = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class BackgroundExecutor(ExecutorBase):
    """Runs functions in the background of a block, in threads, and waits for them at its end.

    The block is ``with``, or in a coroutine ``async with``, which leaves the loop free while it waits; ``open`` is for
    an executor that lives as long as its manager. Entering the block returns ``submit``. Leaving it cancels the
    functions submitted with ``__cancel_on_exit__`` and waits for all others, those submitted meanwhile included. Then
    it raises the first failure in the order of submission, unless the block itself raised; a failure with
    ``__reraise_on_exit__=False`` does not count. If the wait is interrupted (``KeyboardInterrupt``) or cancelled,
    waiting functions are cancelled, running ones are abandoned, and the interrupt or cancellation is raised.

    A function that runs in a thread cannot be interrupted. If it is cancelled at the end of the block, or its timeout
    expires, it is abandoned: its future gets its outcome at once, its result is discarded and its error logged. Neither
    the block nor the interpreter waits for its thread, which no longer counts in ``max_concurrency``.

    Args:
        config: a mapping, such as a LangChain ``RunnableConfig``; its ``max_concurrency`` is used if the keyword is not
            given.
        max_concurrency: the maximum number of threads, which are started as needed; a function that waits for one is
            shown as queued. None for the default of ``ThreadPoolExecutor``: the number of processors plus 4, at most
            32; for processes and interpreters the number of processors.
        manager: the manager that keeps the functions; a new one by default.
        abandon_running: False to wait for running functions that are cancelled at the end of the block.
        kind: ``"threads"``; or ``"processes"`` or ``"interpreters"`` (Python 3.14) for functions that compute. For
            these two, functions, arguments and results are pickled, and context variables are not passed. The process
            of an abandoned function is ended.

    Raises:
        InvalidOptionError: an argument has an invalid value, or this Python has no such interpreters.

    Example:
        >>> with BackgroundExecutor(max_concurrency=4) as submit:
        ...     power = submit(pow, 2, 10, __name__="power", __timeout__=5.0)
        >>> power.result()
        1024

    """

    def __init__(
        self,
        config: Mapping[str, object] | None = None,
        *,
        max_concurrency: int | None = None,
        manager: BackgroundTaskManager | None = None,
        abandon_running: bool = True,
        kind: ExecutorKind = "threads",
    ) -> None:
        super().__init__()
        self._make_runner = runners_of(kind)
        self._pickles = kind != "threads"
        limit = _refusals.limit_of(config, max_concurrency, self._zero_is_no_limit)
        self._limit = default_concurrency(kind) if limit is None else limit
        self._abandon_running = abandon_running
        self.manager: BackgroundTaskManager = BackgroundTaskManager() if manager is None else manager
        self._internals = ManagerInternals(self.manager)
        # The end of the block waits until the futures have their outcomes, not only until the last record is gone.
        context = self._context_of(config)
        self._task_set = self._internals.make_task_set(lambda: None, self._accept_failure, context=context)
        self._loop = ThreadsLoop()
        self._records: LoopRecords | None = None
        self._was_entered = False
        self._is_open = False
        self._is_exiting = False
        # Calls that have not ended, and the threads that run one. Submitters and workers change them without a lock, by
        # one operation each, and read them afterwards: of two racing threads, at least one sees the other's change.
        self._live: dict[Call, None] = {}
        self._running: dict[threading.Thread, None] = {}
        self._idle = Signal()
        # For coroutines that wait for the end of calls or of threads.
        self._notifier = Notifier()
        # Opened by open(): no block raises the failures.
        self._has_no_block = False
        self._queue: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        # Guards rare operations: starting and leaving threads, and failures. Re-entrant: a finaliser may submit.
        self._lock = Lock()
        self._threads: set[threading.Thread] = set()
        self._deadlines = Deadlines(self._expire)

    # Long, in one body: this is the hot path, and each further call costs measurable time.
    @typed_submit
    def submit(  # noqa: PLR0912
        self,
        fn: Callable[..., Result],
        /,
        *args: Any,
        __name__: str | None = None,
        __cancel_on_exit__: bool = False,
        __reraise_on_exit__: bool = True,
        __next_tick__: bool = False,
        __timeout__: float | None = None,
        __retry__: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> BackgroundFuture[Result]:
        """Run ``fn(*args, **kwargs)`` in a thread, in a copy of the submitter's context. Safe from any thread.

        Args:
            fn: a function.
            args: its positional arguments.
            __name__: the name of the task; the qualified name of the function by default.
            __cancel_on_exit__: cancel it at the end of the block instead of waiting for it.
            __reraise_on_exit__: raise its failure at the end of the block.
            __next_tick__: let the submitter go on first.
            __timeout__: seconds from its start after which the future fails with ``TimeoutError``, > 0; the function
                is then abandoned. With ``__retry__`` it is that of one attempt.
            __retry__: when to run it again after a failure, as for ``BackgroundTaskManager.submit``; None for never.
                All attempts have one future; the block waits for the last one, and raises its failure. An attempt that
                timed out in a thread may still run when the next one begins.
            kwargs: its keyword arguments.

        Returns:
            Its future, which a coroutine can await, too.

        Raises:
            ExecutorClosedError: the block has not begun or has ended.
            InvalidFunctionError: ``fn`` is not callable, or is a coroutine function.
            InvalidOptionError: an unknown option, or ``__retry__`` is no policy.
            InvalidTimeoutError: ``__timeout__`` is not a finite number greater than 0.
            NotPicklableError: ``fn`` or an argument cannot go to another process or interpreter.
            ManagerClosedError: the manager was shut down.
            TaskRejectedError: the manager is at its cap.
            RuntimeError: no thread could be started, and the executor has no other.

        """
        if not self._is_open:
            raise _refusals.closed(self, self._was_entered, not self._has_no_block)
        _check_function(fn)
        if kwargs:
            _refusals.check_submit_options(kwargs)
        if __timeout__ is not None:
            _refusals.check_timeout(__timeout__)
        assert self._records is not None, "the executor is open"
        call = Call(fn, args, kwargs, copy_context(), __next_tick__, __timeout__, self._cancel_call)
        if self._pickles:
            from bgtasks.executor._pickled import packed

            call.args = (packed(fn, args, kwargs),)
        name = call.__qualname__ if __name__ is None else str(__name__)
        submission = None
        if __retry__ is not None:
            submission = self._internals.make_submission(fn, args, kwargs, __retry__)
            call.give_up = self._give_up
        flags = (CANCEL_ON_EXIT if __cancel_on_exit__ else 0) | (RERAISE_ON_EXIT if __reraise_on_exit__ else 0)
        future: BackgroundFuture[Result] = BackgroundFuture(call)
        call.future = future
        try:
            # Sets ``call.record``.
            self._task_set.enroll_call(self._records, call, name, __timeout__, flags, future, submission)
            self._live[call] = None
            if not self._is_open:
                raise _refusals.closed(self, True, not self._has_no_block)
            self._queue.put(call)
            threads = len(self._threads)
            if threads < self._limit and self._queue.qsize() > threads - len(self._running):
                self._add_worker()
        except BaseException as error:
            # Unless a thread was faster, it will not run. An error such as Ctrl-C, which is no Exception, is raised in
            # any case.
            if self._take_back(call) or not isinstance(error, Exception):
                raise
        if self._is_exiting and __cancel_on_exit__:
            future.cancel()
        return future

    # -- threads --------------------------------------------------------------------------------------------------

    def _take_back(self, call: Call) -> bool:
        """Cancel a call that its submitter gets no future for; return whether it will not run."""
        if not hasattr(call, "record"):
            # It was not enrolled.
            call.close()
            return True
        return self._cancel_call(call)

    def _add_worker(self) -> None:
        """Start a thread if more calls wait than threads are idle, and the limit allows another.

        Raises:
            Exception: there could be none, and no other serves the executor.

        """
        worker: threading.Thread | None = None
        try:
            with self._lock:
                count = len(self._threads)
                if count >= self._limit or self._queue.qsize() <= count - len(self._running):
                    return
                worker = threading.Thread(target=self._work, name="bgtasks-worker", daemon=True)
                self._threads.add(worker)
            worker.start()
        except BaseException as error:
            with self._lock:
                if worker is not None and not worker.is_alive():
                    # If it starts after all, it finds itself missing here and ends.
                    self._threads.discard(worker)
                count = len(self._threads)
            if not count or not isinstance(error, Exception):
                raise
            logger.warning("No further thread could be started; %d serve the executor", count)

    def _work(self) -> None:
        """Run queued calls until the end of the queue, or until the running call was abandoned."""
        worker = threading.current_thread()
        with self._lock:
            if worker not in self._threads:
                return
        runner: Runner | None = None
        next_call = self._queue.get
        try:
            while (call := next_call()) is not None:
                try:
                    if runner is None:
                        runner = self._make_runner()
                    is_serving = self._serve(call, worker, runner)
                except BaseException as error:
                    is_serving = self._fail_unserved(call, worker, error)
                # The next call may come late: nothing may keep this one until then.
                del call
                if not is_serving:
                    return
        finally:
            try:
                if runner is not None:
                    runner.close()
            finally:
                with self._lock:
                    self._threads.discard(worker)
                self._notifier.notify()

    def _serve(self, call: Call, worker: threading.Thread, runner: Runner) -> bool:
        """Run a call that waited, unless it was cancelled; return whether the thread goes on to serve."""
        running = self._running
        call.worker = worker
        call.runner = runner
        running[worker] = None
        is_serving = True
        if call.record.begin_call():
            if self._queue.qsize() > len(self._threads) - len(running) and len(self._threads) < self._limit:
                # Submitted between taking this call and marking it as running, when this thread looked idle.
                self._add_worker()
            try:
                is_serving = self._run(call, runner)
            except BaseException:
                self._log_escaped(call)
                is_serving = worker in self._threads
        running.pop(worker, None)
        return is_serving

    def _fail_unserved(self, call: Call, worker: threading.Thread, error: BaseException) -> bool:
        """Finish a call that could not be run; return whether the thread goes on to serve."""
        self._running.pop(worker, None)
        try:
            # The bookkeeping at its end may have failed half-way.
            if call.record.finish_call("failed", error) or call in self._live:
                call.close()
                self._finish(call, None, error)
        except BaseException:
            self._log_escaped(call)
        return worker in self._threads

    def _run(self, call: Call, runner: Runner) -> bool:
        """Run a function and finish its call; return False if the call and this thread were abandoned meanwhile."""
        call.is_running = True
        attempt = call.attempt
        result, error = self._outcome_of(call, runner, attempt)
        if call.timeout is not None:
            self._deadlines.discard()
        if attempt and error is not None:
            if call.record.suspend_call(attempt):
                # Idle, for those who count the threads that the next attempt may need.
                self._running.pop(call.worker, None)
                self._end_attempt(call, "failed", error)
                return True
            is_first = False
        else:
            is_first = call.record.finish_call("completed" if error is None else "failed", error, False, attempt)
        if is_first or call.record.outcome != "running":
            call.close()
        if is_first:
            self._finish(call, result, error)
        elif error is not None and not isinstance(error, errors.WorkerDiedError):
            logger.error(
                "Background task '%s' failed after it was abandoned: %s",
                call.record.name,
                errors.text_of(error),
                exc_info=error,
                extra=log_extra(call.record),
            )
        return is_first

    def _outcome_of(self, call: Call, runner: Runner, attempt: int) -> tuple[Any, BaseException | None]:
        """Run a call; return its result and its error."""
        try:
            if call.timeout is not None:
                self._deadlines.add(call, call.timeout, attempt)
            return runner.run(call), None
        except BaseException as error:
            return None, error

    def _log_escaped(self, call: Call) -> None:
        """Log a BaseException of a done callback or a hook: nothing above these threads catches it."""
        logger.error("A done callback or hook of background task '%s' raised", call.record.name, exc_info=True)

    # -- outcomes -------------------------------------------------------------------------------------------------

    def _finish(self, call: Call, result: Any, error: BaseException | None) -> None:
        """Report a call whose record is finished, and set the outcome of its future."""
        record, future = call.record, call.future
        if error is not None and record.flags & RERAISE_ON_EXIT and not self._has_no_block:
            with self._lock:
                self._failures.keep(record.task_id, future)
        try:
            record.report_call(error)
        finally:
            try:
                set_outcome(future, result, error)
            finally:
                self._leave(call)

    def _cancel_call(self, call: Call, abandon: bool = False) -> bool:
        """Cancel a waiting call, and with ``abandon`` abandon a running one; return whether its future is cancelled."""
        record, future = call.record, call.future
        if record.finish_call("cancelled", if_queued=True):
            call.close()
        elif abandon and record.finish_call("abandoned"):
            self._abandon(call)
        else:
            # The thread that finished the record may not have set the outcome of the future yet.
            return record.outcome in ("cancelled", "abandoned")
        try:
            record.report_call()
        finally:
            try:
                set_cancelled(future)
            finally:
                self._leave(call)
        return True

    def _expire(self, call: Call, attempt: int) -> None:
        """End the wait of a call, or its attempt that still runs: with TimeoutError, and abandon its function."""
        try:
            if attempt == WAIT:
                self._requeue(call)
            elif attempt and call.record.suspend_call(attempt):
                self._abandon(call)
                # The abandoned function is still in the other one.
                call.context = None if call.context is None else call.context.copy()
                self._end_attempt(call, "timed_out", TimeoutError(f"timed out after {call.timeout} seconds"))
            elif not attempt and call.record.finish_call("timed_out"):
                self._abandon(call)
                self._finish_expired(call, TimeoutError(f"timed out after {call.timeout} seconds"))
        except BaseException:
            self._log_escaped(call)

    def _finish_expired(self, call: Call, error: TimeoutError) -> None:
        try:
            self._internals.report_timeout(call.record)
        finally:
            self._finish(call, None, error)

    # -- attempts -------------------------------------------------------------------------------------------------

    def _end_attempt(self, call: Call, outcome: Literal["failed", "timed_out"], error: BaseException) -> None:
        """Have another attempt follow the one that failed, or finish the call, which waits and does not run."""
        call.is_running = False
        seconds = self._internals.wait_after(call.record, error)
        if seconds is None:
            if call.record.finish_call(outcome, error):
                call.close()
                if isinstance(error, TimeoutError) and outcome == "timed_out":
                    self._finish_expired(call, error)
                else:
                    self._finish(call, None, error)
        elif seconds > 0:
            try:
                self._deadlines.add(call, seconds, WAIT)
            except Exception:
                # No thread could be started.
                self._give_up(call, error)
        else:
            self._requeue(call)

    def _requeue(self, call: Call) -> None:
        """Have a thread begin the next attempt of a call that waits; do nothing if it was cancelled."""
        if not call.record.queue_call():
            return
        self._queue.put(call)
        try:
            self._add_worker()
        except Exception as error:
            self._give_up(call, error)

    def _give_up(self, call: Call, error: BaseException) -> None:
        """Fail a call that waits for its next attempt."""
        if call.record.finish_call("failed", error, True):
            call.close()
            self._finish(call, None, error)

    def _abandon(self, call: Call) -> None:
        """Give up the thread of a running function, and start another if one is needed."""
        with self._lock:
            self._threads.discard(call.worker)
            self._running.pop(call.worker, None)
        call.runner.interrupt()
        # If none can be started, the next submission tries again.
        with contextlib.suppress(RuntimeError):
            self._add_worker()

    def _leave(self, call: Call) -> None:
        self._live.pop(call, None)
        if self._is_exiting and not self._live:
            self._idle.set()
            self._notifier.notify()

    # -- the block ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Submit:
        """Open the executor and return ``submit``."""
        if self._was_entered:
            raise _refusals.closed(self, True)
        self._was_entered = True
        self._records = self._internals.add_loop(self._loop)
        self._is_open = True
        return self.submit

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the block as the class says: cancel, wait, raise the first failure."""
        self._is_exiting = True
        try:
            self._cancel_live(CANCEL_ON_EXIT, self._abandon_running)
            self._close_when_idle()
        except BaseException:
            self._is_open = False
            self._cancel_live(0, True)
            raise
        finally:
            self._end_threads()
        self._end_block(kind)

    def _cancel_live(self, flags: int, abandon: bool) -> None:
        """Cancel the calls with these flags: first the waiting ones, so that none starts in the place of another."""
        calls = [call for call in list(self._live) if call.record.flags & flags == flags]
        for call in calls:
            self._cancel_call(call)
        if abandon:
            for call in calls:
                self._cancel_call(call, abandon=True)

    def _close_when_idle(self) -> None:
        """Wait until every call has ended, those submitted meanwhile included, and accept no more."""
        while True:
            self._idle.clear()
            if self._live:
                self._idle.wait()
                continue
            self._is_open = False
            if not self._live:
                return
            # Another thread submitted just now.
            self._is_open = True

    def _end_threads(self) -> None:
        """End the threads, except those of abandoned functions."""
        for worker in self._dismiss_threads():
            if worker is not threading.current_thread():
                self._join(worker)

    def _join(self, worker: threading.Thread) -> None:
        """Wait for the end of a thread, which another one may be about to start."""
        while worker in self._threads and not worker.is_alive():
            time.sleep(0.0001)
        if worker.is_alive():
            worker.join()

    def _dismiss_threads(self) -> list[threading.Thread]:
        """Have the threads end once they are idle, and return them."""
        self._loop.close()
        self._deadlines.stop()
        with self._lock:
            workers = list(self._threads)
        for _ in workers:
            self._queue.put(None)
        return workers

    # -- the block of a coroutine ---------------------------------------------------------------------------------

    async def __aenter__(self) -> Submit:
        """Open the executor and return ``submit``."""
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the block as the class says, and leave the loop free while it waits."""
        self._is_exiting = True
        try:
            self._cancel_live(CANCEL_ON_EXIT, self._abandon_running)
            await self._wait_and_close()
        except BaseException:
            self._is_open = False
            self._cancel_live(0, True)
            raise
        finally:
            await self._wait_for_threads()
        self._end_block(kind)

    async def _wait_and_close(self) -> None:
        """Do as ``_close_when_idle``, in a coroutine."""
        while True:
            await self._notifier.wait_until(self._is_idle, None)
            self._is_open = False
            if not self._live:
                return
            # Another thread submitted just now.
            self._is_open = True

    async def _wait_for_threads(self) -> None:
        """Do as ``_end_threads``, in a coroutine, however often it is cancelled: idle threads end soon."""
        workers = self._dismiss_threads()
        cancellation: asyncio.CancelledError | None = None
        while self._threads:
            try:
                await self._notifier.wait_until(self._has_no_thread, None)
            except asyncio.CancelledError as error:
                cancellation = error
        for worker in workers:
            # It has done its last step.
            self._join(worker)
        if cancellation is not None:
            raise cancellation

    def _is_idle(self) -> bool:
        return not self._live

    def _has_no_thread(self) -> bool:
        return not self._threads

    # -- without a block ------------------------------------------------------------------------------------------

    def open(self) -> Submit:
        """Open the executor for as long as its manager lives, and return ``submit``.

        ``manager.shutdown`` lets functions finish while it drains, cancels those that wait, and abandons those that
        still run when its time is over. No block raises failures: they are in the log, in ``on_error`` and in the
        futures.

        Raises:
            ExecutorClosedError: it was opened or entered before.

        Example:
            >>> async def main():
            ...     async with BackgroundTaskManager() as manager:
            ...         submit = BackgroundExecutor(manager=manager).open()
            ...         print(await submit(pow, 2, 10))
            >>> asyncio.run(main())
            1024

        """
        submit = self.__enter__()
        self._has_no_block = True
        self.manager.attach(self)
        return submit

    def attached(self, manager: BackgroundTaskManager, /) -> None:
        """Do nothing: an executor has had its manager from the beginning. Called by ``manager.attach``."""

    async def flush(self, timeout: float, /) -> None:
        """Do nothing: ``manager.shutdown``, which calls this, waits for functions as it does for tasks."""

    async def close(self, timeout: float = 5.0) -> None:
        """End what ``open`` began: refuse new functions, let the others finish, and abandon them after ``timeout``.

        ``manager.shutdown`` calls it. A second call does nothing, nor does one for an executor with a block.

        Args:
            timeout: seconds, >= 0.

        """
        check_seconds("timeout", timeout)
        self.manager.detach(self)
        if self._is_exiting or not self._has_no_block:
            return
        self._is_open = False
        self._is_exiting = True
        try:
            await self._notifier.wait_until(self._is_idle, timeout)
        finally:
            self._cancel_live(0, True)
            await self._wait_for_threads()


def _check_function(fn: Callable[..., Any]) -> None:
    """Refuse an object that is not a plain function."""
    if not callable(fn):
        raise _refusals.not_callable(fn)
    code = getattr(fn, "__code__", None)
    if code is None:
        is_async = inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn)
    else:
        is_async = bool(code.co_flags & _ASYNC_FUNCTION)
    if is_async:
        if inspect.isasyncgenfunction(fn):
            raise async_generator(fn)
        raise _refusals.wants_loop(errors.describe(fn))
