"""The files of a spool in their directory: created, searched, and taken over from processes that ended."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import time
from pathlib import Path
from typing import Final

from bgtasks.events.info import Sync
from bgtasks.events.spool._file import DAMAGED, SpoolFile, code_of, set_aside

__all__ = ["SpoolFolder"]

ENDING: Final = r"\.\d+-([0-9a-f]+)\.spool"


class SpoolFolder:
    """Makes and opens the files ``STEM.PID-TIME.spool``; the time, in nanoseconds, makes every name unique.

    ``corrupt_files`` counts the files that were set aside.
    """

    def __init__(self, stem: Path, *, sync: Sync, max_bytes: int) -> None:
        self.stem = stem
        self.corrupt_files = 0
        self._sync: Sync = sync
        self._max_bytes = max_bytes
        self._pattern = re.compile(re.escape(stem.name) + ENDING)
        self._open_path: Path | None = None

    def make(self) -> SpoolFile:
        """Make a new file.

        Raises:
            sqlite3.Error: the file cannot be created.

        """
        path = self.stem.with_name(f"{self.stem.name}.{os.getpid()}-{time.time_ns():x}.spool")
        try:
            file = SpoolFile(path, create=True, sync=self._sync, max_bytes=self._max_bytes)
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        self._open_path = path
        return file

    def take_up(self) -> SpoolFile | None:
        """Open the oldest file that holds batches and that no process has open, if any; delete empty ones.

        Raises:
            OSError: the directory cannot be read.

        """
        for path in self._others():
            file = self._lock(path)
            if file is None:
                continue
            if file.batches:
                self._open_path = path
                return file
            file.remove()
        return None

    def _others(self) -> list[Path]:
        """Return the files that are not open here, in the order in which they were made."""
        found = []
        with os.scandir(self.stem.parent) as entries:
            for entry in entries:
                match = self._pattern.fullmatch(entry.name)
                if match and (path := self.stem.with_name(entry.name)) != self._open_path:
                    found.append((int(match[1], 16), path))
        return [path for _, path in sorted(found)]

    def _lock(self, path: Path) -> SpoolFile | None:
        """Open a file that was found; return None if it is damaged, deleted or open elsewhere."""
        try:
            file = SpoolFile(path, create=False, sync=self._sync, max_bytes=self._max_bytes)
        except sqlite3.Error as error:
            if code_of(error) in DAMAGED:
                set_aside(path)
                self.corrupt_files += 1
            # Otherwise its process is alive, or another process has taken it over.
            return None
        if not path.exists():
            # Deleted after it was found and before it was locked. Names are unique, so this is certain.
            file.close()
            return None
        return file
