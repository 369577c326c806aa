"""Several batches on their way to the sink at once, each in a task of its own."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Final

from bgtasks._notifier import Notifier
from bgtasks.events._delivery import Batch, Delivery, Settle

__all__ = ["Writers"]

logger = logging.getLogger("bgtasks.events")

DELAY_AFTER_BUG: Final = 1.0


class Writers:
    """The tasks that deliver the batches of one flusher; made in its task, and stopped there before it ends.

    They own nothing: a batch that is not settled when its task ends is still the flusher's. Whoever cancels one of them
    cancels the flusher.

    Args:
        delivery: writes batches.
        most: how many at once.
        name: the publisher's name.

    """

    def __init__(self, delivery: Delivery, most: int, name: str) -> None:
        self._delivery = delivery
        self._most = most
        self._name = name
        self._flusher = asyncio.current_task()
        self._tasks: dict[Batch, asyncio.Task[None]] = {}
        self._stopping = False
        # Rings when one of them has ended.
        self._ended = Notifier()

    def __contains__(self, batch: Batch) -> bool:
        return batch in self._tasks

    async def wait_free(self) -> None:
        """Return when a further batch may be started."""
        if len(self._tasks) >= self._most:
            await self._ended.wait_until(lambda: len(self._tasks) < self._most, None)

    async def wait_idle(self) -> None:
        """Return when no batch is being written."""
        await self._ended.wait_until(lambda: not self._tasks, None)

    def start(self, batch: Batch, settle: Settle) -> None:
        """Have a batch delivered.

        Args:
            batch: what settles on the way leaves it.
            settle: called with a number of events and their outcome.

        """
        # Past the loop's task factory, as the flusher: to be shown, and drained, by nobody.
        loop = asyncio.get_running_loop()
        task = asyncio.Task(self._deliver(batch, settle), loop=loop, name=f"publisher {self._name}, a batch")
        self._tasks[batch] = task
        task.add_done_callback(lambda ended: self._forget(batch, ended))

    async def _deliver(self, batch: Batch, settle: Settle) -> None:
        while batch.parts:
            try:
                await self._delivery.deliver(batch, settle)
            except Exception:
                # A bug of ours, or of a hook: the pipe goes on.
                logger.exception("A batch of publisher %r failed and is tried again", self._name)
                await asyncio.sleep(DELAY_AFTER_BUG)

    def _forget(self, batch: Batch, task: asyncio.Task[None]) -> None:
        del self._tasks[batch]
        self._ended.notify()
        flusher = self._flusher
        if task.cancelled() and not self._stopping and flusher is not None and not flusher.cancelling():
            flusher.cancel()

    async def stop(self) -> None:
        """Cancel them all and wait for their end, also if this is cancelled again: a batch has one writer at a time."""
        self._stopping = True
        while self._tasks:
            for task in self._tasks.values():
                task.cancel()
            with suppress(asyncio.CancelledError):
                await self.wait_idle()
        self._stopping = False
