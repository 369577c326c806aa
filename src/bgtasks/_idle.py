"""Waiting until a manager is idle: until all tasks that it owns have ended, except those that wait for this."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from bgtasks._notifier import Notifier

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
        self._waits = 0
        # How many tasks of the manager wait, by loop.
        self._waiting_tasks: Counter[asyncio.AbstractEventLoop] = Counter()
        self.after_fork()

    def after_fork(self) -> None:
        """Make a new lock."""
        self._lock = threading.RLock()

    def notify(self) -> None:
        """Have the waits check again; called when a loop is down to its threshold."""
        self._notifier.notify()

    async def wait(
        self,
        timeout: float | None,
        *,
        in_task: bool,
        is_over: Callable[[], bool] = lambda: False,
        is_ready: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Wait at most ``timeout`` seconds; return whether the manager is idle.

        Args:
            timeout: seconds; None for no limit.
            in_task: whether the coroutine that waits belongs to a task that the manager owns.
            is_over: asked at each ``notify`` whether to wait no longer.
            is_ready: what has to hold as well.

        """
        # No function is made in here: CPython 3.12 and 3.13 crash if it cannot be allocated.
        is_ended = partial(self._is_ended, is_ready, is_over)
        loop = asyncio.get_running_loop()
        with self._lock:
            self._waits += 1
            if in_task:
                self._waiting_tasks[loop] += 1
        if in_task:
            # The other waits have one task less to wait for.
            self.notify()
        try:
            if not await self._notifier.wait_until(is_ended, timeout) or not (self._is_idle() and is_ready()):
                return False
        finally:
            with self._lock:
                self._waits -= 1
                if in_task:
                    self._waiting_tasks[loop] -= 1
                    self._waiting_tasks += Counter()
            self._set_thresholds()
        # The notification comes from inside the last task's last step: one iteration later its callbacks have run, too.
        await asyncio.sleep(0)
        return True

    def _is_ended(self, is_ready: Callable[[], bool], is_over: Callable[[], bool]) -> bool:
        return (self._is_idle() and is_ready()) or is_over()

    def _is_idle(self) -> bool:
        self._set_thresholds()
        with self._lock:
            for loop, owned in self._owned_by_loop():
                if owned > self._waiting_tasks[loop] and loop.is_running():
                    return False
        return True

    def _set_thresholds(self) -> None:
        with self._lock:
            for loop, _ in self._owned_by_loop():
                self._set_threshold(loop, self._waiting_tasks[loop] if self._waits else -1)
