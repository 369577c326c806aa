"""A sink in memory, for tests of programs that publish."""

from __future__ import annotations

from collections.abc import Sequence

from bgtasks.events.sink import Sink

__all__ = ["MemorySink"]


class MemorySink(Sink):
    """Keeps every event, encoded, in ``events``, in the order of arrival; ``batches`` holds (id, number of events).

    The lists are unbounded: use it in tests only.

    Example:
        >>> async def main():
        ...     sink = MemorySink()
        ...     async with Publisher(sink) as publisher:
        ...         publisher.emit({"event": "started"})
        ...     print(sink.events)
        >>> asyncio.run(main())
        [b'{"event":"started"}']

    """

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self.batches: list[tuple[str, int]] = []

    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Keep a batch."""
        self.events.extend(batch)
        self.batches.append((batch_id, len(batch)))
