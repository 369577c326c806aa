"""Selects the compiled or the pure-Python event queue by ``BGTASKS_IMPLEMENTATION``, as ``bgtasks.registry`` does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bgtasks._implementation import choose

__all__ = ["IMPLEMENTATION", "EventQueue", "QueueStats", "footprints"]

IMPLEMENTATION: Final = choose("bgtasks.events._queue", "event queue")

if TYPE_CHECKING or IMPLEMENTATION == "python":
    from bgtasks.events._footprint import footprints
    from bgtasks.events._queue_py import EventQueue, QueueStats
else:
    from bgtasks.events._queue import EventQueue, QueueStats, footprints
