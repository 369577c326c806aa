"""Timeouts of functions: one thread per executor, started with its first timeout."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable

from bgtasks._locks import Lock, Signal
from bgtasks.executor._call import Call


class Deadlines:
    """Calls ``expire(call)`` for each call that still runs when its timeout expires."""

    def __init__(self, expire: Callable[[Call], None]) -> None:
        self._expire = expire
        self._lock = Lock()
        self._changed = Signal()
        self._heap: list[tuple[float, int, Call]] = []
        self._tickets = itertools.count()
        self._stale = 0
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    def add(self, call: Call, timeout: float) -> None:
        """Start the timeout of a call that starts now.

        Raises:
            RuntimeError: the thread could not be started.

        """
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._watch, name="bgtasks-deadlines", daemon=True)
                thread.start()
                self._thread = thread
            heapq.heappush(self._heap, (time.monotonic() + timeout, next(self._tickets), call))
            if self._heap[0][2] is call:
                self._changed.set()

    def discard(self) -> None:
        """Count a call that ended before its timeout; remove such calls when they are the majority."""
        with self._lock:
            self._stale += 1
            if self._stale > 64 and 2 * self._stale > len(self._heap):
                self._heap = [item for item in self._heap if not item[2].is_closed]
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
                call = heapq.heappop(self._heap)[2] if wait is not None and wait <= 0 else None
            if call is None:
                self._changed.wait(wait)
            else:
                self._expire(call)
            del call
