"""Timeouts of functions: one thread per executor, started with its first timeout."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable

from bgtasks.executor._call import Call


class Deadlines:
    """Calls ``expire(call)`` for each call that still runs when its timeout expires."""

    def __init__(self, expire: Callable[[Call], None]) -> None:
        self._expire = expire
        self._changed = threading.Condition()
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
        with self._changed:
            if self._thread is None:
                thread = threading.Thread(target=self._watch, name="bgtasks-deadlines", daemon=True)
                thread.start()
                self._thread = thread
            heapq.heappush(self._heap, (time.monotonic() + timeout, next(self._tickets), call))
            if self._heap[0][2] is call:
                self._changed.notify()

    def discard(self) -> None:
        """Count a call that ended before its timeout; remove such calls when they are the majority."""
        with self._changed:
            self._stale += 1
            if self._stale > 64 and 2 * self._stale > len(self._heap):
                self._heap = [item for item in self._heap if not item[2].is_closed]
                heapq.heapify(self._heap)
                self._stale = 0

    def stop(self) -> None:
        """End the thread."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _watch(self) -> None:
        while True:
            with self._changed:
                if self._is_stopped:
                    return
                now = time.monotonic()
                if not self._heap or self._heap[0][0] > now:
                    # A lock cannot wait longer than this, which is centuries.
                    wait = min(self._heap[0][0] - now, threading.TIMEOUT_MAX) if self._heap else None
                    self._changed.wait(wait)
                    continue
                call = heapq.heappop(self._heap)[2]
            self._expire(call)
            del call
