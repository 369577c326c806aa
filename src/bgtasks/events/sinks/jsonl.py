"""A sink for files of JSON lines: no server, no client to install, fast enough for most programs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from bgtasks._checks import check_count, check_limit, check_optional_seconds
from bgtasks.events._line_file import LineFile
from bgtasks.events._thread import WorkerThread
from bgtasks.events.errors import Reject
from bgtasks.events.sink import Sink

__all__ = ["JsonlSink"]


class JsonlSink(Sink):
    """Appends one JSON object per line to a file, one system call per batch, in a thread.

    The file is opened at the first batch, and half a line that a crash left at its end is cut off. If another program
    renames, removes or truncates it, as logrotate does, the next batch goes into a new file, or to its end. An open
    file is locked: give each process its own with ``{pid}`` in the path. Writes to a full or failing disk are retried
    as with any sink; no half batch stays in the file. Duplicates arise only if a process dies within a write.

    Args:
        path: the file, in an existing directory. ``{pid}`` stands for the id of the process.
        rotate_bytes: rename the file to ``PATH.N``, the next number, before it would grow beyond this size; None for
            never.
        rotate_age: rename the file when it has been open for this number of seconds; None for never.
        keep: the number of renamed files to keep; the newest has the highest number.
        fsync: sync each batch to the disk before it counts as delivered, against power cuts.

    Raises:
        InvalidOptionError: an argument is outside its values.

    Example:
        >>> publisher = Publisher(JsonlSink("events.jsonl", rotate_bytes=256 << 20))

    """

    # One thread; and a batch that is written again is recognized only if it was the last one.
    max_inflight: ClassVar[int | None] = 1

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        rotate_bytes: int | None = None,
        rotate_age: float | None = None,
        keep: int = 5,
        fsync: bool = False,
    ) -> None:
        self._file = LineFile(
            path,
            max_bytes=check_limit("rotate_bytes", rotate_bytes),
            max_age=check_optional_seconds("rotate_age", rotate_age, none="for never"),
            backups=check_count("keep", keep),
            fsync=fsync,
        )
        self._thread = WorkerThread("JSON lines sink")
        self._last_id: str | None = None

    @property
    def path(self) -> Path:
        """The path of the current file."""
        return self._file.path

    @property
    def repaired_bytes(self) -> int:
        """The number of bytes of half lines that were cut off when the file was opened."""
        return self._file.repaired_bytes

    async def open(self) -> None:
        """Open the file and repair its end."""
        await self._thread.run(self._file.open)

    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Append a batch."""
        future = self._thread.run(self._append, batch, batch_id)
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError:
            # The thread goes on; the next try recognizes the batch by its id.
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

    async def close(self) -> None:
        """Close the file and end the thread."""
        try:
            await self._thread.run(self._file.close)
        finally:
            self._thread.stop()


def _is_clean(batch: Sequence[bytes]) -> bool:
    return b"\n" not in b"".join(batch)
