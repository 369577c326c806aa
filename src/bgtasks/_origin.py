"""Where tasks come from: the line that creates them, and the loop and the thread that run them."""

from __future__ import annotations

import asyncio
import sys
import threading
import types
from itertools import count
from typing import Any

__all__ = ["describe_loop", "origin"]


def origin() -> str | None:
    """Return file and line of the innermost frame outside this package, None if the event loop called the package."""
    # Not f_back, which loses a MemoryError in CPython 3.12: whatever runs next would be said to have raised it.
    for depth in count(1):
        try:
            frame = sys._getframe(depth)  # noqa: SLF001  documented
        except ValueError:
            # The stack is not that deep.
            break
        package = _package_of(frame)
        if package == "asyncio":
            break
        if package != "bgtasks":
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return None


def _package_of(frame: types.FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def describe_loop(loop: Any) -> tuple[str, str | None]:
    """Return a label of a loop, unique among those of the process that exist, and the name of the running thread.

    The stand-in for a loop of an executor has many threads or none: its thread is None.
    """
    label = f"{type(loop).__qualname__}-{id(loop):x}"
    return label, threading.current_thread().name if isinstance(loop, asyncio.AbstractEventLoop) else None
