"""A sink that prints events for people to read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import ClassVar, TextIO

from bgtasks.events._thread import WorkerThread
from bgtasks.events.sink import Sink

__all__ = ["ConsoleSink"]


class ConsoleSink(Sink):
    """Writes one event per line to standard output or another stream, in a thread: a terminal may be slow.

    Args:
        stream: a text stream; None for ``sys.stdout`` as it is at each write.

    Example:
        >>> publisher = Publisher(ConsoleSink())

    """

    # One thread.
    max_inflight: ClassVar[int | None] = 1
    is_durable: bool = False

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._thread = WorkerThread("console sink")

    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Write a batch."""
        await self._thread.run(self._print, batch)

    async def close(self) -> None:
        """End the thread."""
        self._thread.stop()

    def _print(self, batch: Sequence[bytes]) -> None:
        stream = sys.stdout if self._stream is None else self._stream
        stream.write("".join(f"{event.decode(errors='backslashreplace')}\n" for event in batch))
        stream.flush()
