"""The event loops that every test runs on, and one with a virtual clock."""

from __future__ import annotations

import asyncio
import selectors
import sys
from collections.abc import Callable
from typing import Any


def plain_loop() -> asyncio.AbstractEventLoop:
    """Return asyncio's own loop."""
    return asyncio.SelectorEventLoop()


def eager_loop() -> asyncio.AbstractEventLoop:
    """Return asyncio's own loop with the factory that starts every task inside ``create_task``."""
    loop = asyncio.SelectorEventLoop()
    loop.set_task_factory(asyncio.eager_task_factory)
    return loop


def uv_loop() -> asyncio.AbstractEventLoop:
    """Return uvloop's loop."""
    import uvloop

    return uvloop.new_event_loop()


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": plain_loop}
if hasattr(asyncio, "eager_task_factory"):
    LOOPS["eager"] = eager_loop
if sys.platform != "win32":
    LOOPS["uvloop"] = uv_loop


class _LeapingSelector(selectors.DefaultSelector):
    """A selector that does not wait: it moves its loop's clock instead."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if not events and timeout is not None and timeout > 0:
            self.loop.now += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose clock stands still while code runs and leaps to the next timer when nothing does."""

    def __init__(self) -> None:
        selector = _LeapingSelector()
        selector.loop = self
        self.now = 1000.0
        super().__init__(selector)
        # asyncio runs a timer when time + resolution exceeds it; added to years, the real resolution would be lost.
        self._clock_resolution = 1e-6

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self.now
