"""A program under load, to look at with ``bgtasks top``: mails and imports, a publisher, functions in threads.

::

    python examples/busy.py
    bgtasks top
"""

from __future__ import annotations

import asyncio
import random
import time

import bgtasks
from bgtasks.events import Publisher, Sink
from bgtasks.executor import BackgroundExecutor


class Outbox(Sink):
    """A sink that takes its time."""

    async def write(self, batch: object, batch_id: str) -> None:
        """Take every event."""
        await asyncio.sleep(0.02)


async def send(number: int) -> None:
    """Send a mail; one of fifty addresses is wrong."""
    await asyncio.sleep(random.expovariate(20))
    if number % 50 == 0:
        raise ValueError(f"no such address: {number}")


async def load_rows(rows: int) -> None:
    """Import a file, row by row."""
    for done in range(rows):
        bgtasks.progress(done, rows, "rows")
        await asyncio.sleep(0.01)


async def parse() -> None:
    """Block the loop."""
    time.sleep(0.25)  # noqa: ASYNC251  what is not to be done


async def main(manager: bgtasks.BackgroundTaskManager) -> None:
    """Start work for ever."""
    publisher = Publisher(Outbox(), name="orders", manager=manager)
    with BackgroundExecutor(max_concurrency=2, manager=manager) as submit:
        for number in range(1_000_000):
            manager.fire(send(number), name="send mail", timeout=5.0)
            publisher.emit({"number": number})
            if number % 100 == 0:
                manager.create_task(load_rows(500), name=f"import {number // 100 % 7}", timeout=30.0)
                submit(time.sleep, 0.5)
            if number % 500 == 499:
                manager.create_task(parse(), name="parse")
            await asyncio.sleep(0.01)


if __name__ == "__main__":
    bgtasks.run(main, watch=True)
