"""A publisher into a list: the double for tests of what publishes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bgtasks.events.publisher import BasePublisher

__all__ = ["MemoryPublisher"]


class MemoryPublisher(BasePublisher):
    """Keeps every event, encoded, in ``events``, in the order of arrival; ``batches`` holds (id, number of events).

    Takes the keywords of ``BasePublisher``. Nothing bounds the lists: it is for tests.

    Example:
        >>> publisher = MemoryPublisher()
        >>> publisher.emit({"event": "started"})
        True
        >>> await publisher.close()
        >>> publisher.events
        [b'{"event":"started"}']

    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.events: list[bytes] = []
        self.batches: list[tuple[str, int]] = []

    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Keep a batch."""
        self.events.extend(batch)
        self.batches.append((batch_id, len(batch)))
