"""Noticing SIGINT and SIGTERM where somebody else handles them, a server for example."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

__all__ = ["SIGNALS", "SignalListener", "name_of"]

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class SignalListener:
    """Inside this context calls ``on_signal`` on the loop for each SIGINT and SIGTERM, and passes it on at once.

    A signal without a handler is left alone: it ends the process. Outside the main thread, where Python does not allow
    handlers, nothing is noticed.

    Args:
        loop: the loop that runs in this thread.
        on_signal: called with the number of the signal, how often it came, and when, on the monotonic clock.

    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_signal: Callable[[int, int, float], object]) -> None:
        self._loop = loop
        self._on_signal = on_signal
        self._previous: dict[int, Any] = {}
        self._counts: Counter[int] = Counter()

    def __enter__(self) -> None:
        """Stand before the handlers that there are."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            previous = signal.getsignal(number)
            if callable(previous):
                self._previous[number] = previous
                signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        """Restore the handlers, but not in the place of one that was set meanwhile."""
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Called between any two instructions: only what is safe there.
        self._counts[number] += 1
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._on_signal, number, self._counts[number], time.monotonic())
        self._previous[number](number, frame)


def name_of(number: int) -> str:
    """Return the name of a signal."""
    return signal.Signals(number).name
