"""Timeouts of functions, and waits between their attempts: one thread per executor, started with the first of them."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Final

from bgtasks._locks import Lock, Signal
from bgtasks.executor._call import Call

__all__ = ["WAIT", "Deadlines"]

# The wait before an attempt, in the place of the number of an attempt that runs.
WAIT: Final = -1


class Deadlines:
    """Calls ``expire(call, attempt)`` at each deadline of a call that has not ended."""

    def __init__(self, expire: Callable[[Call, int], None]) -> None:
        self._expire = expire
        self._lock = Lock()
        self._changed = Signal()
        self._heap: list[tuple[float, int, Call, int]] = []
        self._tickets = itertools.count()
        self._stale = 0
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    def add(self, call: Call, timeout: float, attempt: int) -> None:
        """Start the timeout of an attempt that starts now, or the wait before the next one.

        Args:
            call: the call.
            timeout: seconds.
            attempt: the number of the attempt, 0 for a call that has one; ``WAIT`` for a wait.

        Raises:
            RuntimeError: the thread could not be started.

        """
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._watch, name="bgtasks-deadlines", daemon=True)
                thread.start()
                self._thread = thread
            heapq.heappush(self._heap, (time.monotonic() + timeout, next(self._tickets), call, attempt))
            if self._heap[0][2] is call:
                self._changed.set()

    def discard(self) -> None:
        """Count an attempt that ended before its timeout; remove such attempts when they are the majority."""
        with self._lock:
            self._stale += 1
            if self._stale > 64 and 2 * self._stale > len(self._heap):
                self._heap = [item for item in self._heap if _is_live(item[2], item[3])]
                heapq.heapify(self._heap)
                self._stale = 0

    def stop(self) -> None:
        """End the thread."""
        with self._lock:
            self._is_stopped = True
            self._changed.set()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _watch(self) -> None:
        while True:
            with self._lock:
                if self._is_stopped:
                    return
                wait = self._heap[0][0] - time.monotonic() if self._heap else None
                due = heapq.heappop(self._heap) if wait is not None and wait <= 0 else None
            if due is None:
                self._changed.wait(wait)
            else:
                self._expire(*due[2:])
            del due


def _is_live(call: Call, attempt: int) -> bool:
    return not call.is_closed and attempt in (WAIT, call.attempt)
