"""Functions that are kept running: restarted after failures, started and stopped in the order of their dependencies."""

# ruff: noqa: SLF001  a service and the services of its manager know each other's private parts

from __future__ import annotations

import asyncio
from asyncio.events import _get_running_loop
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from bgtasks import errors
from bgtasks._checks import check_callable, check_limit, check_seconds
from bgtasks._coroutines import coroutine_of, refuse_function
from bgtasks._notifier import Notifier
from bgtasks._reporting import guarded
from bgtasks._task import record_of
from bgtasks.registry import Record, Submission

__all__ = ["DEFAULT_RESTART", "Restart", "Service", "ServiceOptions", "Services", "started"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """When a service that failed runs again.

    The waits double from ``wait`` to ``max_wait``. A run of at least ``reset_after`` seconds makes earlier failures
    forgotten. A function that returns has ended, and is not restarted.

    Args:
        max: how many restarts there are at most in ``within`` seconds; then the service is given up. None for no limit.
        within: the length of that time in seconds, > 0.
        wait: seconds before the first restart, >= 0.
        max_wait: the longest wait, in seconds, >= 0.
        reset_after: seconds that a healthy run takes at least, > 0.

    Raises:
        InvalidOptionError: an argument has an invalid value.

    Example:
        >>> Restart(max=3, within=60.0)
        Restart(max=3, within=60.0, wait=1.0, max_wait=60.0, reset_after=300.0)

    """

    max: int | None = 10
    within: float = 300.0
    wait: float = 1.0
    max_wait: float = 60.0
    reset_after: float = 300.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_limit("max", self.max)
        for option in ("within", "reset_after"):
            check_seconds(option, getattr(self, option), positive=True)
        for option in ("wait", "max_wait"):
            check_seconds(option, getattr(self, option))


DEFAULT_RESTART: Final = Restart()


class _Restarts:
    """The restarts of one service, as a policy for its attempts."""

    def __init__(self, rule: Restart) -> None:
        self._rule = rule
        # Failures since the last healthy run, and the times of the restarts, in seconds since the first start.
        self._streak = 0
        self._times: deque[float] = deque()
        self._run_began = 0.0

    def next_wait(self, error: Exception, *, attempt: int, elapsed: float) -> float | None:
        """Return the seconds before the next restart, None to give up."""
        rule = self._rule
        if elapsed - self._run_began >= rule.reset_after:
            self._streak = 0
            self._times.clear()
        while self._times and elapsed - self._times[0] > rule.within:
            self._times.popleft()
        if rule.max is not None and len(self._times) >= rule.max:
            return None
        # 2 ** 64 seconds are more than any max_wait that a program outlives.
        seconds: float = min(rule.max_wait, rule.wait * 2.0 ** min(self._streak, 64))
        self._streak += 1
        self._times.append(elapsed)
        self._run_began = elapsed + seconds
        return seconds


class ServiceOptions(NamedTuple):
    """The options of one call of ``service``."""

    name: str | None
    context: Mapping[str, Any] | None
    restart: Restart
    after: Sequence[Service]
    on_give_up: Callable[[Service, BaseException], object] | None


class Service:
    """A function that ``manager.service`` keeps running."""

    def __init__(self, services: Any, name: str, options: Any) -> None:
        self._services = services
        self._options = options
        #: The name of its task.
        self.name: str = name
        #: The services that it begins after, and ends before.
        self.after: tuple[Service, ...] = tuple(options.after)
        self._is_started = False
        self._end_state: Literal["", "given_up", "stopped"] = ""
        self._submission: Submission | None = None
        self._changed = Notifier()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self.state}>"

    @property
    def state(self) -> Literal["starting", "running", "waiting", "given_up", "stopped"]:
        """``"starting"`` until it calls ``started``; ``"waiting"`` between two runs; how it ended."""
        if self._end_state:
            return self._end_state
        record = self._record()
        if record is not None and record.waiting:
            return "waiting"
        return "running" if self._is_started else "starting"

    @property
    def restarts(self) -> int:
        """How many times it was restarted."""
        return 0 if self._submission is None else self._submission.attempt - 1

    @property
    def is_started(self) -> bool:
        """True once it has called ``started``."""
        return self._is_started

    async def wait_started(self, timeout: float | None = None) -> bool:
        """Wait until the service has called ``started`` or has ended, at most ``timeout`` seconds.

        Returns:
            Whether it is started.

        Raises:
            InvalidTimeoutError: ``timeout`` is not a finite number, or is negative.

        """
        if timeout is not None:
            check_seconds("timeout", timeout, error=errors.InvalidTimeoutError)
        await self._changed.wait_until(lambda: self._is_started or bool(self._end_state), timeout)
        return self._is_started and not self._end_state

    def cancel(self) -> bool:
        """Cancel the service for good; return False if it has ended."""
        record = self._record()
        return False if record is None else bool(record.cancel("the service was cancelled"))

    # -- called by its task, the registry and the manager ---------------------------------------------------------

    def _record(self) -> Record | None:
        record: Record | None = None if self._submission is None else self._submission.record
        return None if record is None or record.loop is None else record

    def _begin(self, submission: Submission) -> None:
        """Remember what the service runs."""
        self._submission = submission

    def _proceed(self) -> None:
        """Begin if all services before this one are started; called on its loop."""
        record = self._record()
        if record is not None and record.queued and all(each.is_started for each in self.after):
            record.proceed()

    def _set_started(self) -> None:
        """Note that the service is ready, and let those begin that wait for it."""
        if not self._is_started:
            self._is_started = True
            self._changed.notify()
            self._services.begin_dependents(self)

    def _ended(self, record: Record, error: BaseException | None) -> None:
        """Note the end; called by the registry."""
        has_failed = record.outcome == "failed"
        has_failed = has_failed and self._services.is_open()
        self._end_state = "given_up" if has_failed else "stopped"
        self._services.remove(self)
        self._changed.notify()
        if has_failed:
            self._services.given_up += 1
            if self._options.on_give_up is not None and error is not None:
                guarded(record, self._options.on_give_up, self, error)


