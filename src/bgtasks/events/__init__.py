"""High-volume events: a bounded queue, one task that sends its batches, and counters that add up.

Each sink has a module of its own in ``bgtasks.events.sinks``; ``EventModel`` is in ``bgtasks.events.model``, and
``Spool`` in ``bgtasks.events.spool``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bgtasks.events._base import BasePublisher, PublishesOne
from bgtasks.events._event_queue import IMPLEMENTATION
from bgtasks.events._store import AnySpool
from bgtasks.events.errors import (
    EncodeError,
    Reject,
    Retry,
    SinkError,
    SpoolError,
    SpoolFullError,
    SpoolLockedError,
)
from bgtasks.events.fanout import Fanout
from bgtasks.events.info import (
    EventOverflow,
    FlushReport,
    PublisherState,
    PublisherStats,
    SpoolOverflow,
    SpoolStats,
)
from bgtasks.events.publisher import Publisher
from bgtasks.events.sink import Sink

if TYPE_CHECKING:
    from bgtasks.events.publish import publish_event

__all__ = [
    "IMPLEMENTATION",
    "AnySpool",
    "BasePublisher",
    "EncodeError",
    "EventOverflow",
    "Fanout",
    "FlushReport",
    "Publisher",
    "PublisherState",
    "PublisherStats",
    "PublishesOne",
    "Reject",
    "Retry",
    "Sink",
    "SinkError",
    "SpoolError",
    "SpoolFullError",
    "SpoolLockedError",
    "SpoolOverflow",
    "SpoolStats",
    "publish_event",
]


# Hidden from type checkers, for which a module with this function has every attribute.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        # Imported on demand: its defaults import InjectQ if that is installed, which is slow.
        if name == "publish_event":
            from bgtasks.events.publish import publish_event

            return publish_event
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
