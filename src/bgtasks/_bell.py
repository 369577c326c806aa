"""A bell that coroutines on several loops wait for and any thread rings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Bell:
    """Wakes coroutines that wait for a condition; the condition may change in any thread, each change rings."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], asyncio.AbstractEventLoop] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    async def wait_until(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until ``condition()`` is true or ``timeout`` seconds are over; return whether it is true."""
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        while True:
            future = loop.create_future()
            # Listed before the question is asked: a ring from another thread in between is not lost.
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

    def ring(self, most: int | None = None) -> None:
        """Wake all that wait, or the ``most`` that have waited longest."""
        for future, loop in list(self._waiting.items())[:most]:
            # Out of the list at once, so that two rings wake two.
            if self._waiting.pop(future, None) is None:
                continue
            if loop is asyncio._get_running_loop():
                _answer(future)
            else:
                try:
                    loop.call_soon_threadsafe(_answer, future)
                except RuntimeError:
                    # That loop is closed, and whoever waited on it with it.
                    continue


def _answer(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
