"""Coroutines for tests, and waiting by condition."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any


async def value(result: Any = None) -> Any:
    """Return at once."""
    return result


async def after(event: asyncio.Event, result: Any = None) -> Any:
    """Return when the event is set."""
    await event.wait()
    return result


async def forever() -> None:
    """Wait for ever."""
    await asyncio.Event().wait()


async def failing(error: BaseException) -> None:
    """Raise at once."""
    raise error


async def failing_later(error: BaseException) -> None:
    """Raise after one suspension."""
    await asyncio.sleep(0)
    raise error


async def stubborn(times: int, release: asyncio.Event) -> str:
    """Swallow a number of cancellations, and end when released."""
    while True:
        try:
            await release.wait()
            return "released"
        except asyncio.CancelledError:
            times -= 1
            if times < 0:
                raise


async def until(condition: Callable[[], object]) -> None:
    """Run the loop until the condition holds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


def wait_until(condition: Callable[[], object], *, within: float = 20.0, every: float = 0.005) -> bool:
    """Wait for a condition to hold, up to ``within`` seconds; return whether it does."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True
