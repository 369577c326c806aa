"""A file of lines that is only appended to, rotates, and survives a crash and a full disk."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

__all__ = ["LineFile"]

SEARCHED_AT_ONCE: Final = 1 << 16
# Not inherited by other programs, no line break translated: flags that only some systems have.
FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class LineFile:
    """Appends lines, all of a batch or none.

    It opens at the first ``append`` and cuts off what a crash left after the last line break. While it is open it is
    locked (``flock``, where there is one): two processes would mend and rotate under each other. Not safe from several
    threads at once.

    Args:
        path: the file; its folder must exist. ``{pid}`` in it stands for the id of the process.
        max_bytes: rotate before a file would grow beyond this; 0 for never.
        max_age: rotate a file when it is so many seconds old, counted from its opening here; 0 for never.
        backups: how many rotated files to keep, ``PATH.1`` being the newest; older ones are deleted.
        fsync: have each batch on the disk before ``append`` returns.

    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int = 0,
        max_age: float = 0.0,
        backups: int = 5,
        fsync: bool = False,
    ) -> None:
        self._template = os.path.abspath(os.fspath(path))
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._backups = backups
        self._fsync = fsync
        self._descriptor = -1
        self._size = 0
        self._opened_at = 0.0
        self.mended_bytes = 0

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self._template.replace("{pid}", str(os.getpid())))

    def open(self) -> None:
        """Open the file and mend its end, unless it is open.

        Raises:
            OSError: it cannot be opened or read, or another process has it open.

        """
        if self._descriptor >= 0:
            return
        descriptor = os.open(self.path, FLAGS, 0o666)
        try:
            _lock(descriptor, self.path)
            size = os.fstat(descriptor).st_size
            whole = _end_of_last_line(descriptor, size)
            if whole < size:
                os.ftruncate(descriptor, whole)
                self.mended_bytes += size - whole
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        self._size = whole
        self._opened_at = time.monotonic()

    def append(self, lines: Sequence[bytes]) -> None:
        """Write lines, each without its line break.

        Raises:
            OSError: not all of it could be written (a full disk, for one); then none of it is in the file.

        """
        if not lines:
            return
        data = b"\n".join(lines) + b"\n"
        self.open()
        if self._is_full(len(data)):
            self.rotate()
        self._write(data)

    def _is_full(self, more: int) -> bool:
        if not self._size:
            return False
        too_large = self._max_bytes and self._size + more > self._max_bytes
        too_old = self._max_age and time.monotonic() - self._opened_at >= self._max_age
        return bool(too_large or too_old)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                # A disk that is nearly full takes a part and says so only in the number; the next call raises.
                rest = rest[os.write(self._descriptor, rest) :]
            if self._fsync:
                os.fsync(self._descriptor)
        except BaseException:
            self._undo()
            raise
        self._size += len(data)

    def _undo(self) -> None:
        """Cut a half-written batch off, so that the next try does not follow half a line."""
        try:
            os.ftruncate(self._descriptor, self._size)
        except OSError:
            # Then opening again mends it, but for whole lines of the batch: those will be there twice.
            self.close()

    def rotate(self) -> None:
        """Rename the file to ``PATH.1``, those before to one number more, and begin a new one.

        Raises:
            OSError: a file cannot be renamed or opened; the next ``append`` opens what is there.

        """
        self.close()
        path = self.path
        if not self._backups:
            path.unlink(missing_ok=True)
        else:
            for number in range(self._backups - 1, -1, -1):
                with suppress(FileNotFoundError):
                    os.replace(_numbered(path, number), _numbered(path, number + 1))
        self.open()

    def close(self) -> None:
        """Close the file if it is open."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}") if number else path


def _lock(descriptor: int, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            error.errno,
            "another process or publisher writes this file; {pid} in the path gives each process its own",
            str(path),
        ) from None


def _end_of_last_line(descriptor: int, size: int) -> int:
    """Return the offset behind the last line break of a file, 0 if it has none."""
    end = size
    while end > 0:
        begin = max(end - SEARCHED_AT_ONCE, 0)
        os.lseek(descriptor, begin, os.SEEK_SET)
        found = os.read(descriptor, end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0
