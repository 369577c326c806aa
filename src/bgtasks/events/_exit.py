"""At the interpreter's exit, publishers have one second to empty their queues.

The interpreter's exit calls ``atexit``. A process that ``multiprocessing`` starts by fork or forkserver ends by
``os._exit`` instead, after the finalizers of that package.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from bgtasks._fork import at_fork
from bgtasks._weak_calls import WeakCalls
from bgtasks.errors import text_of

__all__ = ["close_at_exit"]

logger = logging.getLogger("bgtasks.events")

# Seconds for emptying all queues at the interpreter's exit.
EXIT_TIMEOUT: Final = 1.0
# Among the finalizers of multiprocessing, which run from high to low: before queues and managers end.
FINALIZER_PRIORITY: Final = 100

_T = TypeVar("_T")

_closers: WeakCalls[Callable[[Any, float], Coroutine[Any, Any, object] | None]] = WeakCalls()


def close_at_exit(owner: _T, close: Callable[[_T, float], Coroutine[Any, Any, object] | None]) -> None:
    """Call ``close(owner, seconds)`` at the interpreter's exit, if ``owner`` is still alive.

    Args:
        owner: a publisher.
        close: returns a coroutine that closes it within that time, or None if there is nothing to close.

    """
    _closers.add(owner, close)
    _use_multiprocessing()


class _Children:
    """What this process does as a child of ``multiprocessing``, or has its own children do."""

    def __init__(self) -> None:
        # The process in which the finalizer is registered.
        self.finalized = 0
        self.follows = False

    def register(self) -> None:
        """Register the finalizer of this process, once."""
        util: Any = sys.modules["multiprocessing.util"]
        if self.finalized != os.getpid():
            util.Finalize(None, _at_exit, exitpriority=FINALIZER_PRIORITY)
            self.finalized = os.getpid()


_children = _Children()


def _use_multiprocessing() -> None:
    """Have publishers emptied at the end of this process, if ``multiprocessing`` started it, and of such children."""
    util: Any = sys.modules.get("multiprocessing.util")
    process: Any = sys.modules.get("multiprocessing.process")
    if util is None or process is None:
        # Not used so far; the hook for forks looks again, and a process of a fork server has loaded it.
        return
    if not _children.follows:
        # A child forgets the finalizers of its parent first and calls this afterwards, however it was started.
        util.register_after_fork(_children, _Children.register)
        _children.follows = True
    if process.parent_process() is not None:
        _children.register()


at_fork(in_child=_use_multiprocessing)


def _at_exit() -> None:
    closing = [coro for owner, close in _closers.living() if (coro := close(owner, EXIT_TIMEOUT)) is not None]
    if not closing:
        return

    async def close_all() -> None:
        await asyncio.gather(*closing)

    try:
        asyncio.run(close_all())
    except Exception as error:
        logger.warning("Events were lost at exit: %s", text_of(error))


atexit.register(_at_exit)
