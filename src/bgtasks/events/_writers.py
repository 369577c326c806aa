"""Writes several batches to the sink at once, each in its own task."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Final

from bgtasks._notifier import Notifier
from bgtasks.events._batches import Batch
from bgtasks.events._delivery import Account, Delivery

__all__ = ["DELAY_AFTER_BUG", "Writers"]

logger = logging.getLogger("bgtasks.events")

# Seconds before the work of a publisher goes on after an error that nothing in it may raise.
DELAY_AFTER_BUG: Final = 1.0


class Writers:
    """The tasks that deliver the batches of one flusher; made in its task, and stopped there before it ends.

    They own no batch: one that is not accounted for when its task ends still belongs to the flusher. Cancelling a task
    from outside cancels the flusher.

    Args:
        delivery: writes batches.
        limit: the maximum number of concurrent tasks.
        name: the publisher's name.

    """

    def __init__(self, delivery: Delivery, limit: int, name: str) -> None:
        self._delivery = delivery
        self._limit = limit
        self._name = name
        self._flusher = asyncio.current_task()
        self._tasks: dict[Batch, asyncio.Task[None]] = {}
        self._is_stopping = False
        # Notified when a task has ended.
        self._ended = Notifier()

    def __contains__(self, batch: Batch) -> bool:
        """Return True if a batch is being written."""
        return batch in self._tasks

    async def wait_free(self) -> None:
        """Wait until another batch may be started."""
        if len(self._tasks) >= self._limit:
            await self._ended.wait_until(lambda: len(self._tasks) < self._limit, None)

    async def wait_idle(self) -> None:
        """Wait until no batch is being written."""
        await self._ended.wait_until(lambda: not self._tasks, None)

    def start(self, batch: Batch, account: Account) -> None:
        """Start a task that delivers a batch.

        Args:
            batch: the batch; events that are accounted for leave it.
            account: called with a number of events and their outcome.

        """
        # Built without the loop's task factory, as the flusher is: no manager shows or drains it.
        loop = asyncio.get_running_loop()
        task = asyncio.Task(self._deliver(batch, account), loop=loop, name=f"publisher {self._name}, a batch")
        self._tasks[batch] = task
        task.add_done_callback(lambda ended: self._forget(batch, ended))

    async def _deliver(self, batch: Batch, account: Account) -> None:
        while batch.parts:
            try:
                await self._delivery.deliver(batch, account)
            except Exception:
                # A bug in bgtasks or in a hook must not stop the other batches.
                logger.exception("A batch of publisher %r failed and is tried again", self._name)
                await asyncio.sleep(DELAY_AFTER_BUG)

    def _forget(self, batch: Batch, task: asyncio.Task[None]) -> None:
        del self._tasks[batch]
        self._ended.notify()
        flusher = self._flusher
        if task.cancelled() and not self._is_stopping and flusher is not None and not flusher.cancelling():
            flusher.cancel()

    async def stop(self) -> None:
        """Cancel all tasks and wait for their end, even if cancelled meanwhile: a batch has one writer at a time."""
        self._is_stopping = True
        while self._tasks:
            for task in self._tasks.values():
                task.cancel()
            with suppress(asyncio.CancelledError):
                await self.wait_idle()
        self._is_stopping = False
