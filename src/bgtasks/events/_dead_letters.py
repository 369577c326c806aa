"""The file of events that were given up, one JSON object per line."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import time
from collections.abc import Sequence
from typing import Any, Final

from bgtasks.errors import describe, text_of
from bgtasks.events._line_file import LineFile
from bgtasks.events._thread import WorkerThread

__all__ = ["DeadLetters"]

logger = logging.getLogger("bgtasks.events")

MAX_BYTES: Final = 64 << 20
WARNING_INTERVAL: Final = 5.0


class DeadLetters:
    """Keeps events that were given up, each with the reason, the error, its batch and the time.

    The file is bounded: at 64 MiB it is renamed to ``PATH.N``, the next number, and a new one is started. Only the
    newest renamed file is kept.

    Args:
        path: the file; None to keep nothing.
        name: the publisher's name.

    """

    def __init__(self, path: str | os.PathLike[str] | None, name: str) -> None:
        self._file = None if path is None else LineFile(path, max_bytes=MAX_BYTES, backups=1)
        self._thread = WorkerThread(f"dead letters of {name}")
        self._name = name
        self._warned = -WARNING_INTERVAL
        # The last write; the thread runs one after another.
        self._writing: asyncio.Future[None] | None = None

    @property
    def is_kept(self) -> bool:
        """Whether there is a file."""
        return self._file is not None

    def add(self, events: Sequence[Any], batch_id: str, reason: str, error: BaseException | None) -> None:
        """Write events, in the thread; a failed write is logged and stops nothing."""
        if self._file is None:
            return
        text = None if error is None else text_of(error)
        lines = [self._line(event, batch_id, reason, text) for event in events]
        self._writing = self._thread.run(self._file.append, lines)
        self._writing.add_done_callback(self._written)

    def _written(self, writing: asyncio.Future[None]) -> None:
        failure = None if writing.cancelled() else writing.exception()
        now = time.monotonic()
        if failure is not None and now - self._warned >= WARNING_INTERVAL:
            self._warned = now
            logger.warning("Publisher %r cannot write its dead letters: %s", self._name, text_of(failure))

    async def wait_written(self) -> None:
        """Wait until all events are written: a slow disk must hold up the flusher instead of filling the memory."""
        if self._writing is not None and not self._writing.done():
            await asyncio.wait((self._writing,))

    def _line(self, event: Any, batch_id: str, reason: str, error: str | None) -> bytes:
        letter = {
            "time": time.time(),
            "publisher": self._name,
            "batch_id": batch_id,
            "reason": reason,
            "error": error,
            **_content(event),
        }
        return json.dumps(letter).encode()

    def after_fork(self) -> None:
        """Reset in the child of a fork; the file detects the fork itself."""
        self._writing = None

    async def close(self) -> None:
        """Close the file and end its thread."""
        if self._file is not None:
            try:
                await self._thread.run(self._file.close)
            finally:
                self._thread.stop()


def _content(event: Any) -> dict[str, str]:
    """Return an event under a key that names its form: its text, its bytes in base64, or a description of it."""
    if not isinstance(event, bytes):
        return {"object": describe(event)}
    try:
        return {"event": event.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(event).decode()}
