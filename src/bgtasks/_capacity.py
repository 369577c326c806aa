"""Waiting until a manager has capacity for another task."""

# ruff: noqa: SLF001  a wait belongs to its manager

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from bgtasks import errors
from bgtasks._locks import Lock
from bgtasks._notifier import Notifier
from bgtasks.registry import Record, Registry

__all__ = ["CapacityWait"]


class CapacityWait:
    """The coroutines that wait in ``spawn`` until a task may start, on any loop of a manager.

    Args:
        registry: the registry of the manager's tasks.
        has_capacity: returns whether a task may start, or will never.
        max_pending_tasks: how many tasks may be in flight.

    """

    def __init__(self, registry: Registry, has_capacity: Callable[[], bool], max_pending_tasks: int | None) -> None:
        self._registry = registry
        self._has_capacity = has_capacity
        self._max_pending_tasks = max_pending_tasks
        self._notifier = Notifier()
        # The tasks of the manager that wait.
        self._spawning: set[Record] = set()
        self.after_fork()

    def after_fork(self) -> None:
        """Make a new lock."""
        self._lock = Lock()

    async def wait(self, coro: Any) -> None:
        """Wait until a task may start, unless the calling task waits for itself.

        Args:
            coro: the coroutine of the task, for the error's text.

        Raises:
            TaskRejectedError: the calling task waits for itself.

        """
        spawner = self._registry._waiting_record()
        try:
            if spawner is not None:
                with self._lock:
                    self._spawning.add(spawner)
                    if self._waits_for_itself():
                        raise errors.spawn_waits_for_itself(spawner.name, coro, self._max_pending_tasks)
            await self._notifier.wait_until(self._may_start, None)
        finally:
            if spawner is not None:
                self._spawning.discard(spawner)

    def _may_start(self) -> bool:
        # At each look: another task may have taken the capacity of a notification.
        self._registry._capacity_wanted = True
        return self._has_capacity()

    def _waits_for_itself(self) -> bool:
        """Return whether every task in flight waits in ``spawn``, or for a concurrency slot that those hold."""
        if len(self._spawning) < self._registry._owned() - self._registry._queued():
            return False
        for record in self._registry._live_records():
            if record.observed or record.service or record in self._spawning:
                continue
            # A queued function waits for a thread, which runs; a queued task may have its slot already.
            is_coroutine = isinstance(record.loop, asyncio.AbstractEventLoop)
            if not record.queued or not is_coroutine or record.turn is None or record.turn.done():
                return False
        return True

    def notify(self) -> None:
        """Have the next coroutine go on if there is capacity for its task."""
        while True:
            if self._has_capacity():
                self._notifier.notify(1)
            if self._notifier:
                return
            self._registry._capacity_wanted = False
            if not self._notifier:
                return
            # On another loop one has come to wait meanwhile, and the end of a task may have passed unnoticed.
            self._registry._capacity_wanted = True

    def notify_all(self) -> None:
        """Have all coroutines go on: their tasks are refused."""
        self._notifier.notify()
