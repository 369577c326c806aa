"""Events at volume: a bounded queue, one task that empties it in batches, and books that close.

Sinks are in ``bgtasks.events.sinks``, each in a module of its own; ``EventModel`` is in ``bgtasks.events.model``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bgtasks.events.errors import EncodeError, Reject, Retry
from bgtasks.events.info import FlushReport, PublisherStats
from bgtasks.events.publisher import BasePublisher
from bgtasks.events.ring import IMPLEMENTATION

if TYPE_CHECKING:
    from bgtasks.events.publish import publish_event

__all__ = [
    "IMPLEMENTATION",
    "BasePublisher",
    "EncodeError",
    "FlushReport",
    "PublisherStats",
    "Reject",
    "Retry",
    "publish_event",
]


def __getattr__(name: str) -> Any:
    # Late: its defaults are InjectQ's, which is imported where it is installed and takes its time.
    if name == "publish_event":
        from bgtasks.events.publish import publish_event

        return publish_event
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
