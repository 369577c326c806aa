"""Waiting until a manager is idle, or until its tasks of some names have ended; the tasks that wait do not count."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial

from bgtasks._locks import Lock
from bgtasks._notifier import Notifier
from bgtasks.registry import Record

__all__ = ["IdleWait"]


class IdleWait:
    """The coroutines that wait until a manager is idle, on any of its loops.

    A task of the manager may wait, too. It then does not count, because it cannot end before its own wait.

    Args:
        owned_by_loop: returns a list of (loop, number of tasks that the manager owns there).
        set_threshold: called as ``set_threshold(loop, count)`` to have ``notify`` called when a task ends and at most
            ``count`` owned ones are left on the loop; -1 for never.

    """

    def __init__(
        self,
        owned_by_loop: Callable[[], Sequence[tuple[asyncio.AbstractEventLoop, int]]],
        set_threshold: Callable[[asyncio.AbstractEventLoop, int], object],
    ) -> None:
        self._owned_by_loop = owned_by_loop
        self._set_threshold = set_threshold
        self._notifier = Notifier()
        # The waits for all tasks, and those for tasks of some names. Sets, as a wait may fail half-way.
        self._waits: set[object] = set()
        self._named_waits: set[object] = set()
        # The tasks of the manager that wait, each with its loop if it waits for all.
        self._waiting: dict[Record, asyncio.AbstractEventLoop | None] = {}
        self.after_fork()

    def after_fork(self) -> None:
        """Make a new lock."""
        self._lock = Lock()

    def notify(self) -> None:
        """Have the waits check again; called when a loop is down to its threshold."""
        self._notifier.notify()

    async def wait(
        self,
        timeout: float | None,
        *,
        waiter: Record | None,
        is_over: Callable[[], bool] = lambda: False,
        is_ready: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Wait at most ``timeout`` seconds; return whether the manager is idle.

        Args:
            timeout: seconds; None for no limit.
            waiter: the record of the task that waits, if the manager owns it.
            is_over: asked at each ``notify`` whether to wait no longer.
            is_ready: what has to hold as well.

        """
        # No function is made in here: CPython 3.12 and 3.13 crash if it cannot be allocated.
        is_ended = partial(self._is_ended, is_ready, is_over)
        try:
            with self._lock:
                self._waits.add(is_ended)
                if waiter is not None:
                    self._waiting[waiter] = asyncio.get_running_loop()
            if waiter is not None:
                # The other waits have one task less to wait for.
                self.notify()
            if not await self._notifier.wait_until(is_ended, timeout) or not (self._is_idle() and is_ready()):
                return False
        finally:
            # Without the lock, whose use may fail.
            self._waits.discard(is_ended)
            if waiter is not None:
                self._waiting.pop(waiter, None)
            self._set_thresholds()
        # The notification comes from inside the last task's last step: one iteration later its callbacks have run, too.
        await asyncio.sleep(0)
        return True

    async def wait_for(
        self,
        find: Callable[[Collection[Record]], list[Record]],
        timeout: float | None,
        *,
        waiter: Record | None,
    ) -> bool:
        """Wait at most ``timeout`` seconds until ``find`` finds no task any more; return whether that is so.

        Args:
            find: returns the records of the tasks to wait for, but for those that it is given.
            timeout: seconds; None for no limit.
            waiter: the record of the task that waits, if the manager owns it. Like that one, other tasks that wait in
                here do not count then: they may wait for it.

        """
        awaited = _Awaited(find, self._waiting if waiter is not None else ())
        try:
            with self._lock:
                self._named_waits.add(awaited)
                if waiter is not None:
                    self._waiting[waiter] = None
            if waiter is not None:
                self.notify()
            if not await self._notifier.wait_until(partial(self._have_ended, awaited), timeout):
                return False
        finally:
            # Without the lock, whose use may fail.
            self._named_waits.discard(awaited)
            if waiter is not None:
                self._waiting.pop(waiter, None)
            self._set_thresholds()
        await asyncio.sleep(0)
        return True

    def _waiting_on(self, loop: asyncio.AbstractEventLoop) -> int:
        """Return how many tasks of this loop wait for all tasks."""
        return list(self._waiting.values()).count(loop)

    def _have_ended(self, awaited: _Awaited) -> bool:
        self._set_thresholds()
        return awaited.have_ended()

    def _is_ended(self, is_ready: Callable[[], bool], is_over: Callable[[], bool]) -> bool:
        return (self._is_idle() and is_ready()) or is_over()

    def _is_idle(self) -> bool:
        self._set_thresholds()
        with self._lock:
            for loop, owned in self._owned_by_loop():
                if owned > self._waiting_on(loop) and loop.is_running():
                    return False
        return True

    def _set_thresholds(self) -> None:
        with self._lock:
            for loop, _ in self._owned_by_loop():
                threshold = self._waiting_on(loop) if self._waits else -1
                # While some wait for names, any task may be one of those.
                self._set_threshold(loop, sys.maxsize if self._named_waits else threshold)


class _Awaited:
    """The tasks that a wait waits for, those started meanwhile included.

    Args:
        find: returns the records of those that have not ended, but for the ones that it is given.
        excluded: the records to give to it; they may change.

    """

    def __init__(self, find: Callable[[Collection[Record]], list[Record]], excluded: Collection[Record]) -> None:
        self._find = find
        self._excluded = excluded
        self._left: list[Record] = []

    def have_ended(self) -> bool:
        """Return whether none is left. It looks for more only after all that it knows have ended."""
        left = self._left
        while left:
            if left[-1] not in self._excluded and _is_running(left[-1]):
                return False
            left.pop()
        for record in self._find(self._excluded):
            if _is_running(record):
                left.append(record)
        return not left


def _is_running(record: Record) -> bool:
    """Return whether a task has not ended and will go on: its loop runs."""
    loop = record.loop
    return record.outcome == "running" and loop is not None and loop.is_running()
