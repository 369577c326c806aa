"""The end of a manager: it lets tasks finish, cancels the rest, and waits for them."""

# ruff: noqa: SLF001  a shutdown belongs to its manager

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from operator import methodcaller
from typing import Any, Final, Literal, Protocol

from bgtasks._capacity import CapacityWait
from bgtasks._drain_log import DrainLog
from bgtasks._idle import IdleWait
from bgtasks._locks import Lock
from bgtasks._notifier import Notifier
from bgtasks._reporting import TaskLog, names_of
from bgtasks.info import ShutdownStats
from bgtasks.policies._policies import Policies
from bgtasks.registry import Record, Registry

__all__ = ["SECOND_CANCEL_GRACE", "Flushable", "Shutdown"]

logger: Final = logging.getLogger("bgtasks")

# Seconds to end after a second cancellation, at the timeout of shutdown(), of tasks that swallowed the first one.
SECOND_CANCEL_GRACE: Final = 0.1
# How many further cancellations a cancelled shutdown() absorbs: anyio repeats its own in each iteration of the loop.
CANCELLATIONS_ABSORBED: Final = 5
# Maximum seconds that a shutdown flushes attached publishers; also at most half of its timeout.
LONGEST_FLUSH: Final = 5.0


class Flushable(Protocol):
    """An object with buffered work, which must be sent before a manager has shut down."""

    async def flush(self, timeout: float, /) -> object:
        """Send the buffered work within ``timeout`` seconds."""

    async def close(self, timeout: float, /) -> object:
        """Refuse new work, send the buffered work and end, within ``timeout`` seconds."""


