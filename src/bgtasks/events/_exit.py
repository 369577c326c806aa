"""At the interpreter's exit, publishers have one second to empty their queues."""

from __future__ import annotations

import asyncio
import atexit
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from bgtasks._weak_calls import WeakCalls
from bgtasks.errors import text_of

__all__ = ["close_at_exit"]

logger = logging.getLogger("bgtasks.events")

# Seconds for emptying all queues at the interpreter's exit.
EXIT_TIMEOUT: Final = 1.0

_T = TypeVar("_T")

_closers: WeakCalls[Callable[[Any, float], Coroutine[Any, Any, object] | None]] = WeakCalls()


def close_at_exit(owner: _T, close: Callable[[_T, float], Coroutine[Any, Any, object] | None]) -> None:
    """Call ``close(owner, seconds)`` at the interpreter's exit, if ``owner`` is still alive.

    Args:
        owner: a publisher.
        close: returns a coroutine that closes it within that time, or None if there is nothing to close.

    """
    _closers.add(owner, close)


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
