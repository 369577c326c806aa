"""Events at volume: a bounded queue, one task that empties it in batches, and books that close.

Sinks are in ``bgtasks.events.sinks``, each in a module of its own.
"""

from bgtasks.events.errors import EncodeError, Reject, Retry
from bgtasks.events.info import FlushReport, PublisherStats
from bgtasks.events.publish import publish_event
from bgtasks.events.publisher import BasePublisher
from bgtasks.events.ring import IMPLEMENTATION

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
