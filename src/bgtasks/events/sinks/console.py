"""A publisher into a stream of text, for a person who watches."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TextIO

from bgtasks.events.publisher import BasePublisher

__all__ = ["ConsolePublisher"]


class ConsolePublisher(BasePublisher):
    """Writes one event a line to standard output or another stream, in a thread: a terminal may be slow.

    Args:
        stream: where to; None for ``sys.stdout`` as it is at the time of writing.
        options: the keywords of ``BasePublisher``.

    Example:
        >>> publisher = ConsolePublisher()
        >>> publisher.emit({"event": "started"})
        True
        >>> await publisher.close()
        {"event":"started"}

    """

    # One thread.
    max_inflight = 1

    def __init__(self, stream: TextIO | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._stream = stream

    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Write a batch."""
        await self._thread.run(self._print, batch)

    def _print(self, batch: Sequence[bytes]) -> None:
        stream = sys.stdout if self._stream is None else self._stream
        stream.write("".join(f"{event.decode(errors='backslashreplace')}\n" for event in batch))
        stream.flush()
