"""An append-only file of lines that rotates, and survives a crash and a full disk."""

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
# O_CLOEXEC (not inherited by other programs) and O_BINARY (no translated line breaks) exist on some systems only.
FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class LineFile:
    """Appends lines, all of a batch or none.

    The first ``append`` opens the file and cuts off half a line that a crash left at its end. If another program
    renames, removes or truncates the file, the next ``append`` notices and goes on in a new one, or at its end. An open
    file is locked (``flock``, where the system has it), or two processes would repair and rotate it at the same time.
    Not safe for several threads at once.

    Args:
        path: the file, in an existing directory. ``{pid}`` stands for the id of the process.
        max_bytes: the size in bytes beyond which a file does not grow: it is rotated before. None for no limit.
        max_age: seconds after its opening at which a file is rotated; None for never.
        backups: the number of rotated files to keep: ``PATH.1`` is the first, and the newest has the highest number.
        fsync: sync each batch to the disk before ``append`` returns.

    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int | None = None,
        max_age: float | None = None,
        backups: int = 5,
        fsync: bool = False,
    ) -> None:
        self._template = os.path.abspath(os.fspath(path))
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._backups = backups
        self._fsync = fsync
        self._descriptor = -1
        # The id of the process that opened the file.
        self._pid = 0
        self._opened_path = ""
        self._file_bytes = 0
        self._opened_at = 0.0
        # The number of the last renamed file, and the path that it belongs to.
        self._number = 0
        self._number_of: Path | None = None
        self.repaired_bytes = 0

    @property
    def path(self) -> Path:
        """The path of the file."""
        return Path(self._template.replace("{pid}", str(os.getpid())))

    def open(self) -> None:
        """Open the file and repair its end, unless it is open in this process.

        Raises:
            OSError: it cannot be opened or read, or another process has it open.

        """
        if self._descriptor >= 0 and self._pid == os.getpid():
            return
        # In the child of a fork, closes the inherited descriptor; the lock stays with the parent.
        self.close()
        path = self.path
        descriptor = os.open(path, FLAGS, 0o666)
        try:
            _lock(descriptor, path)
            size = os.fstat(descriptor).st_size
            whole = _end_of_last_line(descriptor, size)
            if whole < size:
                os.ftruncate(descriptor, whole)
                self.repaired_bytes += size - whole
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        self._pid = os.getpid()
        self._opened_path = str(path)
        self._file_bytes = whole
        self._opened_at = time.monotonic()

    def append(self, lines: Sequence[bytes]) -> None:
        """Write lines, each without its line break.

        Raises:
            OSError: the lines cannot be written, on a full disk for example; none of them is in the file.

        """
        if not lines:
            return
        data = b"\n".join(lines) + b"\n"
        self.open()
        if not self._is_in_place():
            self.close()
            self.open()
        if self._is_full(len(data)):
            self.rotate()
        self._write(data)

    def _is_in_place(self) -> bool:
        """Return whether the open file still has its path, and read its size: logrotate may have been there."""
        status = os.fstat(self._descriptor)
        self._file_bytes = status.st_size
        try:
            found = os.stat(self._opened_path)
        except FileNotFoundError:
            return False
        return found.st_ino == status.st_ino and found.st_dev == status.st_dev

    def _is_full(self, more: int) -> bool:
        if not self._file_bytes:
            return False
        is_large = self._max_bytes is not None and self._file_bytes + more > self._max_bytes
        is_old = self._max_age is not None and time.monotonic() - self._opened_at >= self._max_age
        return is_large or is_old

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                # A nearly full disk takes a part and reports it only in the returned number; the next call raises.
                rest = rest[os.write(self._descriptor, rest) :]
            if self._fsync:
                os.fsync(self._descriptor)
        except BaseException:
            self._undo()
            raise
        self._file_bytes += len(data)

    def _undo(self) -> None:
        """Cut a half-written batch off, so that the next try does not follow half a line."""
        try:
            os.ftruncate(self._descriptor, self._file_bytes)
        except OSError:
            # The next opening cuts off half a line; whole lines of the batch stay, and will be there twice.
            self.close()

    def rotate(self) -> None:
        """Rename the file to ``PATH.N``, the next number, delete the oldest one of too many, and start a new file.

        The work does not grow with the number of files: no other is renamed.

        Raises:
            OSError: a file cannot be renamed or opened; the next ``append`` opens the file that is there.

        """
        self.close()
        path = self.path
        if not self._backups:
            path.unlink(missing_ok=True)
        else:
            number = self._next_number(path)
            with suppress(FileNotFoundError):
                os.replace(path, _numbered(path, number))
                self._number = number
            _numbered(path, number - self._backups).unlink(missing_ok=True)
        self.open()

    def _next_number(self, path: Path) -> int:
        """Return the number of the next renamed file; the first time, look for files of earlier processes."""
        if self._number_of != path:
            found = sorted(_numbers(path))
            for number in found[: max(len(found) - self._backups, 0)]:
                _numbered(path, number).unlink(missing_ok=True)
            self._number = found[-1] if found else 0
            self._number_of = path
        return self._number + 1

    def close(self) -> None:
        """Close the file if it is open."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _numbers(path: Path) -> list[int]:
    """Return the numbers of the renamed files of a path."""
    prefix = f"{path.name}."
    endings = [name[len(prefix) :] for name in os.listdir(path.parent) if name.startswith(prefix)]
    return [int(ending) for ending in endings if ending.isascii() and ending.isdigit()]


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
    """Return the offset after the last line break of a file, 0 if it has none."""
    end = size
    while end > 0:
        begin = max(end - SEARCHED_AT_ONCE, 0)
        os.lseek(descriptor, begin, os.SEEK_SET)
        found = os.read(descriptor, end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0