class Shutdown:
    """The shutdown of one manager.

    Args:
        registry: the registry of the manager's tasks.
        log: the writer of the manager's log records.
        idle: the waits for the manager's tasks.
        capacity: the waits for capacity, which end at its beginning.
        policies: the schedules, retries and services, which it ends.
        attached: the objects to flush and to close.

    """

    def __init__(
        self,
        registry: Registry,
        log: TaskLog,
        idle: IdleWait,
        capacity: CapacityWait,
        policies: Policies,
        attached: Collection[Flushable],
    ) -> None:
        self._registry = registry
        self._log = log
        self._idle = idle
        self._capacity = capacity
        self._policies = policies
        self._attached = attached
        self.phase: Literal["open", "draining", "cancelling", "closed"] = "open"
        # A shutdown is under way, or was done.
        self._is_ending = False
        # Says while tasks drain what is left.
        self.drain_log = DrainLog(lambda: log.logger, lambda: names_of(self._waited_for()))
        # Whether to name what is cancelled although nothing drained, and how often it was asked to hurry.
        self.names_cancelled = False
        self._hurries = 0
        # What was cancelled, and the names of what was left behind and logged.
        self._cancelled: list[Record] = []
        self._left: Counter[str] = Counter()
        self._stragglers: list[Record] = []
        self._closed = Notifier()
        self.after_fork()

    def after_fork(self) -> None:
        """Make a new lock."""
        self._lock = Lock()

    async def run(self, timeout: float, drain: float) -> ShutdownStats:
        """Do the work of ``BackgroundTaskManager.shutdown``."""
        begun = time.monotonic()
        with self._lock:
            is_first = not self._is_ending
            if is_first:
                self._is_ending = True
                if self.phase == "open":
                    self.phase = "draining"
        if not is_first:
            return await self._shutdown_again(timeout + drain, begun)
        initial = 0
        try:
            self._registry._shut = True
            self._registry._release_closed_loops()
            self._policies.begin_shutdown()
            self._capacity.notify_all()
            initial = len(self._waited_for())
            await self._end_all(timeout, drain)
            self._set_closed(initial, drain)
        except asyncio.CancelledError:
            try:
                if self.phase == "draining":
                    self._cancel_others()
                self._policies.services.stop(self._registry._request_cancel)
                await self._absorb_cancellations(timeout)
                self._report_stragglers()
            finally:
                self._set_closed(initial, drain)
            raise
        except BaseException:
            # It did not do what it is for: another call may.
            self._is_ending = False
            self.drain_log.stop()
            raise
        return self._shutdown_stats("completed", initial, begun)

    async def _end_all(self, timeout: float, drain: float) -> None:
        """Drain, flush, cancel, wait and close."""
        if drain > 0:
            await self._drain(drain)
        end = time.monotonic() + timeout
        await self._end_attached("flush", min(timeout / 2, LONGEST_FLUSH))
        self._cancel_others()
        # However little time is left: in this iteration of the loop tasks take their cancellation.
        await asyncio.sleep(0)
        await self._stop_services(max(end - time.monotonic(), 0) / 2)
        if not await self._wait_cancelled(max(end - time.monotonic(), 0)):
            self._report_stragglers()
            self._cancel_others()
            await self._wait_cancelled(SECOND_CANCEL_GRACE, can_hurry=False)
        await self._end_attached("close", max(end - time.monotonic(), SECOND_CANCEL_GRACE))

    def _set_closed(self, initial: int, drain: float) -> None:
        self.phase = "closed"
        self._closed.notify()
        self.drain_log.stop()
        self._report_cancelled(initial, drain)

    async def _shutdown_again(self, timeout: float, begun: float) -> ShutdownStats:
        """Wait for the end of the shutdown that goes on, but not from inside of a task that it waits for."""
        if self._registry._current_record() is None:
            await self._closed.wait_until(self._is_closed, timeout)
        return self._shutdown_stats("already_shutdown", 0, begun)

    def _is_closed(self) -> bool:
        return self.phase == "closed"

    async def _drain(self, timeout: float) -> None:
        """Let tasks finish, and say in the log what is left meanwhile."""
        self.drain_log.begin(timeout)
        await self._idle.wait(timeout, waiter=self._registry._waiting_record(), is_over=self._is_hurried)
        self.drain_log.stop()

    async def _wait_cancelled(self, timeout: float, *, can_hurry: bool = True) -> bool:
        """Wait until all cancelled tasks have ended, the services on this loop included."""
        loop = asyncio.get_running_loop()
        services = [record.task for record in self._registry._others() if record.service and record.loop is loop]
        for task in services:
            task.add_done_callback(self._on_service_end)
        return await self._idle.wait(
            timeout,
            waiter=self._registry._waiting_record(),
            is_over=self._is_hurried_again if can_hurry else _never,
            is_ready=partial(_are_done, services),
        )

    def _on_service_end(self, _: asyncio.Task[Any]) -> None:
        self._idle.notify()

    def hurry(self) -> None:
        """Have ``shutdown`` wait no longer: for tasks to finish, and the second time for cancelled ones to end."""
        self._hurries += 1
        self._idle.notify()

    def _is_hurried(self) -> bool:
        return self._hurries > 0

    def _is_hurried_again(self) -> bool:
        return self._hurries > 1

    def _report_stragglers(self) -> None:
        """Name in the log the tasks that did not end after their cancellation."""
        others = self._stragglers = self._registry._others()
        self._left = names_of(others)
        self._log.still_running(others, "shutdown")

    def _report_cancelled(self, initial: int, drain: float) -> None:
        """Name in the log the tasks that ``shutdown`` cancelled and that ended by it, if they had been let finish."""
        names = names_of([record for record in self._cancelled if record.outcome == "cancelled"])
        self._cancelled.clear()
        if names and (drain > 0 or self.names_cancelled):
            self._log.cancelled_by_shutdown(names, max(initial, names.total()))

    def unlogged(self, names: dict[str, int]) -> Counter[str]:
        """Return those of the abandoned tasks that are not in the log: shutdown has named the ones that it left."""
        unlogged = Counter(names) - self._left
        self._left -= Counter(names)
        return unlogged

    def _waited_for(self) -> list[Record]:
        """Return the records of the others that draining waits for: all but services."""
        return [record for record in self._registry._others() if not record.service]

    def _cancel_others(self) -> None:
        others = self._registry._others()
        # Logged once: a second round is for tasks that swallowed the first cancellation.
        if others and self.phase != "cancelling":
            self._log.cancelling(len(others))
            self._cancelled = [record for record in others if not record.service]
            others = [record for record in others if not self._policies.is_left_alone(record)]
        self.phase = "cancelling"
        for record in others:
            self._registry._request_cancel(record)

    async def _stop_services(self, timeout: float) -> None:
        """Cancel the services of ``service`` when no other task is left, or the time is over."""
        if self._policies.services.all():
            waiter = self._registry._waiting_record()
            await self._idle.wait(timeout, waiter=waiter, is_over=self._is_hurried_again)
            self._policies.services.stop(self._registry._request_cancel)
            await asyncio.sleep(0)

    async def _end_attached(self, step: Literal["flush", "close"], timeout: float) -> None:
        """Flush or close all attached publishers at once, and log their errors."""
        attached = list(self._attached)
        if not attached:
            return
        steps = [each.flush(timeout) if step == "flush" else each.close(timeout) for each in attached]
        for each, outcome in zip(attached, await asyncio.gather(*steps, return_exceptions=True), strict=True):
            if isinstance(outcome, BaseException):
                logger.error("Shutdown could not %s %r", step, each, exc_info=outcome)

    async def _absorb_cancellations(self, timeout: float) -> None:
        """Wait for cancelled tasks although the caller is cancelled, too; give up after further cancellations."""
        deadline = time.monotonic() + timeout
        for _ in range(CANCELLATIONS_ABSORBED):
            try:
                await self._wait_cancelled(max(deadline - time.monotonic(), 0))
                await self._end_attached("close", max(deadline - time.monotonic(), SECOND_CANCEL_GRACE))
                return
            except asyncio.CancelledError:
                continue

    def _shutdown_stats(
        self, status: Literal["completed", "already_shutdown"], initial: int, begun: float
    ) -> ShutdownStats:
        # Functions that an executor abandoned for lack of time still run.
        abandoned = [record for record in self._stragglers if record.outcome == "abandoned"]
        self._stragglers = []
        names = sorted([record.name for record in [*self._registry._others(), *abandoned]])
        stats: ShutdownStats = {
            "status": "timeout" if names and status == "completed" else status,
            "initial_tasks": initial,
            "completed_tasks": max(initial - len(names), 0),
            "remaining_tasks": len(names),
            "duration_seconds": time.monotonic() - begun,
            "remaining_names": names,
        }
        return stats


def _never() -> bool:
    return False


def _are_done(tasks: Sequence[asyncio.Task[Any]]) -> bool:
    return all(map(methodcaller("done"), tasks))
