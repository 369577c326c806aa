"""Locks and signals between threads whose release cannot fail for want of memory.

Up to Python 3.14 CPython makes a tuple of the arguments of ``__exit__`` of its own locks. Without memory for it,
``with`` raises ``MemoryError`` and leaves the lock locked for ever. Instead, ``release`` in a ``finally`` would have
another gap: Ctrl-C can come between ``acquire`` and ``try``. So ``Lock`` is compiled, for both twins; where it was not
built or cannot be loaded, it is CPython's own.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

__all__ = ["Lock", "Signal"]

if TYPE_CHECKING:
    from threading import RLock as Lock
else:
    try:
        from bgtasks._lock import Lock
    except ImportError:
        from threading import RLock as Lock


class Signal:
    """Wakes one thread that waits: the one that waits now, or the next one. ``set`` needs no memory.

    ``threading.Event`` has a condition inside, whose ``with`` does.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Wake the thread; do nothing if the signal is set."""
        try:  # noqa: SIM105  suppress() needs memory
            self._lock.release()
        except RuntimeError:
            pass

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the signal is set, and clear it; return False if that was not within ``timeout`` seconds."""
        return self._lock.acquire(timeout=-1 if timeout is None else min(max(timeout, 0.0), threading.TIMEOUT_MAX))

    def clear(self) -> None:
        """Forget that the signal was set."""
        self._lock.acquire(blocking=False)
