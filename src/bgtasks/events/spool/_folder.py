"""The files of a spool in their directory: made, found, taken over from processes that ended, and salvaged."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from heapq import merge
from itertools import groupby
from pathlib import Path
from typing import Final

from bgtasks.events.info import SpoolSync
from bgtasks.events.spool._file import (
    PAGE_SIZE,
    DamagedFileError,
    SpoolFile,
    code_of,
    is_damage,
    remove_left_log,
    set_aside,
)
from bgtasks.events.spool._row import Row
from bgtasks.events.spool._syncing import sync_directory
from bgtasks.events.spool._wreck import Wreck, is_log_damaged

__all__ = ["SpoolFolder"]

logger = logging.getLogger("bgtasks.events")

# Process, time and number, which the first file of a spool has not; a plus for each time that the file was salvaged.
ENDING: Final = r"\.(\d+)-([0-9a-f]+)(?:-(\d+))?(\+*)\.spool"
# A full spool has about this number of files. So many descriptors are open, and a full disk costs one of so many parts.
PARTS: Final = 32
LEAST_PART: Final = 16 * PAGE_SIZE


class _InUseError(Exception):
    """Another process has the file open, or the system does not allow to open it."""


class SpoolFolder:
    """Makes and opens the files ``STEM.PID-TIME.spool``, ``STEM.PID-TIME-1.spool`` and so on.

    The time, in nanoseconds, is that of the first file of a spool; it makes every name unique. The files with the same
    process and time belong together: one process takes over all of them, for the order of their batches.

    ``corrupt_files`` counts the files that were set aside, ``lost`` the events that are known to be lost with them.
    """

    def __init__(self, stem: Path, *, sync: SpoolSync, max_bytes: int, most_downtime: float) -> None:
        self.stem = stem
        self._sync: SpoolSync = sync
        self._max_bytes = max_bytes
        self._most_downtime = most_downtime
        self._pattern = re.compile(re.escape(stem.name) + ENDING + "(-wal)?")
        self.renew()

    def renew(self) -> None:
        """Begin with new names and counts, in the child of a fork too."""
        self.corrupt_files = 0
        self.lost = 0
        # Damaged files that could not be salvaged yet, for one line in the log about each.
        self._unsalvaged: set[Path] = set()
        self.part_pages = LEAST_PART // PAGE_SIZE
        self.renew_names()

    def renew_names(self) -> None:
        """Begin with new names: the files made so far are those of another spool from now on."""
        self._time = time.time_ns()
        self._number = 0

    def make(self) -> SpoolFile:
        """Make a new file.

        Raises:
            sqlite3.Error: the file cannot be created.
            OSError: the directory cannot be read.

        """
        total = min(self._max_bytes, shutil.disk_usage(self.stem.parent).total)
        self.part_pages = max(total // PARTS, LEAST_PART) // PAGE_SIZE
        while True:
            number = f"-{self._number}" if self._number else ""
            path = self.stem.with_name(f"{self.stem.name}.{os.getpid()}-{self._time:x}{number}.spool")
            self._number += 1
            try:
                file = SpoolFile.make(path, sync=self._sync)
            except sqlite3.Error as error:
                if code_of(error) != sqlite3.SQLITE_BUSY:
                    raise
                # A process that looks for files to take over was faster, and deletes it as an empty one.
                continue
            if path.exists():
                break
            file.close()
        if self._sync != "normal":
            sync_directory(path.parent)
        return file

    # -- what ended processes left --------------------------------------------------------------------------------

    def take_up(self, most_bytes: int, held: AbstractSet[Path]) -> list[SpoolFile]:
        """Open the files that no process has open, oldest first, until they have ``most_bytes``; delete empty ones.

        Args:
            most_bytes: 1 to open the oldest alone.
            held: the files that the spool has open already.

        Raises:
            OSError: the directory cannot be read.

        """
        taken: dict[Path, SpoolFile] = {}
        size = 0
        for _, group in groupby(self._others(), key=lambda item: item[0][:2]):
            for _, path in group:
                if path in held or path in taken:
                    continue
                try:
                    file = self._take(path)
                except _InUseError:
                    # The others belong to the same process.
                    break
                if file is None:
                    continue
                if file.batches:
                    file.is_sealed = True
                    taken[file.path] = file
                    size += file.pages() * PAGE_SIZE
                else:
                    file.remove()
            if size >= most_bytes:
                break
        return list(taken.values())

    def _others(self) -> list[tuple[tuple[int, int, int, int], Path]]:
        """Return the files of other spools, in the order in which they were made, by time, process and number.

        Logs without a file are deleted.
        """
        found = []
        with os.scandir(self.stem.parent) as entries:
            for entry in entries:
                match = self._pattern.fullmatch(entry.name)
                if match:
                    process, at = int(match[1]), int(match[2], 16)
                    if match[5]:
                        remove_left_log(self.stem.with_name(entry.name))
                    elif (process, at) != (os.getpid(), self._time):
                        key = (at, process, int(match[3] or 0), len(match[4]))
                        found.append((key, self.stem.with_name(entry.name)))
        return sorted(found)

    def _take(self, path: Path) -> SpoolFile | None:
        """Open a file that was found, or one with what can be salvaged of it; return None if it was deleted."""
        try:
            file = SpoolFile(path, create=False, sync=self._sync)
        except sqlite3.Error:
            return None
        try:
            file.set_up(self._most_downtime)
            if is_log_damaged(path):
                raise DamagedFileError("its log is damaged")
        except sqlite3.Error as error:
            return self._take_damaged(file, error)
        if not path.exists():
            # Deleted after it was found and before it was locked. Names are unique, so this is certain.
            file.close()
            return None
        return file

    # -- damage ---------------------------------------------------------------------------------------------------

    def _take_damaged(self, file: SpoolFile, error: sqlite3.Error) -> SpoolFile | None:
        try:
            if not is_damage(error):
                raise _InUseError from error
            successor, lost = self.salvage(file, error)
        except (sqlite3.Error, OSError) as failure:
            if file.path not in self._unsalvaged and code_of(error) != sqlite3.SQLITE_BUSY:
                self._unsalvaged.add(file.path)
                logger.warning("The spool %s cannot salvage its file %s yet: %s", self.stem, file.path.name, failure)
            raise _InUseError from error
        finally:
            file.close()
        # They were accepted by the earlier process.
        self.lost += lost
        return successor

    def salvage(
        self, file: SpoolFile, cause: Exception, known: Sequence[Row] | None = None
    ) -> tuple[SpoolFile | None, int]:
        """Copy what is intact in a damaged file to another one, set the damaged one aside and close it.

        Args:
            file: the damaged file.
            cause: what is damaged, for the log.
            known: the rows that were read before, with their bodies, if this process wrote the file or has checked it.

        Returns:
            The new file, None if another process has salvaged it; and the number of events that are known to be lost.

        Raises:
            sqlite3.Error: the new file cannot be written. The damaged one is left in its place, and open.
            OSError: the damaged file cannot be read.

        """
        path = file.path
        successor = SpoolFile(path.with_name(f"{path.stem}+.spool"), create=True, sync=self._sync)
        try:
            lost = self._fill(successor, file, known)
        except BaseException:
            successor.close()
            raise
        file.close()
        if lost is None:
            successor.remove()
            return None, 0
        aside = set_aside(path)
        self.corrupt_files += 1
        if self._sync != "normal":
            sync_directory(path.parent)
        logger.warning(
            "The spool %s found its file %s damaged (%s): %d events in %d batches were salvaged, at least %d events "
            "are lost; the file is kept as %s",
            self.stem,
            path.name,
            cause,
            successor.events,
            successor.batches,
            lost,
            aside.name,
        )
        successor.is_sealed = True
        return successor, lost

    def _fill(self, successor: SpoolFile, file: SpoolFile, known: Sequence[Row] | None) -> int | None:
        """Write the intact rows of a file to its successor; return how many events are lost, None if it is gone."""
        successor.set_up(self._most_downtime)
        if not file.path.exists():
            return None
        if successor.batches:
            # A process that was killed before it could rename the file has written it.
            return 0
        with Wreck(file.path) as wreck:
            gaps = _Gaps(wreck.begin, wreck.end)
            rows = wreck.rows()
            if known is not None:
                rows = (row for row in merge(rows, known, key=lambda row: row.sequence) if file.has(row.sequence))
            successor.append_rows(_distinct(gaps.passed(rows)), self._most_downtime)
        return gaps.events if known is None else max(file.events - successor.events, 0)


class _Gaps:
    """Counts the events that are missing before, between and after rows.

    Args:
        begin: the number of events before the first row, as far as that is known.
        end: their number up to the last one.

    """

    def __init__(self, begin: int, end: int) -> None:
        self.events = 0
        self._passed = begin
        self._end = end

    def passed(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield rows unchanged."""
        for row in rows:
            self.events += max(row.position - self._passed, 0)
            self._passed = row.position + row.events
            yield row
        self.events += max(self._end - self._passed, 0)


def _distinct(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the first row of each id."""
    names: set[str] = set()
    for row in rows:
        if row.batch_id not in names:
            names.add(row.batch_id)
            yield row
