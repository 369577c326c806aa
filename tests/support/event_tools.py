"""Helpers for tests of events: a sink that fails by a script, and a check that counters add up."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from bgtasks.events import Publisher, Sink

QUEUES = {"cython": "bgtasks.events._queue", "python": "bgtasks.events._queue_py"}


def queue_module(twin: str) -> ModuleType:
    """Return the module of a twin's event queue; raise an error if the compiled one was not built."""
    return importlib.import_module(QUEUES[twin])


def assert_counters_add_up(stats: Any) -> None:
    """Fail unless every accepted event is accounted for."""
    assert stats["accepted"] == (
        stats["delivered"] + sum(stats["dropped"].values()) + stats["queue_events"] + stats["spooled"]
    ), stats


class ScriptedSink(Sink):
    """Keeps the events; before that, each call of ``write`` takes one step of the script.

    A step is an exception to raise, an awaitable function to call, or None to go on.
    """

    def __init__(self, script: Sequence[Any] = ()) -> None:
        self.script = list(script)
        self.events: list[Any] = []
        self.calls: list[tuple[str, list[Any]]] = []
        self.opened = self.closed = 0

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

    async def close(self) -> None:
        """Count."""
        self.closed += 1


def scripted(script: Sequence[Any] = (), *, sink: type[ScriptedSink] = ScriptedSink, **options: Any) -> Any:
    """Return a publisher with a ``ScriptedSink``."""
    return Publisher(sink(script), **{"linger": 0.001, **options})


async def until(condition: Any, timeout: float = 20.0) -> None:
    """Wait until ``condition()`` is true."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.001)


async def has_failed(publisher: Any) -> None:
    """Wait until a write has failed and was not repeated successfully, however long a server takes."""
    await until(lambda: publisher.stats()["last_error"])
