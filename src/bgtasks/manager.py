"""The manager: admits work, reports the ends of tasks, and shuts everything down."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import logging
import time
from asyncio.events import _get_running_loop
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Hashable, Mapping, Sequence
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar, get_args
from weakref import WeakKeyDictionary

from bgtasks import errors
from bgtasks._capacity import CapacityWait
from bgtasks._checks import check_choice, check_seconds
from bgtasks._fork import follow_forks
from bgtasks._handover import Handovers
from bgtasks._idle import IdleWait
from bgtasks._locks import Lock
from bgtasks._observers import FailureCollector, Observers
from bgtasks._options import check_options, is_watched
from bgtasks._reporting import DROP_WARNING_INTERVAL, TaskLog, guarded, listed, names_of, numbered, runs
from bgtasks._selection import chosen_names
from bgtasks._shutdown import Flushable, Shutdown
from bgtasks.info import (
    LoopStats,
    ManagerStats,
    ShutdownStats,
    TaskInfo,
    TaskOverflow,
    TimeoutAction,
    TimeoutPolicy,
)
from bgtasks.policies._limits import Limit, Rate, timing_of
from bgtasks.policies._policies import Policies, check_submission
from bgtasks.policies._results import TaskResult
from bgtasks.policies._retry import policy_of
from bgtasks.policies._schedules import FirstRun, OnRunError, Overlap, Schedule, ScheduleOptions
from bgtasks.policies._services import DEFAULT_RESTART, Restart, Service, ServiceOptions
from bgtasks.registry import Record, Registry

__all__ = ["Attachable", "BackgroundTaskManager"]

logger: Final = logging.getLogger("bgtasks")

Result = TypeVar("Result")


class Attachable(Flushable, Protocol):
    """An object for ``attach``: it buffers work, which must be sent before the manager has shut down."""

    def attached(self, manager: BackgroundTaskManager, /) -> None:
        """Remember the manager that flushes and closes this object; keep the first one."""


class BackgroundTaskManager(Registry):
    """Starts coroutines in the background, keeps every one until it ends, and shuts them all down cleanly.

    It can be made without a running loop, serves loops one after another and in several threads at once, and is true
    even when it has no tasks.

    Args:
        default_shutdown_timeout: seconds that ``shutdown`` waits for cancelled tasks, >= 0.
        max_pending_tasks: how many tasks may be in flight, queued ones included; None for no limit.
        overflow: what ``fire`` does at ``max_pending_tasks``: ``"raise"`` a ``TaskRejectedError``, as ``create_task``
            always does, or ``"drop_newest"``: close the coroutine, return False and count it in ``dropped_count``.
        max_concurrency: how many coroutines may run at once; the others wait in order, unstarted, shown as queued.
            None for no limit. A running task that awaits a queued one of its own manager holds the slot that the queued
            one needs.
        drain_timeout: seconds that ``shutdown`` lets tasks finish before it cancels them, >= 0.
        on_error: called as ``on_error(info, exception)`` for each task that failed, after the log record; for one that
            timed out with a ``TimeoutError``.
        history: how many finished tasks ``get_history`` remembers.
        timeouts: what awaiting a task raises whose timeout is over: ``"cancel"`` the ``CancelledError`` of its
            cancellation, ``"raise"`` a ``TimeoutError``.
        track_origin: whether ``get_task_info`` says which line created each task; about a microsecond per task.
        watch: whether viewers such as ``bgtasks ps`` may look at this process, by a socket that only its user may
            open, and whether ``async with`` on the manager watches the loop, as ``watch_loop`` does. None: as
            ``BGTASKS_WATCH`` says, ``1`` or ``0``.
        rate: how many tasks begin in a time; the others wait in order, unstarted, shown as queued. None for no limit.
        limits: a ``Limit`` by the key or the name of tasks; a task with a key in here has that limit, and not that of
            its name. What it lets through waits for the rate and the concurrency of the manager.

    Raises:
        InvalidOptionError: an argument has an invalid value.
        WatchError: the process cannot be watched; ``watch=False`` does without.

    Example:
        >>> async def main():
        ...     async with BackgroundTaskManager() as manager:
        ...         manager.create_task(send("hello"), name="greeting", timeout=5.0)
        ...         await manager.wait_for_all()
        ...     print(manager.stats()["completed"])
        >>> asyncio.run(main())
        1

    """

    # Long, but without a branch: it checks the options and sets the fields.
    def __init__(
        self,
        default_shutdown_timeout: float = 30.0,
        max_pending_tasks: int | None = None,
        *,
        overflow: TaskOverflow = "raise",
        max_concurrency: int | None = None,
        drain_timeout: float = 0.0,
        on_error: Callable[[TaskInfo, BaseException], object] | None = None,
        history: int = 0,
        timeouts: TimeoutPolicy = "cancel",
        track_origin: bool = False,
        watch: bool | None = None,
        rate: Rate | None = None,
        limits: Mapping[Hashable, Limit] | None = None,
    ) -> None:
        check_options(
            {
                "default_shutdown_timeout": default_shutdown_timeout,
                "max_pending_tasks": max_pending_tasks,
                "overflow": overflow,
                "max_concurrency": max_concurrency,
                "drain_timeout": drain_timeout,
                "on_error": on_error,
                "history": history,
                "timeouts": timeouts,
                "track_origin": track_origin,
                "watch": watch,
                "rate": rate,
                "limits": limits,
            }
        )
        self._is_watched = is_watched(watch)
        self._log = self._make_log()
        super().__init__(
            history=history,
            tracks_origin=track_origin,
            cap=max_pending_tasks,
            max_running=max_concurrency,
            muted=self._log.muted_levels(),
            muted_level=logging.DEBUG,
        )
        if rate is not None or limits:
            self._limit_starts(
                max_concurrency,
                timing_of(rate),
                {name: (limit.concurrency, timing_of(limit.rate)) for name, limit in (limits or {}).items()},
            )
        self._default_shutdown_timeout = default_shutdown_timeout
        self._drain_timeout = drain_timeout
        self._max_pending_tasks = max_pending_tasks
        self._overflow: TaskOverflow = overflow
        self._on_error = on_error
        self._timeouts: TimeoutPolicy = timeouts
        self._dropped = 0
        self._last_drop_warning = -DROP_WARNING_INTERVAL
        # Guards the drop counter, which several threads change.
        self._policy_lock = Lock()
        self._idle = IdleWait(self._owned_by_loop, self._set_idle_threshold)
        # The names of the tasks that the owner of a loop cancels, by loop. Weak: it may close the loop at once.
        self._cancelled_by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, Counter[str]] = WeakKeyDictionary()
        self._capacity = CapacityWait(self, self._has_capacity, max_pending_tasks)
        self._handovers = Handovers(lambda future, task: None)
        self._policies = Policies(
            self._live_records, self._is_open, self._make_submission, self._launch, self._fire, self._fire_during
        )
        # A dict, not a set, because it keeps the order in which they were attached.
        self._attached: dict[Attachable, None] = {}
        self._shutdown = Shutdown(self, self._log, self._idle, self._capacity, self._policies, self._attached.keys())
        self._hearts: list[Any] = []
        # Last: from here on, other threads find the manager.
        self._observers = Observers(self)
        follow_forks(self, BackgroundTaskManager._after_fork)
        if self._is_watched:
            from bgtasks.watch import listen

            listen()

    def _make_log(self) -> TaskLog:
        """Return the writer of log records; a manager for a framework overrides it."""
        return TaskLog()

    def _after_fork(self) -> None:
        """Make new locks in the child of a fork, where no thread is left to release the old ones."""
        super()._after_fork()
        self._policy_lock = Lock()
        self._idle.after_fork()
        self._capacity.after_fork()
        self._shutdown.after_fork()
        # The loops of the parent do not run here.
        for heart in self._hearts:
            self._attached.pop(heart, None)
        self._hearts = []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._shutdown.phase}, {self.get_task_count()} tasks>"

    # -- starting tasks: create_task, fire, submit and task_factory are inherited ---------------------------------

    async def spawn(
        self,
        coro: Coroutine[Any, Any, Result],
        *,
        name: str | None = None,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
        eager_start: bool = False,
        contextvars_context: contextvars.Context | None = None,
    ) -> asyncio.Task[Result]:
        """Start a coroutine as ``create_task`` does, but wait for capacity instead of refusing.

        Waiting calls go on in the order in which they came. Arguments and errors are those of ``create_task``, save for
        ``service``: a service needs no capacity.

        Returns:
            The task.

        Raises:
            TaskRejectedError: called by a task of the manager, and all others in flight wait in here, too: none of them
                could ever end.

        """
        try:
            if not self._has_capacity():
                await self._capacity.wait(coro)
        except BaseException:
            errors.close_refused(coro)
            # Pass the notification that woke this call on to the next one.
            self._on_capacity()
            raise
        return self.create_task(
            coro,
            name=name,
            timeout=timeout,
            context=context,
            eager_start=eager_start,
            contextvars_context=contextvars_context,
        )

    def create_task_threadsafe(
        self,
        coro: Coroutine[Any, Any, Result],
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        name: str | None = None,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
        eager_start: bool = False,
        contextvars_context: contextvars.Context | None = None,
        service: bool = False,
    ) -> concurrent.futures.Future[Result]:
        """Start a coroutine on the manager's loop from another thread.

        Args:
            coro: a coroutine object.
            loop: the loop to run on; needed only if the manager serves several running ones.
            name: as for ``create_task``.
            timeout: as for ``create_task``.
            context: as for ``create_task``.
            eager_start: as for ``create_task``.
            contextvars_context: as for ``create_task``.
            service: as for ``create_task``.

        Returns:
            A future with the outcome; cancelling it cancels the task. If ``create_task`` raises on the loop, the
            future gets the error.

        Raises:
            NotACoroutineError: ``coro`` is not a coroutine object.
            NoRunningLoopError: no loop is known (enter the manager with ``async with``, or create a task in the loop
                first), several are, or the given one is closed. The coroutine is closed.

        """
        if not asyncio.iscoroutine(coro):
            raise errors.not_a_coroutine(coro)
        try:
            target = self._only_running_loop() if loop is None else loop
            start = partial(
                self._start_handed_over,
                coro,
                name=name,
                timeout=timeout,
                context=context,
                eager_start=eager_start,
                contextvars_context=contextvars_context,
                service=service,
            )
            return self._handovers.hand_over(target, coro, start)
        except BaseException:
            errors.close_refused(coro)
            raise

    def _start_handed_over(
        self,
        coro: Coroutine[Any, Any, Result],
        future: concurrent.futures.Future[Result],
        **options: Any,
    ) -> asyncio.Task[Result]:
        return self.create_task(coro, **options)

    # -- schedules and services -----------------------------------------------------------------------------------

    def every(
        self,
        seconds: float | None,
        function: Callable[..., Awaitable[object]],
        /,
        *args: Any,
        first: FirstRun = "now",
        jitter: float = 0.0,
        overlap: Overlap = "skip",
        on_error: OnRunError = "continue",
        timeout: float | None = None,
        name: str | None = None,
        context: Mapping[str, Any] | None = None,
        next_time: Callable[[datetime], datetime] | None = None,
        lock: Callable[[], Awaitable[object]] | None = None,
        **kwargs: Any,
    ) -> Schedule:
        """Run ``function(*args, **kwargs)`` every ``seconds`` on the running loop, each run as a task of its own.

        Each process that calls this has a schedule of its own: a server with four workers runs it four times, unless
        ``lock`` lets only one of them in. The times do not drift. A tick that comes so late that the next one is due is
        dropped and counted, not made up. ``shutdown`` stops all schedules first, while their runs drain.

        Args:
            seconds: seconds from one tick to the next, > 0; None with ``next_time``.
            function: a coroutine function.
            args: its positional arguments.
            first: ``"now"``, in the next iteration of the loop, or ``"later"``, after ``seconds``.
            jitter: the largest random delay of a tick, in seconds; delays do not add up.
            overlap: what a tick does while the last run has not ended: ``"skip"`` it; ``"queue"`` a run, at most one,
                for its end; or ``"cancel"`` it and run when it has ended.
            on_error: ``"continue"`` after a failed run or one that timed out, or ``"stop"`` the schedule.
            timeout: seconds after which a run is cancelled, > 0; None for no timeout.
            name: the name of its runs; the qualified name of the function by default.
            context: a mapping for the log records of its runs.
            next_time: takes the current time and returns that of the next run, for example by a package for cron
                expressions; a time without a zone is local.
            lock: called and awaited before each run; a run whose lock is false does nothing.
            kwargs: its keyword arguments.

        Returns:
            The schedule.

        Raises:
            InvalidFunctionError: ``function`` is not callable.
            InvalidOptionError: another argument has an invalid value.
            InvalidTimeoutError: ``timeout`` is not a finite number greater than 0.
            InvalidContextError: ``context`` is not a mapping.
            NoRunningLoopError: no event loop runs in this thread.
            ManagerClosedError: the manager was shut down.

        """
        self._check_may_start(name)
        options = ScheduleOptions(name, timeout, context, first, jitter, overlap, on_error, next_time, lock)
        return self._policies.schedules.start(seconds, function, args, kwargs, options)

    def schedules(self) -> list[Schedule]:
        """Return the schedules that have not stopped."""
        return self._policies.schedules.all()

    def service(
        self,
        function: Callable[..., Awaitable[object]],
        /,
        *args: Any,
        restart: Restart = DEFAULT_RESTART,
        after: Sequence[Service] = (),
        on_give_up: Callable[[Service, BaseException], object] | None = None,
        name: str | None = None,
        context: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Service:
        """Keep ``function(*args, **kwargs)`` running on the running loop: it runs again when it fails.

        All its runs are one task with one id. ``wait_for_all`` and the drain of ``shutdown`` do not wait for services.
        ``shutdown`` cancels them when the other tasks have ended, each after those that begin after it.

        Args:
            function: a coroutine function. It may call ``started()`` when it is ready.
            args: its positional arguments.
            restart: how often and how fast it is restarted.
            after: services that have to call ``started()`` before this one begins.
            on_give_up: called as ``on_give_up(service, error)`` when it is not restarted any more.
            name: the name of its task; the qualified name of the function by default.
            context: a mapping for its log records.
            kwargs: its keyword arguments.

        Returns:
            The service.

        Raises:
            InvalidFunctionError: ``function`` is not callable, or its result is not awaitable.
            InvalidOptionError: another argument has an invalid value.
            BgtasksError: the errors of ``create_task``, for the same reasons.

        """
        self._check_may_start(name)
        options = ServiceOptions(name, context, restart, after, on_give_up)
        return self._policies.services.start(function, args, kwargs, options)

    def services(self) -> list[Service]:
        """Return the services that have not ended."""
        return self._policies.services.all()

    def _check_may_start(self, name: str | None) -> None:
        if _get_running_loop() is None:
            raise errors.no_running_loop()
        if self._shutdown.phase != "open":
            raise errors.manager_closed(name or "schedule")

    # -- admission ------------------------------------------------------------------------------------------------

    def _admit(self, coro: Any, name: str, may_drop: bool) -> bool:
        if not self._accepts_work():
            errors.close_refused(coro)
            raise errors.manager_closed(name)
        if self._max_pending_tasks is None or self._owned() < self._max_pending_tasks:
            return True
        errors.close_refused(coro)
        if not may_drop or self._overflow == "raise":
            raise errors.TaskRejectedError(self._full_text(name))
        self._count_drop(name)
        return False

    def _is_open(self) -> bool:
        return self._shutdown.phase == "open"

    def _accepts_work(self) -> bool:
        """Return whether a task may start now; while shutdown drains, only tasks of the manager may start others."""
        phase = self._shutdown.phase
        return phase == "open" or (phase == "draining" and self._current_record() is not None)

    def _full_text(self, name: str) -> str:
        return (
            f"{self._max_pending_tasks} task{' is' if self._max_pending_tasks == 1 else 's are'} in flight "
            "(max_pending_tasks), no capacity for "
            f"{errors.describe(name)}: await spawn() to wait for it, or raise the limit."
        )

    def _count_drop(self, name: str) -> None:
        with self._policy_lock:
            self._dropped += 1
            now = time.monotonic()
            is_silent = now - self._last_drop_warning < DROP_WARNING_INTERVAL
            if not is_silent:
                self._last_drop_warning = now
        if not is_silent:
            self._log.dropped(name, self._full_text(name), self._owned(), self._dropped)

    def _has_capacity(self) -> bool:
        cap = self._max_pending_tasks
        return cap is None or self._owned() < cap or self._shutdown.phase != "open"

    def _on_capacity(self) -> None:
        self._capacity.notify()

    # -- looking at tasks: get_task_count, get_task_info and get_history are inherited ----------------------------

    @property
    def default_shutdown_timeout(self) -> float:
        """Seconds that ``shutdown`` waits for cancelled tasks by default."""
        return self._default_shutdown_timeout

    @property
    def pending_count(self) -> int:
        """The number of tasks that have not ended, as ``get_task_count()``."""
        return self.get_task_count()

    @property
    def dropped_count(self) -> int:
        """The number of tasks that were dropped at ``max_pending_tasks``."""
        return self._dropped

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
        """Return the counters since the manager was made, in total and by name. Safe from any thread."""
        counters: Any = self._counters()
        counters["dropped"] = self._dropped
        counters["retried"], counters["given_up"] = self._policy_counters()
        stats: ManagerStats = counters
        return stats

    def _policy_counters(self) -> tuple[int, int]:
        """Return how many attempts followed a first one, and how many services were given up."""
        return self._policies.attempts.count, self._policies.services.given_up

    def result(self, task_id: int) -> TaskResult:
        """Return how a function stands that was submitted with ``keep_result``, or how it ended. Safe from any thread.

        At most 10,000 ended ones are kept; then the oldest goes first.

        Raises:
            UnknownTaskError: the task was submitted without ``keep_result``, or its time is over.

        """
        return self._policies.results.get(task_id)

    async def wait(self, task_id: int, *, timeout: float | None = None) -> TaskResult:
        """Wait for the end of a function that was submitted with ``keep_result``; works on every loop.

        Neither the timeout nor a cancellation of this wait cancels the task.

        Args:
            task_id: the id of its task.
            timeout: seconds to wait at most, >= 0; None for no limit.

        Returns:
            The result; at the timeout how the task stands.

        Raises:
            UnknownTaskError: the task was submitted without ``keep_result``, or its time is over.
            InvalidTimeoutError: ``timeout`` is not a finite number, or is negative.

        """
        if timeout is not None:
            check_seconds("timeout", timeout, error=errors.InvalidTimeoutError)
        return await self._policies.results.wait(task_id, timeout)

    # -- watching -------------------------------------------------------------------------------------------------

    def watch_loop(self, threshold: float = 0.1) -> None:
        """Watch the running loop, and log once what blocks it, where, and for how long when it is over.

        One thread per process looks at a heartbeat of each watched loop; tasks cost nothing more. ``loop_stats`` has
        the figures. The watch ends with ``shutdown`` and with the loop. A second call on the same loop sets a new
        threshold.

        Args:
            threshold: how many seconds a loop may be busy without a pause, > 0.

        Raises:
            InvalidOptionError: ``threshold`` is not a finite number greater than 0.
            NoRunningLoopError: no event loop runs in this thread.

        """
        check_seconds("threshold", threshold, positive=True)
        loop = _get_running_loop()
        if loop is None:
            raise errors.no_running_loop()
        from bgtasks.watch._loops import Heart

        known = next((heart for heart in self._hearts if heart.loop is loop), None)
        if known is not None:
            known.threshold = threshold
            return
        heart = Heart(loop, threshold, self._describe_task)
        self._hearts = [*(other for other in self._hearts if not other.loop.is_closed()), heart]
        self.attach(heart)

    def loop_stats(self) -> list[LoopStats]:
        """Return the figures of each loop under ``watch_loop`` that is not closed. Safe from any thread."""
        return [heart.stats() for heart in self._hearts if not heart.loop.is_closed()]

    def _describe_task(self, task: asyncio.Task[Any]) -> tuple[int | None, str, float | None]:
        """Return the id, the name and the age of a task."""
        record = self._record_of(task)
        return (None, task.get_name(), None) if record is None else (record.task_id, record.name, record.duration)

    # -- stopping tasks -------------------------------------------------------------------------------------------

    def cancel(self, task: asyncio.Task[Any] | int | str) -> int:
        """Cancel a task, the task with this id, or all tasks of this name. Safe from any thread.

        Returns:
            How many tasks were asked to cancel; 0 if none matches.

        """
        return sum(self._request_cancel(record) for record in self._matching(task))

    def _matching(self, task: asyncio.Task[Any] | int | str) -> Sequence[Record]:
        if isinstance(task, str):
            return [record for record in self._live_records() if record.name == task]
        if isinstance(task, int):
            return [record for record in self._live_records() if record.task_id == task]
        record = self._record_of(task)
        return [] if record is None else [record]

    async def cancel_all(self) -> None:
        """Cancel all tasks but the calling one and wait until they have ended, at most ``default_shutdown_timeout``.

        The manager stays open. Tasks on other loops are cancelled but not waited for.
        """
        loop = asyncio.get_running_loop()
        awaited = []
        for record in self._others():
            task = record.task
            if task is not None and record.loop is loop:
                awaited.append(task)
            self._request_cancel(record)
        if awaited:
            _, remaining = await asyncio.wait(awaited, timeout=self._default_shutdown_timeout)
            if remaining:
                self._log.logger.warning(
                    "%d of %s still %s %.1f s after cancel_all()",
                    len(remaining),
                    numbered(len(awaited)),
                    runs(len(remaining)),
                    self._default_shutdown_timeout,
                )

    # -- waiting --------------------------------------------------------------------------------------------------

    async def wait_for_all(
        self,
        timeout: float | None = None,
        *,
        names: str | Collection[str] | None = None,
        return_exceptions: bool = False,
        as_group: bool = False,
        on_timeout: TimeoutAction = "warn",
    ) -> list[BaseException]:
        """Wait until no task is left, those started meanwhile included, then raise the first failure among them.

        Neither the timeout nor a cancellation of this wait cancels a task. Called from a task of the manager, it does
        not wait for that one, nor for others that wait in here. Tasks that ``task_factory`` built and services are not
        waited for.

        Args:
            timeout: seconds to wait at most, >= 0; None for no limit.
            names: wait only for the tasks of this name or these names, and raise only their failures; None for all.
            return_exceptions: True to raise no failure but return all; failures are logged in any case.
            as_group: True to raise all failures as an ``ExceptionGroup`` instead of the first one alone.
            on_timeout: what to do at the timeout: ``"warn"``: log the names of the tasks that are left and return, or
                ``"raise"`` a ``TimeoutError`` that names them.

        Returns:
            With ``return_exceptions`` the failures during the wait, in the order in which they came; else an empty
            list.

        Raises:
            InvalidTimeoutError: ``timeout`` is not a finite number, or is negative.
            InvalidOptionError: ``names`` is not one name or several, or ``on_timeout`` has an invalid value.
            TimeoutError: the time is over, with ``on_timeout="raise"``.
            BaseException: the first failure of a task during the wait; for a task that timed out a ``TimeoutError``.

        """
        check_choice("on_timeout", on_timeout, get_args(TimeoutAction))
        failures = FailureCollector(chosen_names(names))
        if not await self._all_ended(timeout, failures):
            left = self._named_records(failures.names, ())
            text = (
                f"{numbered(len(left))} still {runs(len(left))} after waiting {timeout} s for "
                f"{'all' if names is None else 'those names'}: {listed(names_of(left))}"
            )
            if on_timeout == "raise":
                raise TimeoutError(text)
            self._report_wait(text)
            return failures.returned() if return_exceptions else []
        found = failures.returned() if return_exceptions else []
        failures.raise_failures(as_group)
        self._report_wait(None)
        return found

    def _report_wait(self, expired: str | None) -> None:
        """Log the text of a wait whose time is over; of one that ended in time there is none, and nothing to log."""
        if expired is not None:
            self._log.logger.warning("%s", expired)

    async def _all_ended(self, timeout: float | None, failures: FailureCollector) -> bool:
        """Wait for the tasks that ``failures`` is about, and collect theirs; return False at the timeout."""
        if timeout is not None:
            check_seconds("timeout", timeout, error=errors.InvalidTimeoutError)
        self._observers.add(failures)
        try:
            if failures.names is None:
                return await self._idle.wait(timeout, waiter=self._waiting_record())
            find = partial(self._named_records, failures.names)
            return await self._idle.wait_for(find, timeout, waiter=self._waiting_record())
        finally:
            self._observers.remove(failures)

    def _named_records(self, names: frozenset[str] | None, excluded: Collection[Record]) -> list[Record]:
        """Return the records of the tasks of these names, or of all, that are waited for."""
        current = self._current_record()
        return [
            record
            for record in self._live_records()
            if (names is None or record.name in names)
            and not (record.observed or record.service or record is current or record in excluded)
        ]

    def _on_idle(self) -> None:
        self._idle.notify()

    # -- the end --------------------------------------------------------------------------------------------------

    def attach(self, attachable: Attachable) -> None:
        """Have ``shutdown`` flush a publisher before it cancels tasks, and close it after they have ended.

        The publisher's flusher is shown among the tasks. ``Publisher(..., manager=manager)`` does the same.
        """
        self._attached[attachable] = None
        attachable.attached(self)

    def detach(self, attachable: Attachable) -> None:
        """Undo ``attach``; do nothing if the object was not attached."""
        self._attached.pop(attachable, None)

    async def shutdown(self, timeout: float | None = None, *, drain: float | None = None) -> ShutdownStats:
        """Refuse new work, let tasks finish for ``drain`` seconds, cancel the rest and wait for them.

        While it drains, tasks of the manager may still start others. A task that swallows its cancellation is named in
        the log at the timeout, cancelled once more and then left: it cannot delay the shutdown. Called from a task of
        the manager, it neither cancels nor awaits that one. If it is cancelled itself, it cancels the tasks at once,
        waits for them and raises the cancellation. Tasks that ``task_factory`` built are left alone. Attached
        publishers are flushed before the first task is cancelled, and closed after the last one has ended, so the last
        events of a task are sent, too.

        Args:
            timeout: seconds to wait for cancelled tasks and attached publishers, >= 0; ``default_shutdown_timeout`` by
                default.
            drain: seconds to let tasks finish first, >= 0; ``drain_timeout`` by default.

        Returns:
            The status and the counts. A second call waits for the first one; its status is ``"already_shutdown"``.

        Raises:
            InvalidTimeoutError: ``timeout`` or ``drain`` is not a finite number, or is negative; the manager stays
                open.

        """
        timeout = self._default_shutdown_timeout if timeout is None else timeout
        drain = self._drain_timeout if drain is None else drain
        check_seconds("timeout", timeout, error=errors.InvalidTimeoutError)
        check_seconds("drain", drain, error=errors.InvalidTimeoutError)
        return await self._shutdown.run(timeout, drain)

    async def aclose(self) -> None:
        """Shut down as ``shutdown()`` does; for ``contextlib.aclosing``."""
        await self.shutdown()

    async def __aenter__(self) -> Self:
        """Make the running loop known to ``create_task_threadsafe`` and return the manager."""
        self._bind_running_loop()
        if self._is_watched:
            self.watch_loop()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Shut down; if the block raised, without draining first."""
        await self.shutdown(drain=None if error is None else 0.0)

    # -- submitted functions --------------------------------------------------------------------------------------

    def _policy_of(self, retry: Any) -> Any:
        return policy_of(retry)

    def _check_submission(self, key: Any, on_duplicate: Any, keep_result: Any) -> float | None:
        return check_submission(key, on_duplicate, keep_result)

    def _submit_duplicate(
        self, current: Any, coro: Any, submission: Any, on_duplicate: Any, options: tuple[Any, ...]
    ) -> Any:
        return self._policies.submit_duplicate(current, coro, submission, on_duplicate, options)

    def _keep_result(self, submission: Any, seconds: float) -> None:
        submission.keep = seconds
        submission.listener = self._policies.results

    def _follow_result(self, submission: Any) -> None:
        self._policies.results.follow(submission.record)

    def _wait_after(self, record: Record, error: BaseException) -> float | None:
        return self._policies.attempts.wait_after(record, error)

    def _describe_submission(self, record: Record, info: Any) -> None:
        self._policies.attempts.describe(record, info)

    # -- reporting ------------------------------------------------------------------------------------------------

    def _report(self, record: Record, error: BaseException | None) -> BaseException | None:
        if record.outcome == "failed":
            if error is not None and not record.observed:
                self._report_failure(record, error)
            return None
        if self._log.is_debug():
            guarded(record, self._log.ended, record)
        return self._report_expired(record, error) if record.outcome == "timed_out" else None

    def _report_expired(self, record: Record, error: BaseException | None) -> BaseException | None:
        """Report a task that ended by its timeout, which is in the log; return what it raises, None for its own."""
        text = f"background task {record.name!r} timed out after {record.timeout} seconds"
        failure = error if isinstance(error, TimeoutError) else TimeoutError(text)
        for observer in self._observers.all():
            guarded(record, observer.task_timed_out, record, failure)
        task_set = record.task_set
        is_reported = task_set is None or task_set.owner.accept_failure(record, failure)
        if is_reported and self._on_error is not None:
            guarded(record, self._on_error, record.info(), failure)
        return failure if self._timeouts == "raise" else None

    def _report_failure(self, record: Record, error: BaseException) -> None:
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            # They leave the loop and reach its caller: logging them here would report them twice.
            return
        for observer in self._observers.all():
            guarded(record, observer.task_failed, record, error)
        task_set = record.task_set
        if task_set is not None and not task_set.owner.accept_failure(record, error):
            return
        guarded(record, self._log.failed, record, error)
        if self._on_error is not None:
            guarded(record, self._on_error, record.info(), error)

    def _report_timeout(self, record: Record) -> None:
        guarded(record, self._log.timed_out, record)

    def _on_timeout(self, record: Record) -> None:
        self._report_timeout(record)
        guarded(record, record.cancel, f"timed out after {record.timeout} seconds")

    def _release_closed_loops(self) -> None:
        super()._release_closed_loops()
        self._handovers.fail_on_closed_loops()

    def _on_loop_ending(self, record: Record) -> None:
        loop = record.loop
        if record.observed or self._shutdown.phase != "open" or loop is None or loop.is_running():
            return
        names = self._cancelled_by_loop.get(loop)
        if names is None:
            # The owner runs the loop once more, for the tasks to end. By then all have been cancelled.
            loop.call_soon(self._report_loop_ending, loop)
            names = self._cancelled_by_loop[loop] = Counter()
        names[record.name] += 1

    def _report_loop_ending(self, loop: asyncio.AbstractEventLoop) -> None:
        names = self._cancelled_by_loop.pop(loop)
        tasks = [record.task for record in self._live_records() if record.loop is loop and not record.observed]
        # Else somebody cancelled one of them, and the loop goes on.
        if all(task is None or task.cancelling() for task in tasks):
            self._log.cancelled_by_loop(names)

    def _on_abandoned(self, names: dict[str, int]) -> None:
        unlogged = self._shutdown.unlogged(names)
        if unlogged:
            self._log.abandoned(unlogged)
        for observer in self._observers.all():
            try:
                observer.tasks_abandoned(names)
            except Exception:
                logger.exception("An observer failed")
