"""Coroutines for tests, and waiting by condition."""

from __future__ import annotations

import asyncio
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
