"""Waiting for a condition on several event loops at once: any thread may change it and wake the waiting coroutines."""

from __future__ import annotations

import asyncio
from asyncio.events import _get_running_loop
from collections.abc import Callable

__all__ = ["Notifier"]


class Notifier:
    """Wakes coroutines that wait for a condition. After a change of the condition, call ``notify`` from any thread."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], asyncio.AbstractEventLoop] = {}

    def __bool__(self) -> bool:
        """Return True if a coroutine waits."""
        return bool(self._waiting)

    async def wait_until(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until ``condition()`` is true, at most ``timeout`` seconds; return whether it is true."""
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        while True:
            future = loop.create_future()
            # Listed before the condition is tested: a notification from another thread in between is not lost.
            self._waiting[future] = loop
            try:
                if condition():
                    return True
                remaining = None if deadline is None else deadline - loop.time()
                if remaining is not None and remaining <= 0:
                    return False
                await asyncio.wait((future,), timeout=remaining)
            finally:
                self._waiting.pop(future, None)

    def notify(self, limit: int | None = None) -> None:
        """Wake all coroutines that wait, or the ``limit`` that have waited longest."""
        for future, loop in list(self._waiting.items())[:limit]:
            # Removed at once, so that two notifications wake two coroutines.
            if self._waiting.pop(future, None) is None:
                continue
            if loop is _get_running_loop():
                _resolve(future)
            else:
                try:
                    loop.call_soon_threadsafe(_resolve, future)
                except RuntimeError:
                    # The loop is closed, and the coroutine that waited on it is gone.
                    continue


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
