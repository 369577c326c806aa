"""What the tests of events share: publishers that fail to order, and the check that books close."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from bgtasks.events import BasePublisher

RINGS = {"cython": "bgtasks.events._ring", "python": "bgtasks.events._ring_py"}


def ring_module(twin: str) -> ModuleType:
    """Return the ring of a twin; a compiled one that was not built is an error."""
    return importlib.import_module(RINGS[twin])


def assert_books_close(stats: Any) -> None:
    """Fail unless every accepted event is accounted for."""
    assert stats["accepted"] == (
        stats["delivered"] + sum(stats["dropped"].values()) + stats["queue_events"] + stats["spooled"]
    ), stats


class ScriptedPublisher(BasePublisher):
    """Keeps what it is given; before that it does what the script says, one step a call of ``write``.

    A step is an exception to raise, an awaitable function to call, or None to go on.
    """

    def __init__(self, script: Sequence[Any] = (), **options: Any) -> None:
        super().__init__(**{"linger": 0.001, **options})
        self.script = list(script)
        self.events: list[Any] = []
        self.calls: list[tuple[str, list[Any]]] = []
        self.opened = self.released = 0

    async def open(self) -> None:
        """Count."""
        self.opened += 1

    async def write(self, batch: Sequence[Any], batch_id: str) -> None:
        """Follow the script."""
        self.calls.append((batch_id, list(batch)))
        step = self.script.pop(0) if self.script else None
        if isinstance(step, BaseException):
            raise step
        if step is not None:
            await step(batch, batch_id)
        self.events.extend(batch)

    async def release(self) -> None:
        """Count."""
        self.released += 1


async def until(condition: Any, timeout: float = 20.0) -> None:
    """Wait until ``condition()`` is true."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.001)


async def has_failed(publisher: Any) -> None:
    """Wait until a write has failed and not come right: a server's answer may take longer than a deadline to test."""
    await until(lambda: publisher.stats()["last_error"])
