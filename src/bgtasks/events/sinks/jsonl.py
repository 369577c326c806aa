"""A publisher into files of JSON lines: no server, nothing to install, fast enough for most programs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bgtasks.errors import InvalidOptionError, describe
from bgtasks.events._line_file import LineFile
from bgtasks.events.errors import Reject
from bgtasks.events.publisher import BasePublisher

__all__ = ["JsonlPublisher"]


class JsonlPublisher(BasePublisher):
    """Appends one JSON object a line to a file, one system call a batch, in a thread of its own.

    The file is opened at the first batch; a half line that a crash left at its end is cut off then. While it is open it
    is locked: give each process its own with ``{pid}`` in the path. A disk that is full or fails is tried again like
    any other sink; no half batch stays in the file. Duplicates come only from a process that died within a write.

    Args:
        path: the file; its folder must exist. ``{pid}`` stands for the id of the process.
        rotate_bytes: rename the file to ``PATH.1`` before it would grow beyond this; 0 for never.
        rotate_age: rename it when it has been open for so many seconds; 0 for never.
        keep: how many renamed files to keep.
        fsync: have each batch on the disk before it counts as delivered, against power cuts.
        options: the keywords of ``BasePublisher``.

    Raises:
        InvalidOptionError: an argument is outside its values.

    Example:
        >>> publisher = JsonlPublisher("events.jsonl", rotate_bytes=256 << 20)
        >>> publisher.emit({"event": "started"})
        True
        >>> await publisher.close()

    """

    # One thread; and only the id of the last batch is known, for one that is written again.
    max_inflight = 1

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        rotate_bytes: int = 0,
        rotate_age: float = 0.0,
        keep: int = 5,
        fsync: bool = False,
        **options: Any,
    ) -> None:
        for name, value in (("rotate_bytes", rotate_bytes), ("rotate_age", rotate_age), ("keep", keep)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise InvalidOptionError(f"{name} must be a number, 0 or more; got {describe(value)}")
        super().__init__(**options)
        self._file = LineFile(path, max_bytes=rotate_bytes, max_age=rotate_age, backups=int(keep), fsync=fsync)
        self._last_id: str | None = None

    @property
    def path(self) -> Path:
        """The file that is being written."""
        return self._file.path

    @property
    def mended_bytes(self) -> int:
        """How many bytes of half lines were cut off at opening."""
        return self._file.mended_bytes

    async def open(self) -> None:
        """Open the file and mend its end."""
        await self._thread.run(self._file.open)

    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Append a batch."""
        future = self._thread.run(self._append, batch, batch_id)
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError:
            # The thread goes on; its outcome is found again by the batch's id.
            await asyncio.wait((future,))
            future.exception()
            raise

    def _append(self, batch: Sequence[bytes], batch_id: str) -> None:
        if batch_id == self._last_id:
            return
        broken = [] if _is_clean(batch) else [index for index, line in enumerate(batch) if b"\n" in line]
        self._file.append([line for index, line in enumerate(batch) if index not in broken] if broken else batch)
        self._last_id = batch_id
        if broken:
            raise Reject(broken, "it holds a line break, which would make two lines of it")

    async def release(self) -> None:
        """Close the file."""
        await self._thread.run(self._file.close)

    def after_fork(self) -> None:
        """Let go of the parent's file."""
        super().after_fork()
        self._file.close()


def _is_clean(batch: Sequence[bytes]) -> bool:
    return b"\n" not in b"".join(batch)
