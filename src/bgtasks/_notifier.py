"""Waiting for a condition on several event loops at once: any thread may change it and wake the waiting coroutines."""

from __future__ import annotations

import asyncio
from asyncio.events import _get_running_loop
from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import TypeVar

__all__ = ["Notifier", "outcome_of"]

Result = TypeVar("Result")


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
            timer: asyncio.TimerHandle | None = None
            try:
                # Listed before the condition is tested: a notification from another thread in between is not lost.
                self._waiting[future] = loop
                if condition():
                    return True
                if deadline is not None:
                    if deadline <= loop.time():
                        return False
                    timer = loop.call_at(deadline, _resolve, future, context=Context())
                await future
            finally:
                self._waiting.pop(future, None)
                if timer is not None:
                    timer.cancel()

    def notify(self, limit: int | None = None) -> None:
        """Wake all coroutines that wait, or the ``limit`` that have waited longest."""
        for future, loop in list(self._waiting.items())[:limit]:
            # Removed at once, so that two notifications wake two coroutines.
            if self._waiting.pop(future, None) is None:
                continue
            try:
                if loop is _get_running_loop():
                    _resolve(future)
                else:
                    loop.call_soon_threadsafe(_resolve, future)
            except RuntimeError:
                # The loop is closed, and the coroutine that waited on it is gone.
                continue
            except BaseException:
                # It still waits: the next notification is for it.
                if not future.done():
                    self._waiting[future] = loop
                raise


async def outcome_of(future: asyncio.Future[Result]) -> Result:
    """Return or raise the outcome of a future of this loop; cancelling this wait does not cancel the future."""
    if not future.done():
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        wake = partial(_resolve_after, waiter)
        future.add_done_callback(wake)
        try:
            await waiter
        finally:
            future.remove_done_callback(wake)
    return future.result()


def _resolve_after(waiter: asyncio.Future[None], _: asyncio.Future[Result]) -> None:
    _resolve(waiter)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
