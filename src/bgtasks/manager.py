"""The policy above the registry: what is let in, what is reported, how it all ends."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import logging
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self, TypeVar

from bgtasks import errors
from bgtasks._bell import Bell
from bgtasks._task import users_traceback
from bgtasks.info import ManagerStats, ShutdownStats, TaskInfo, TaskMetadata
from bgtasks.registry import DEFAULT_NAME, Record, Registry

__all__ = ["BackgroundTaskManager"]

logger = logging.getLogger("bgtasks")

Result = TypeVar("Result")

# Once in so many seconds a full manager says so in the log, however much it drops.
DROP_WARNING_INTERVAL: Final = 5.0
# A task that swallowed its cancellation gets a second one when shutdown's time is up, and so many seconds to heed it.
SECOND_CANCEL_GRACE: Final = 0.1
# A cancelled shutdown outlasts so many more cancellations: anyio repeats its own in every iteration of the loop.
CANCELLATIONS_OUTLASTED: Final = 5
# Of so many stragglers the log says where they stand.
STRAGGLERS_LOGGED: Final = 20
# Publishers may take so many seconds of a shutdown, or half of it, before tasks are cancelled.
LONGEST_FLUSH: Final = 5.0
# Every manager there is, by its id(), for what looks from outside; it keeps none of them.
managers: weakref.WeakValueDictionary[int, BackgroundTaskManager] = weakref.WeakValueDictionary()


def _renew_locks() -> None:
    for manager in managers.values():
        manager._renew_lock()
        manager._policy_lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    # Another thread of the parent may hold them, and there is none in the child to let them go.
    os.register_at_fork(after_in_child=_renew_locks)


class Drainable(Protocol):
    """What holds something back that must be out before the manager is gone: a publisher, for one."""

    async def flush(self, deadline: float) -> object:
        """Send what is held back, within ``deadline`` seconds."""

    async def close(self, deadline: float) -> object:
        """Take nothing more, send what is held back and end, within ``deadline`` seconds."""


class BackgroundTaskManager(Registry):
    """Starts coroutines in the background, keeps every one until it ends, and ends them all in good order.

    It can be made without a running loop, serves loops one after another and in several threads at once, and is true
    even when empty.

    Args:
        default_shutdown_timeout: seconds that ``shutdown`` waits for cancelled tasks, >= 0.
        max_pending_tasks: how many tasks may be in flight, queued ones included; 0 for no cap.
        overflow: at the cap, ``"raise"`` a ``TaskRejectedError`` or ``"drop_new"``: close the coroutine, return None
            and count it in ``dropped_count``.
        max_concurrency: how many coroutines may run at once; the others wait in order, unstarted, shown as queued.
            None for no limit. A running task that awaits a queued one of its own manager holds the place that the other
            one needs.
        drain_timeout: seconds that ``shutdown`` lets tasks finish before it cancels them, >= 0.
        on_error: called as ``on_error(info, exception)`` for each task that failed, after the log record.
        history: how many finished tasks ``get_history`` remembers.

    Raises:
        InvalidOptionError: an argument is outside its values.

    Example:
        >>> async def main():
        ...     async with BackgroundTaskManager() as manager:
        ...         manager.create_task(send("hello"), name="greeting", timeout=5.0)
        ...         await manager.wait_for_all()

    """

    def __init__(
        self,
        default_shutdown_timeout: float = 30.0,
        max_pending_tasks: int = 0,
        *,
        overflow: Literal["raise", "drop_new"] = "raise",
        max_concurrency: int | None = None,
        drain_timeout: float = 0.0,
        on_error: Callable[[TaskInfo, BaseException], object] | None = None,
        history: int = 0,
    ) -> None:
        self._default_shutdown_timeout = checked_wait("default_shutdown_timeout", default_shutdown_timeout)
        self._drain_timeout = checked_wait("drain_timeout", drain_timeout)
        self._max_pending_tasks = _checked_count("max_pending_tasks", max_pending_tasks, 0)
        if overflow not in ("raise", "drop_new"):
            raise errors.InvalidOptionError(
                f"overflow must be 'raise' or 'drop_new', got {errors.describe(overflow)}; "
                "to wait for room, await spawn()"
            )
        if max_concurrency is not None:
            _checked_count("max_concurrency", max_concurrency, 1)
        if on_error is not None and not callable(on_error):
            raise errors.InvalidOptionError(f"on_error must be callable or None, got {errors.describe(on_error)}")
        super().__init__(
            history=_checked_count("history", history, 0),
            cap=self._max_pending_tasks,
            max_running=max_concurrency or 0,
            muted=self._muted_levels(),
            muted_level=logging.DEBUG,
        )
        self._overflow = overflow
        self._on_error = on_error
        self._dropped = 0
        self._last_drop_warning = -DROP_WARNING_INTERVAL
        self._phase: Literal["open", "draining", "cancelling", "closed"] = "open"
        # Guards the phase, the drop counter and the tables below: all are touched from several threads.
        self._policy_lock = threading.RLock()
        self._quiet = Bell()
        self._closed = Bell()
        self._room = Bell()
        self._waits = 0
        # Tasks of the manager that wait for all others: they are not waited for.
        self._waiting_inside: Counter[asyncio.AbstractEventLoop] = Counter()
        self._watches: list[list[BaseException]] = []
        # In the order in which they came: what a dict keeps and a set does not.
        self._attached: dict[Drainable, None] = {}
        self._handed_over: dict[
            concurrent.futures.Future[Any], tuple[asyncio.AbstractEventLoop, Coroutine[Any, Any, Any]]
        ] = {}
        managers[id(self)] = self

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._phase}, {self.get_task_count()} tasks>"

    # -- starting tasks: create_task, fire and task_factory come from the registry ------------------------------------

    async def spawn(
        self,
        coro: Coroutine[Any, Any, Result],
        *,
        name: str = DEFAULT_NAME,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
        eager_start: bool = False,
        contextvars_context: contextvars.Context | None = None,
    ) -> asyncio.Task[Result]:
        """Start a coroutine as ``create_task`` does, but wait for room where that one refuses or drops.

        Those that wait get room in the order in which they came. Arguments and errors are those of ``create_task``.

        Returns:
            The task.

        """
        while self._max_pending_tasks and self._phase == "open" and self._owned() >= self._max_pending_tasks:
            self._room_wanted = True
            try:
                await self._room.wait_until(self._has_room, None)
            except BaseException:
                errors.close_refused(coro)
                # The room that woke this one is free for the next.
                self._on_room()
                raise
        task = self.create_task(
            coro,
            name=name,
            timeout=timeout,
            context=context,
            eager_start=eager_start,
            contextvars_context=contextvars_context,
        )
        if task is None:
            # At the cap of a manager that is shutting down: nobody waits for room any more.
            raise errors.TaskRejectedError(self._full_text(name))
        try:
            return task
        finally:
            # The error of an eager task keeps this frame through its traceback: the frame must not keep the task.
            del task

    def create_task_threadsafe(
        self,
        coro: Coroutine[Any, Any, Result],
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        name: str = DEFAULT_NAME,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
        eager_start: bool = False,
        contextvars_context: contextvars.Context | None = None,
    ) -> concurrent.futures.Future[Result]:
        """Start a coroutine on the manager's loop from another thread.

        Args:
            coro: a coroutine object.
            loop: the loop to run on; needed only where the manager serves several running ones.
            name: as for ``create_task``.
            timeout: as for ``create_task``.
            context: as for ``create_task``.
            eager_start: as for ``create_task``.
            contextvars_context: as for ``create_task``.

        Returns:
            A future with the outcome; cancelling it cancels the task. What ``create_task`` would raise on the loop, and
            a drop at the cap, is set on the future.

        Raises:
            NotACoroutineError: ``coro`` is no coroutine object.
            NoRunningLoopError: no loop is known (enter the manager with ``async with``, or create a task in the loop
                first), several are, or the one given is closed. The coroutine is closed.

        """
        if not asyncio.iscoroutine(coro):
            raise errors.not_a_coroutine(coro)
        try:
            target = self._only_running_loop() if loop is None else loop
        except errors.NoRunningLoopError:
            errors.close_refused(coro)
            raise
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        options: dict[str, Any] = {
            "name": name,
            "timeout": timeout,
            "context": context,
            "eager_start": eager_start,
            "contextvars_context": contextvars_context,
        }
        self._handed_over[future] = (target, coro)
        try:
            target.call_soon_threadsafe(self._start_handed_over, future, options)
        except RuntimeError:
            del self._handed_over[future]
            errors.close_refused(coro)
            raise errors.NoRunningLoopError(
                "the event loop is closed: hand work over while it runs, or pass loop= with one that does"
            ) from None
        return future

    def _only_running_loop(self) -> asyncio.AbstractEventLoop:
        """Return the one running loop that the manager serves."""
        # What an executor's threads have for a loop runs no coroutines.
        loops = [
            loop
            for loop, _ in self._owned_by_loop()
            if loop.is_running() and isinstance(loop, asyncio.AbstractEventLoop)
        ]
        if len(loops) == 1:
            return loops[0]
        if loops:
            raise errors.NoRunningLoopError(
                f"the manager serves {len(loops)} running event loops: say which one with loop="
            )
        raise errors.NoRunningLoopError(
            "the manager knows no running event loop: enter it with 'async with', or create a task in the loop first, "
            "or pass loop="
        )

    def _start_handed_over(self, future: concurrent.futures.Future[Any], options: dict[str, Any]) -> None:
        """Start a coroutine that another thread handed over; runs on the loop."""
        loop, coro = self._handed_over.pop(future)
        if future.cancelled():
            errors.close_refused(coro)
            return
        try:
            task: asyncio.Task[Any] | None = self.create_task(coro, **options)
            if task is None:
                raise errors.TaskRejectedError(self._full_text(options["name"]))
        except BaseException as error:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        task.add_done_callback(functools.partial(_copy_outcome, future))

        def cancel_task(cancelled: concurrent.futures.Future[Any]) -> None:
            if cancelled.cancelled() and not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)

        future.add_done_callback(cancel_task)

    def _admit(self, coro: Coroutine[Any, Any, Any], name: str) -> bool:
        """Let a new task in, drop it, or refuse it with an error; what is not let in is closed."""
        if not self._takes_work():
            errors.close_refused(coro)
            raise errors.ManagerClosedError(
                f"the manager was shut down and takes no more tasks (name {errors.describe(name)}): "
                "start work before shutdown(), or make a new manager"
            )
        if not self._max_pending_tasks or self._owned() < self._max_pending_tasks:
            return True
        errors.close_refused(coro)
        if self._overflow == "raise":
            raise errors.TaskRejectedError(self._full_text(name))
        with self._policy_lock:
            self._dropped += 1
            now = time.monotonic()
            silent = now - self._last_drop_warning < DROP_WARNING_INTERVAL
            if not silent:
                self._last_drop_warning = now
        if not silent:
            self._log_drop(name)
        return False

    def _takes_work(self) -> bool:
        """Say whether a task may start now; while shutdown drains, only tasks of the manager may start others."""
        return self._phase == "open" or (self._phase == "draining" and self._current_record() is not None)

    def _log_drop(self, name: str) -> None:
        self._logger.warning(
            "%s Dropped %d so far; the next warning comes in %.0f s at the earliest.",
            self._full_text(name),
            self._dropped,
            DROP_WARNING_INTERVAL,
        )

    def _full_text(self, name: str) -> str:
        return (
            f"{self._max_pending_tasks} tasks are in flight (max_pending_tasks), no room for {errors.describe(name)}: "
            "await spawn() to wait for room, or raise the cap."
        )

    def _has_room(self) -> bool:
        return self._phase != "open" or self._owned() < self._max_pending_tasks

    def _on_room(self) -> None:
        if self._has_room():
            self._room.ring(1)
        self._room_wanted = bool(self._room)

    # -- looking at tasks -------------------------------------------------------------------------------------------

    @property
    def pending_count(self) -> int:
        """The number of tasks that have not ended, as ``get_task_count()``."""
        return int(self.get_task_count())

    @property
    def dropped_count(self) -> int:
        """The number of tasks that were dropped at the cap."""
        return self._dropped

    @property
    def _tasks(self) -> set[asyncio.Task[Any]]:
        """A set of the live tasks, made for the caller: tests and programs of the replaced manager read this name."""
        return {record.task for record in self._live_records() if record.task is not None}

    @property
    def _task_metadata(self) -> dict[asyncio.Task[Any], TaskMetadata]:
        """A dict with a ``TaskMetadata`` for each live task, made for the caller, as ``_tasks`` is."""
        now = time.time()
        return {
            record.task: TaskMetadata(record.name, now - record.duration, record.timeout, record.context)
            for record in self._live_records()
            if record.task is not None
        }

    def get_task(self, task_id: int) -> asyncio.Task[Any] | None:
        """Return the live task with this id, None if there is none or ``fire`` has not started it yet."""
        found: list[asyncio.Task[Any] | None] = [
            record.task for record in self._live_records() if record.task_id == task_id
        ]
        return found[0] if found else None

    def get_task_id(self, task: asyncio.Task[Any]) -> int | None:
        """Return the id of a live task of this manager, None for any other."""
        record = self._record_of(task)
        return None if record is None else record.task_id

    def stats(self) -> ManagerStats:
        """Return the counters since the manager was made, in all and for each name. Safe from any thread."""
        counters: ManagerStats = self._counters()
        counters["dropped"] = self._dropped
        return counters

    # -- stopping tasks ---------------------------------------------------------------------------------------------

    def cancel(self, task: int | str) -> int:
        """Cancel the task with this id, or all tasks of this name. Safe from any thread.

        Returns:
            How many tasks were asked to cancel; 0 if none matches.

        """
        return sum(
            self._request_cancel(record)
            for record in self._live_records()
            if (record.name if isinstance(task, str) else record.task_id) == task
        )

    def _request_cancel(self, record: Record) -> bool:
        """Cancel the task of a record on its own loop; return False if there is nothing to cancel."""
        loop = self._loop_of(record)
        if loop is None:
            return False
        if loop is asyncio._get_running_loop():
            return bool(record.cancel())
        try:
            loop.call_soon_threadsafe(record.cancel)
        except RuntimeError:
            return False
        return True

    async def cancel_all(self) -> None:
        """Cancel all tasks but the calling one and wait until they have ended, at most ``default_shutdown_timeout``.

        The manager stays open. Tasks on other loops are asked to cancel and not waited for.
        """
        current = self._current_record()
        loop = asyncio.get_running_loop()
        awaited = []
        for record in self._live_records():
            if record.is_observed or record is current:
                continue
            task = record.task
            if task is not None and self._loop_of(record) is loop:
                awaited.append(task)
            self._request_cancel(record)
        if awaited:
            _, remaining = await asyncio.wait(awaited, timeout=self._default_shutdown_timeout)
            if remaining:
                self._logger.warning(
                    "%d of %d tasks still run %.1f s after cancel_all()",
                    len(remaining),
                    len(awaited),
                    self._default_shutdown_timeout,
                )

    # -- waiting ----------------------------------------------------------------------------------------------------

    async def wait_for_all(self, timeout: float | None = None, return_exceptions: bool = False) -> None:
        """Wait until no task is left, those started meanwhile included, then raise the first failure among them.

        Nothing is cancelled, neither at the timeout nor when this wait is. Called from a task of the manager it does
        not wait for that one. Tasks that came through ``task_factory`` are not waited for.

        Args:
            timeout: seconds to wait at most, >= 0; None for no limit. When they are over a warning is logged and the
                call returns.
            return_exceptions: True to swallow the failures here; they were logged in any case.

        Raises:
            InvalidTimeoutError: ``timeout`` is negative or no number.
            BaseException: the first failure of a task during the wait.

        """
        if not await self._all_ended(timeout, return_exceptions):
            self._logger.warning("%d tasks still run after waiting %s s for all", self._owned(), timeout)

    async def _all_ended(self, timeout: float | None, return_exceptions: bool) -> bool:
        """Do what ``wait_for_all`` does, but return False where that one logs that the time is over."""
        if timeout is not None:
            checked_wait("timeout", timeout, errors.InvalidTimeoutError)
        failures: list[BaseException] = []
        self._watches.append(failures)
        try:
            if not await self._until_quiet(timeout):
                return False
        finally:
            # By identity: equal lists of two waiters are not one.
            self._watches = [watch for watch in self._watches if watch is not failures]
        if failures and not return_exceptions:
            try:
                raise failures[0]
            finally:
                failures.clear()
        return True

    async def _until_quiet(self, timeout: float | None) -> bool:
        """Wait until every task the manager owns has ended, save those that wait here themselves; say if it came so."""
        loop = asyncio.get_running_loop()
        current = self._current_record()
        inside = current is not None and not current.is_observed
        with self._policy_lock:
            self._waits += 1
            if inside:
                self._waiting_inside[loop] += 1
        if inside:
            self._quiet.ring()
        try:
            if not await self._quiet.wait_until(self._is_quiet, timeout):
                return False
        finally:
            with self._policy_lock:
                self._waits -= 1
                if inside:
                    self._waiting_inside[loop] -= 1
                    self._waiting_inside += Counter()
            self._set_wakes()
        # The last task rang from inside its last step: now its done callbacks have run, too.
        await asyncio.sleep(0)
        return True

    def _is_quiet(self) -> bool:
        """Say whether no owned task is left on any running loop, save those that wait; ask to hear of the change."""
        self._set_wakes()
        with self._policy_lock:
            return all(
                owned <= self._waiting_inside[loop] for loop, owned in self._owned_by_loop() if loop.is_running()
            )

    def _set_wakes(self) -> None:
        with self._policy_lock:
            for loop, _ in self._owned_by_loop():
                self._wake_at(loop, self._waiting_inside[loop] if self._waits else -1)

    def _on_quiet(self) -> None:
        self._quiet.ring()

    def _current_record(self) -> Record | None:
        """Return the record of the running task if it is one of this manager."""
        loop = asyncio._get_running_loop()
        task = None if loop is None else asyncio.current_task(loop)
        return None if task is None else self._record_of(task)

    # -- the end ----------------------------------------------------------------------------------------------------

    def attach(self, drainable: Drainable) -> None:
        """Have ``shutdown`` flush this before it cancels tasks, and close it after they have ended."""
        self._attached[drainable] = None

    def detach(self, drainable: Drainable) -> None:
        """Forget what was attached, if it is."""
        self._attached.pop(drainable, None)

    async def shutdown(self, timeout: float | None = None, *, drain: float | None = None) -> ShutdownStats:
        """Refuse new work, let tasks finish for ``drain`` seconds, cancel the rest and wait for them.

        While it drains, tasks of the manager may still start others. A task that swallows its cancellation is cancelled
        once more when the time is up, and then named and let go: it cannot hold the shutdown up. Called from a task of
        the manager it neither cancels nor waits for that one. If it is cancelled itself, it cancels the tasks at once,
        waits for them and lets the cancellation go on. Tasks that came through ``task_factory`` are left alone. What is
        attached is flushed before the first task is cancelled and closed after the last one has ended: a task's last
        events count, too.

        Args:
            timeout: seconds to wait for cancelled tasks and for what is attached, >= 0; ``default_shutdown_timeout`` by
                default.
            drain: seconds to let tasks finish first, >= 0; ``drain_timeout`` by default.

        Returns:
            What was done. A second call returns the status ``"already_shutdown"``, at the end of the first one.

        Raises:
            InvalidTimeoutError: ``timeout`` or ``drain`` is negative or no number; the manager stays open.

        """
        begun = time.monotonic()
        timeout = self._default_shutdown_timeout if timeout is None else timeout
        drain = self._drain_timeout if drain is None else drain
        checked_wait("timeout", timeout, errors.InvalidTimeoutError)
        checked_wait("drain", drain, errors.InvalidTimeoutError)
        with self._policy_lock:
            first = self._phase == "open"
            if first:
                self._phase = "draining"
        if not first:
            if self._current_record() is None:
                await self._closed.wait_until(self._is_closed, timeout + drain)
            return self._shutdown_stats("already_shutdown", 0, begun)
        self._shut_gate()
        self._room.ring()
        initial = len(self._others())
        try:
            if drain > 0:
                await self._until_quiet(drain)
            end = time.monotonic() + timeout
            await self._end_attached("flush", min(timeout / 2, LONGEST_FLUSH))
            self._cancel_others()
            if not await self._until_quiet(max(end - time.monotonic(), 0)):
                self._log_stragglers(self._others())
                self._cancel_others()
                await self._until_quiet(SECOND_CANCEL_GRACE)
            await self._end_attached("close", max(end - time.monotonic(), SECOND_CANCEL_GRACE))
        except asyncio.CancelledError:
            if self._phase == "draining":
                self._cancel_others()
            await self._outlast_cancellations(timeout)
            raise
        finally:
            self._phase = "closed"
            self._closed.ring()
        return self._shutdown_stats("completed", initial, begun)

    def _is_closed(self) -> bool:
        return self._phase == "closed"

    def _others(self) -> list[Record]:
        """Return the records of all tasks the manager owns but the calling one."""
        current = self._current_record()
        return [record for record in self._live_records() if record is not current and not record.is_observed]

    def _cancel_others(self) -> None:
        self._phase = "cancelling"
        for record in self._others():
            self._request_cancel(record)

    async def _end_attached(self, step: Literal["flush", "close"], timeout: float) -> None:
        """Flush or close all that is attached, at once; what goes wrong with one is logged."""
        attached = list(self._attached)
        if not attached:
            return
        steps = [drainable.flush(timeout) if step == "flush" else drainable.close(timeout) for drainable in attached]
        for drainable, outcome in zip(attached, await asyncio.gather(*steps, return_exceptions=True), strict=True):
            if isinstance(outcome, BaseException):
                logger.error("Shutdown could not %s %r", step, drainable, exc_info=outcome)

    async def _outlast_cancellations(self, timeout: float) -> None:
        """Wait for cancelled tasks although the caller is cancelled, too; give up when that is repeated."""
        deadline = time.monotonic() + timeout
        for _ in range(CANCELLATIONS_OUTLASTED):
            try:
                await self._until_quiet(max(deadline - time.monotonic(), 0))
                await self._end_attached("close", max(deadline - time.monotonic(), SECOND_CANCEL_GRACE))
                return
            except asyncio.CancelledError:
                continue

    def _shutdown_stats(
        self, status: Literal["completed", "already_shutdown"], initial: int, begun: float
    ) -> ShutdownStats:
        names = sorted(record.name for record in self._others())
        stats: ShutdownStats = {
            "status": "timeout" if names and status == "completed" else status,
            "initial_tasks": initial,
            "completed_tasks": max(initial - len(names), 0),
            "remaining_tasks": len(names),
            "duration_seconds": time.monotonic() - begun,
            "remaining_names": names,
        }
        return stats

    def _log_stragglers(self, others: list[Record], end: str = "shutdown") -> None:
        for record in others[:STRAGGLERS_LOGGED]:
            self._logger.warning(
                "Background task '%s' still runs at the end of %s, %s",
                record.name,
                end,
                where(record.coro),
                extra=log_extra(record),
            )
        if len(others) > STRAGGLERS_LOGGED:
            self._logger.warning(
                "%d more background tasks still run at the end of %s", len(others) - STRAGGLERS_LOGGED, end
            )

    async def aclose(self) -> None:
        """Shut down, as ``shutdown()``; for ``contextlib.aclosing``."""
        await self.shutdown()

    async def __aenter__(self) -> Self:
        """Make the running loop known to ``create_task_threadsafe`` and return the manager."""
        self._bind_running_loop()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Shut down; if the block raised, without draining first."""
        await self.shutdown(drain=None if error is None else 0.0)

    # -- what the registry tells ------------------------------------------------------------------------------------

    @property
    def _logger(self) -> logging.Logger:
        """The logger of this manager; a framework whose manager is replaced has its own."""
        return logger

    def _muted_levels(self) -> dict[int, bool] | None:
        """Return the dict in which the registry looks up whether completed tasks need a report, None for always."""
        # While DEBUG is off the logger's own cache says so: one dict look-up a task instead of a call.
        return getattr(self._logger, "_cache", None)

    def _report(self, record: Record, error: BaseException | None) -> None:
        outcome = record.outcome
        if outcome == "failed":
            if error is not None and not record.is_observed:
                self._report_failure(record, error)
            return
        if not self._logger.isEnabledFor(logging.DEBUG):
            return
        if outcome == "completed":
            text = "Background task '%s' completed after %.3f s"
        elif outcome == "cancelled":
            text = "Background task '%s' was cancelled after %.3f s"
        elif outcome == "abandoned":
            text = "Background task '%s' was closed from outside after %.3f s"
        else:
            text = "Background task '%s' ended after its timeout, %.3f s old"
        self._guarded(record, self._logger.debug, text, record.name, record.duration, extra=log_extra(record))

    def _report_failure(self, record: Record, error: BaseException) -> None:
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            # They leave the loop and reach whoever runs it; here they would be told twice.
            return
        for watch in self._watches:
            watch.append(error)
        group = record.group
        if group is not None and not group.owner._takes_failure(record, error):
            return
        self._guarded(record, self._log_failure, record, error)
        if self._on_error is not None:
            self._guarded(record, self._on_error, record.info(), error)

    def _log_failure(self, record: Record, error: BaseException) -> None:
        self._logger.error(
            "Background task '%s' failed after %.3f s: %s: %s",
            record.name,
            record.duration,
            type(error).__name__,
            error,
            exc_info=users_part(error),
            extra=log_extra(record),
        )

    def _on_timeout(self, record: Record) -> None:
        self._warn_of_timeout(record)
        self._guarded(record, record.cancel, f"timed out after {record.timeout} seconds")

    def _warn_of_timeout(self, record: Record) -> None:
        self._guarded(
            record,
            self._logger.warning,
            "Background task '%s' timed out after %s seconds",
            record.name,
            record.timeout,
            extra=log_extra(record),
        )

    def _on_abandoned(self, names: dict[str, int]) -> None:
        self._logger.warning(
            "A closed event loop left %d background tasks behind; they are abandoned: %s",
            sum(names.values()),
            ", ".join(f"{name} ({count})" for name, count in names.items()),
        )

    def _let_go_of_closed_loops(self) -> None:
        super()._let_go_of_closed_loops()
        for future, (loop, _) in list(self._handed_over.items()):
            if loop.is_closed():
                handed_over = self._handed_over.pop(future, None)
                if handed_over is not None:
                    errors.close_refused(handed_over[1])
                    if future.set_running_or_notify_cancel():
                        future.set_exception(
                            errors.NoRunningLoopError("the event loop was closed before it could start the task")
                        )

    def _guarded(self, record: Record, function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Call what may be the user's: an error of a hook or a logging handler goes to the loop, once."""
        try:
            function(*args, **kwargs)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            loop = self._loop_of(record)
            if loop is not None:
                loop.call_exception_handler(
                    {
                        "message": f"Reporting on background task {record.name!r} failed",
                        "exception": error,
                        # Not under the key "task": the loop would enter that task's context, which is entered now.
                        "task_id": record.task_id,
                        "task_name": record.name,
                    }
                )


def log_extra(record: Record) -> dict[str, Any]:
    """Return what goes with every log record on a task."""
    return {"task_id": record.task_id, "task_name": record.name, "task_context": record.context}


def users_part(error: BaseException) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    """Return an error for ``exc_info``, its traceback from the user's first frame on."""
    return type(error), error, users_traceback(error)


def where(coro: Any) -> str:
    """Return where a suspended coroutine stands: file, line and function of its innermost frame."""
    frame = None
    while coro is not None and getattr(coro, "cr_frame", None) is not None:
        frame = coro.cr_frame
        coro = getattr(coro, "cr_await", None)
    if frame is None:
        return "nothing is known of where it stands"
    return f"at {frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"


def _copy_outcome(future: concurrent.futures.Future[Any], task: asyncio.Task[Any]) -> None:
    """Give the outcome of a task to the future of the thread that handed it over."""
    if task.cancelled():
        future.cancel()
        future.set_running_or_notify_cancel()
        return
    if not future.set_running_or_notify_cancel():
        return
    error = task.exception()
    if error is None:
        future.set_result(task.result())
    else:
        future.set_exception(error)


def checked_wait(name: str, seconds: float, kind: type[errors.BgtasksError] = errors.InvalidOptionError) -> float:
    """Return ``seconds`` if it is a length of time a wait can have."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
        raise kind(f"{name} must be a number of seconds, 0 or more; got {errors.describe(seconds)}")
    return seconds


def _checked_count(name: str, count: int, least: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise errors.InvalidOptionError(f"{name} must be a whole number, {least} or more; got {errors.describe(count)}")
    return count