class Services:
    """The services of one manager.

    Args:
        make_submission: makes a submission: ``(function, args, kwargs, retry, listener)``.
        launch: starts its task: ``(coro, name, timeout, context, submission, hold)``.
        is_open: returns whether the manager is neither shutting down nor shut down.

    """

    def __init__(
        self,
        make_submission: Callable[..., Submission],
        launch: Callable[..., Any],
        is_open: Callable[[], bool],
    ) -> None:
        self._make_submission = make_submission
        self._launch = launch
        self.is_open = is_open
        # Cancels the task of a record, once ``stop`` was called.
        self._cancel: Callable[[Record], object] | None = None
        # A dict, not a set, because it keeps their order.
        self._live: dict[Service, None] = {}
        # How many services ended with a failure.
        self.given_up = 0

    def start(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: ServiceOptions
    ) -> Service:
        """Check the arguments of ``service``, and start one on the running loop."""
        _check(function, options)
        coro = function(*args, **kwargs)
        if not asyncio.iscoroutine(coro):
            coro = coroutine_of(function, coro, "service")
        service = Service(self, options.name or coro.__qualname__, options)
        submission = self._make_submission(function, args, kwargs, _Restarts(options.restart), service)
        service._begin(submission)
        is_held = not all(each.is_started for each in service.after)
        self._live[service] = None
        try:
            self._launch(coro, service.name, None, options.context, submission, is_held, True)
        except BaseException:
            self._live.pop(service, None)
            raise
        return service

    def remove(self, service: Service) -> None:
        """Remove a service that has ended; the manager's shutdown goes on with those before it."""
        self._live.pop(service, None)
        if self._cancel is not None:
            self._cancel_last(service.after, self._cancel)

    def begin_dependents(self, service: Service) -> None:
        """Begin the services that waited for this one and for nothing else."""
        for other in list(self._live):
            if service in other.after:
                other._proceed()

    def all(self) -> list[Service]:
        """Return the services that have not ended."""
        return list(self._live)

    def is_service(self, record: Record) -> bool:
        """Return whether a task is that of a service, which ``stop`` cancels in its order."""
        return record.submission is not None and record.submission.listener in self._live

    def stop(self, cancel: Callable[[Record], object]) -> None:
        """Cancel all services but the calling one, each when those that begin after it have ended."""
        self._cancel = cancel
        self._cancel_last(list(self._live), cancel)

    def _cancel_last(self, services: Sequence[Service], cancel: Callable[[Record], object]) -> None:
        """Cancel those of the services that no other one needs."""
        needed = {before for service in list(self._live) for before in service.after}
        loop = _get_running_loop()
        current = None if loop is None else asyncio.current_task(loop)
        for service in services:
            record = service._record()
            if service not in needed and record is not None and (current is None or record.task is not current):
                cancel(record)


def started() -> None:
    """Say that the running service is ready: services that begin after it begin now, and ``wait_started`` returns.

    Outside of a service it does nothing.

    Example:
        >>> async def consumer():
        ...     started()
        ...     await asyncio.sleep(3600)
        >>> async def main():
        ...     async with BackgroundTaskManager() as manager:
        ...         print(await manager.service(consumer).wait_started(5.0))
        >>> asyncio.run(main())
        True

    """
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return
    # The slot of both twins' task types; other tasks have no record.
    record = record_of(task) if hasattr(type(task), "_record") else None
    submission = None if record is None else record.submission
    if submission is not None and isinstance(submission.listener, Service):
        submission.listener._set_started()


def _check(function: Any, options: ServiceOptions) -> None:
    """Check the arguments of ``service``.

    Raises:
        BgtasksError: one of them is wrong.

    """
    if not callable(function):
        refuse_function(function, "service")
    if not isinstance(options.restart, Restart):
        raise errors.InvalidOptionError(f"restart must be a bgtasks.Restart; got {errors.describe(options.restart)}")
    for each in options.after:
        if not isinstance(each, Service):
            raise errors.InvalidOptionError(f"after must hold services of manager.service; got {errors.describe(each)}")
        if each._end_state:
            raise errors.InvalidOptionError(f"{each!r} has ended: a service cannot begin after it")
    check_callable("on_give_up", options.on_give_up)
