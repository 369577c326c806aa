"""A queue of batches on the disk, for a sink that is down.

A spool writes files of a limited size, one after another, and deletes each when its last batch is done: a full disk
refuses changes to a file, but not its deletion. A file stays locked while its process lives. The next spool of the stem
takes over the files of a process that ended, in whatever way. It sends what is in them first, and never writes to them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple, ParamSpec, TypeVar, get_args

from bgtasks._checks import check_choice, check_count, check_optional_seconds
from bgtasks._fork import ForkLock, at_fork, follow_forks
from bgtasks.errors import InvalidOptionError
from bgtasks.events.errors import SpoolError, SpoolFullError, SpoolLockedError
from bgtasks.events.info import SpoolOverflow, SpoolStats, SpoolSync
from bgtasks.events.spool._file import PAGE_SIZE, FullError, SpoolFile, code_of, is_damage
from bgtasks.events.spool._folder import SpoolFolder
from bgtasks.events.spool._row import DamagedRowError, Row, decode
from bgtasks.events.spool._syncing import Syncer

__all__ = ["Spool"]

logger = logging.getLogger("bgtasks.events")

MIN_BYTES: Final = 1 << 20
# A drained file with at least this number of pages is deleted; a smaller one is used again.
KEPT_PAGES: Final = 512
# Pages of a file that hold no batch, and a batch's unused rest of its last page.
OVERHEAD_PAGES: Final = 4
# The minimum number of seconds between two searches for files to take over, in a spool that is often drained.
LOOK_INTERVAL: Final = 10.0
# Rows that are read at a time in a search through a file.
ROWS_AT_ONCE: Final = 64
# The share of max_age that may count for the time between two boots of the machine.
MOST_DOWNTIME: Final = 0.5

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class _Held(NamedTuple):
    """A batch that was returned and is not done, and its file."""

    file: SpoolFile
    row: Row

    def is_row(self, file: SpoolFile, row: Row) -> bool:
        """Return whether it is this row of this file."""
        return self.file is file and self.row.sequence == row.sequence


class Spool:
    """A bounded queue of batches on the disk that outlives its process.

    Its methods wait for the disk: call them in a thread that runs no event loop.

    Args:
        path: the stem of its files, in an existing directory. Processes may share a stem, sinks must not: batches that
            a process leaves go to the sink of the next one.
        max_bytes: the maximum size of all its files in bytes, at least 1 MiB. Two logs of up to 8 MiB are extra.
        overflow: what a full spool does: ``"drop_oldest"`` drops the oldest file of batches, about a 32nd part of the
            spool; ``"raise"`` raises a ``SpoolFullError``.
        max_age: the maximum age of a batch in seconds, by a clock that nobody sets. An older batch is dropped when its
            turn comes. The time of a restart of the machine counts by the system's clock, at most half of ``max_age``.
            None for no limit.
        sync: with each value, committed batches survive a crash of the process. ``"interval"`` has them on the disk
            within half a second, for a crash of the machine; ``"full"`` before the commit returns, at the cost of one
            wait for the disk per batch. ``"normal"`` leaves up to 4 MiB to the system, perhaps all since the start.

    Raises:
        InvalidOptionError: an argument is outside its values, or the path is a directory.

    Example:
        >>> spool = Spool("events")
        >>> spool.append([b"one", b"two"], "publisher-1")
        >>> for batch_id, batch in spool.oldest(4):
        ...     print(batch_id, batch)
        ...     spool.done(batch_id)
        publisher-1 [b'one', b'two']
        >>> spool.close()

    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int = 1 << 30,
        overflow: SpoolOverflow = "drop_oldest",
        max_age: float | None = None,
        sync: SpoolSync = "interval",
    ) -> None:
        check_count("max_bytes", max_bytes, MIN_BYTES)
        check_choice("overflow", overflow, get_args(SpoolOverflow))
        check_optional_seconds("max_age", max_age, none="for never")
        check_choice("sync", sync, get_args(SpoolSync))
        stem = Path(os.path.abspath(os.fspath(path)))
        if not stem.name or stem.is_dir():
            raise InvalidOptionError(
                f"{stem} is a directory; a spool's path is the stem of its files: {stem / 'events'}"
            )
        most_downtime = MOST_DOWNTIME * (max_age or 0.0)
        self._folder = SpoolFolder(stem, sync=sync, max_bytes=max_bytes, most_downtime=most_downtime)
        self._max_bytes = max_bytes
        self._overflow = overflow
        self._max_age = max_age
        # Has commits reach the disk, None if that is not wanted or each commit does it.
        self._syncer = Syncer() if sync == "interval" else None
        # Held during all calls of SQLite.
        self._fork_lock = ForkLock()
        self._files: list[SpoolFile] = []
        self._reset()
        follow_forks(self, Spool._after_fork)

    def _after_fork(self) -> None:
        """Reset in the child of a fork: files and lock belong to the parent, and the child makes its own file."""
        for file in self._files:
            file.leak()
        self._folder.renew()
        if self._syncer is not None:
            self._syncer.renew()
        self._reset()

    def _reset(self) -> None:
        self._is_open = False
        # Oldest first. Batches are appended to the last one, unless it is sealed.
        self._files = []
        # Returned and not done: they are never dropped to make room, and are kept if their file turns out damaged.
        self._held: dict[str, _Held] = {}
        self._recovered = 0
        self._dropped: Counter[str] = Counter()
        self._next_look = 0.0
        # The file of the last call of SQLite, to which its error belongs.
        self._used: SpoolFile | None = None
        self._stats: SpoolStats = {
            "events": 0,
            "bytes": 0,
            "batches": 0,
            "recovered": 0,
            "dropped": {},
            "corrupt_files": 0,
        }

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._folder.stem}, {self._stats['events']} events>"

    # -- the queue ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Take over the files of ended processes, and make one. The other methods do so if needed.

        Raises:
            SpoolError: no file can be opened there; the message says why.
            SpoolLockedError: another spool of this process uses the stem.

        """
        self._call("opened", self._repaired, self._file_to_append)

    def append(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Commit a batch after all others.

        Args:
            batch: the encoded events.
            batch_id: identifies the batch until it is done; no other batch may have the same id.

        Raises:
            SpoolFullError: there is no room, in the quota or on the disk. Nothing was written.
            SpoolError: the disk failed, or the file cannot be opened. Nothing was written.

        """
        self._call("written", self._repaired, self._append, batch, batch_id)

    def oldest(self, count: int) -> list[tuple[str, list[bytes]]]:
        """Return up to ``count`` batches that are not done, oldest first; they stay in the spool.

        A batch that is returned again is identical. Batches that are too old or damaged are dropped on the way.

        Raises:
            SpoolError: the disk failed, or the file cannot be opened.

        """
        return self._call("read", self._repaired, self._oldest, count)

    def done(self, batch_id: str) -> None:
        """Delete a batch that ``oldest`` returned or would return; do nothing if it is gone already.

        A batch behind others that are not done is deleted with them. If the disk refuses the deletion, no error is
        raised: the batch is deleted later. Until then, it is returned again by the next process alone.
        """
        with contextlib.suppress(SpoolError):
            self._call("written", self._delete, batch_id)

    def stats(self) -> SpoolStats:
        """Return the contents and losses of the spool. Safe from any thread; never waits."""
        return self._stats.copy()

    def close(self) -> None:
        """Release the files; never raises. Empty files are deleted, all others are left for the next spool."""
        with contextlib.suppress(SpoolError):
            self._call("closed", self._close)

    def _close(self) -> None:
        if not self._is_open:
            return
        for file in self._files:
            with contextlib.suppress(sqlite3.Error):
                file.clean_up()
        self._note()
        for file in self._files:
            if file.batches:
                file.close()
            else:
                file.remove()
        self._is_open = False
        self._files = []
        self._held.clear()
        del _claims[self._folder.stem]
        if self._syncer is not None:
            self._syncer.stop()

    # -- under the lock -------------------------------------------------------------------------------------------

    def _call(
        self, verb: str, method: Callable[Arguments, Result], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Call a method under the lock, translate errors of SQLite and the system, and update the statistics."""
        with self._fork_lock.lock:
            try:
                return method(*args, **kwargs)
            except (sqlite3.Error, OSError) as error:
                raise _translated(error, self._folder.stem, verb) from error
            finally:
                self._note()

    def _note(self) -> None:
        dropped = dict(self._dropped)
        if self._folder.lost:
            dropped["corrupt"] = dropped.get("corrupt", 0) + self._folder.lost
        # A closed spool keeps its last counts: the batches are still on the disk.
        last = self._stats
        events, size, batches = last["events"], last["bytes"], last["batches"]
        if self._is_open:
            events = size = batches = 0
            for file in self._files:
                events += file.events
                size += file.bytes
                batches += file.batches
        self._stats = {
            "events": events,
            "bytes": size,
            "batches": batches,
            "recovered": self._recovered,
            "dropped": dropped,
            "corrupt_files": self._folder.corrupt_files,
        }

    def _repaired(
        self, method: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Call a method; if a file is damaged, salvage what is in it and call the method again."""
        self._claim()
        # More than every file may be damaged if the disk is; then the error is raised.
        for _ in range(len(self._files) + 2):
            try:
                return method(*args, **kwargs)
            except sqlite3.Error as error:
                if not is_damage(error) or self._used is None or self._used not in self._files:
                    raise
                self._salvage(self._used, error)
        return method(*args, **kwargs)

    # -- appending ------------------------------------------------------------------------------------------------

    def _append(self, batch: Sequence[bytes], batch_id: str) -> None:
        if self._syncer is not None:
            self._syncer.raise_failure()
        wrote_back = False
        while True:
            file: SpoolFile | None = None
            try:
                file = self._file_to_append()
                file.append(batch, batch_id)
            except sqlite3.Error as error:
                if code_of(error) != sqlite3.SQLITE_FULL:
                    raise
            else:
                if self._syncer is not None:
                    self._syncer.mark(file.log)
                return
            if file is not None and not wrote_back:
                # A log that was written back is overwritten from its beginning, and needs no more room on the disk.
                wrote_back = True
                with contextlib.suppress(sqlite3.Error):
                    file.write_back()
            elif not self._make_room(_pages_for(batch)):
                raise self._no_room(batch)

    def _file_to_append(self) -> SpoolFile:
        """Return the last file; seal it and make another one if it is large enough."""
        file = self._last()
        if file is not None:
            self._used = file
            if not file.has_reached(self._folder.part_pages):
                return file
            file.seal()
        self._used = None
        if self._pages_left() < OVERHEAD_PAGES:
            raise FullError("the quota is used up")
        file = self._folder.make()
        self._files.append(file)
        self._limit()
        return file

    def _last(self) -> SpoolFile | None:
        """Return the file to append to, None if there is none yet."""
        return self._files[-1] if self._files and not self._files[-1].is_sealed else None

    def _limit(self) -> None:
        """Give the last file what the others leave of the quota."""
        if (last := self._last()) is not None:
            last.limit(self._pages_left() + last.pages())

    def _pages_left(self) -> int:
        """Return the number of pages that the files leave of the quota."""
        return self._max_bytes // PAGE_SIZE - sum(file.pages() for file in self._files)

    def _make_room(self, pages: int) -> bool:
        """Drop the oldest file of which no batch is on its way to the sink; return False if that does not help."""
        held = {held.file for held in self._held.values()}
        idle = [file for file in self._files if file not in held]
        kept = sum(file.pages() for file in self._files if file in held)
        if self._overflow == "raise" or not idle or self._max_bytes // PAGE_SIZE - kept < pages:
            return False
        if self._is_disk_full(pages) and sum(file.pages() for file in idle) < pages:
            # All would be dropped for nothing.
            return False
        file = idle[0]
        self._dropped["spool_full"] += file.events
        self._remove(file)
        return True

    def _is_disk_full(self, pages: int) -> bool:
        """Return whether the quota leaves room for a number of pages, so that the disk must be full."""
        last = self._last()
        if last is not None:
            return last.has_quota_for(pages)
        return self._pages_left() >= pages

    def _no_room(self, batch: Sequence[bytes]) -> SpoolFullError:
        events, size = len(batch), sum(map(len, batch))
        if self._is_disk_full(_pages_for(batch)):
            why = "the disk is full: free some space"
        else:
            why = f"it is limited to {self._max_bytes:,} bytes: raise max_bytes, or find out why the sink is behind"
        return SpoolFullError(
            f"the spool {self._folder.stem} has no room for a batch of {events:,} events, {size:,} bytes; {why}"
        )

    # -- reading --------------------------------------------------------------------------------------------------

    def _oldest(self, count: int) -> list[tuple[str, list[bytes]]]:
        while True:
            batches: list[tuple[str, list[bytes]]] = []
            found = 0
            changed: list[SpoolFile] = []
            for file in self._files:
                self._used = file
                rows = file.oldest(count - found)
                found += len(rows)
                before = file.batches
                for row in rows:
                    batch = self._accepted(file, row)
                    if batch is not None:
                        batches.append((row.batch_id, batch))
                if file.batches < before:
                    changed.append(file)
                if found == count:
                    break
            for file in changed:
                self._clean_up(file)
            if not changed and (batches or not self._look()):
                return batches

    def _accepted(self, file: SpoolFile, row: Row) -> list[bytes] | None:
        """Return the events of a batch; drop it if it is too old or damaged, and return None."""
        if self._max_age is not None and file.clock.age(row) > self._max_age:
            self._drop(file, row, "expired")
            return None
        held = self._held.get(row.batch_id)
        try:
            if held is not None and not held.is_row(file, row):
                raise DamagedRowError("another batch has its id")
            batch = decode(row)
        except DamagedRowError as error:
            logger.warning(
                "The spool %s drops the batch %s of %d events, which is damaged: %s",
                self._folder.stem,
                row.batch_id,
                row.events,
                error,
            )
            self._drop(file, row, "corrupt")
            return None
        self._held[row.batch_id] = _Held(file, row)
        return batch

    def _drop(self, file: SpoolFile, row: Row, reason: str) -> None:
        held = self._held.get(row.batch_id)
        if held is not None and held.is_row(file, row):
            del self._held[row.batch_id]
        file.discard(row)
        self._dropped[reason] += row.events

    def _delete(self, batch_id: str) -> None:
        if self._is_open:
            self._repaired(self._discard, batch_id)

    def _discard(self, batch_id: str) -> None:
        held = self._held.pop(batch_id, None) or self._named(batch_id)
        if held is not None:
            held.file.discard(held.row)
            self._clean_up(held.file)

    def _named(self, batch_id: str) -> _Held | None:
        """Return a batch that was not read yet, if it is among the next ones to read."""
        left = ROWS_AT_ONCE
        for file in self._files:
            self._used = file
            for row in file.heads(left):
                left -= 1
                if row.batch_id == batch_id:
                    return _Held(file, row)
            if not left:
                break
        return None

    def _clean_up(self, file: SpoolFile) -> None:
        """Delete the rows that are gone, if the disk allows it; delete a file of which all are gone."""
        self._used = file
        is_refused = False
        try:
            file.clean_up()
        except sqlite3.Error as error:
            if is_damage(error) and file.batches:
                raise
            is_refused = True
        # A file that the disk does not let change can be deleted, and that makes room on a full disk.
        if not file.batches and (file.is_sealed or is_refused or file.has_reached(KEPT_PAGES)):
            self._remove(file)

    # -- files ----------------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Open the spool unless it is open: take over what is left of ended processes."""
        if self._is_open:
            return
        other = _claims.setdefault(self._folder.stem, self)
        if other is not self:
            raise SpoolLockedError(
                f"the spool {self._folder.stem} is in use by another publisher of this process; "
                "batches of one would go to the sink of the other: give each its own path"
            )
        try:
            self._folder.renew_names()
            self._take_up()
        except BaseException:
            del _claims[self._folder.stem]
            raise
        self._is_open = True

    def _look(self) -> bool:
        """Look for files that were left behind since, at most once in an interval; return whether there were any."""
        return time.monotonic() >= self._next_look and self._take_up()

    def _take_up(self) -> bool:
        lost = self._folder.lost
        held = {file.path for file in self._files}
        files = self._folder.take_up(self._max_bytes, held)
        self._next_look = 0.0 if files else time.monotonic() + LOOK_INTERVAL
        events, batches = sum(file.events for file in files), sum(file.batches for file in files)
        self._recovered += events + self._folder.lost - lost
        if files:
            logger.info(
                "The spool %s recovered %d event%s in %d batch%s from earlier processes: %s",
                self._folder.stem,
                events,
                "" if events == 1 else "s",
                batches,
                "" if batches == 1 else "es",
                ", ".join(file.path.name for file in files),
            )
            self._files[:0] = files
            self._limit()
        return bool(files)

    def _remove(self, file: SpoolFile) -> None:
        self._files.remove(file)
        file.remove()
        self._limit()

    def _salvage(self, file: SpoolFile, cause: sqlite3.Error) -> None:
        """Replace a damaged file by one with what is intact in it, and with the batches that were read before."""
        held = [held for held in self._held.values() if held.file is file]
        known = sorted((held.row for held in held), key=lambda row: row.sequence)
        events = file.events
        successor, lost = self._folder.salvage(file, cause, known)
        index = self._files.index(file)
        self._files[index : index + 1] = [] if successor is None else [successor]
        self._dropped["corrupt"] += events if successor is None else lost
        for item in held:
            del self._held[item.row.batch_id]
        if successor is None:
            return
        names = {item.row.batch_id: item.row for item in held}
        for head in successor.heads(successor.batches if held else 0):
            row = names.get(head.batch_id)
            if row is not None:
                self._held[head.batch_id] = _Held(successor, head._replace(body=row.body))
        self._limit()


def _pages_for(batch: Sequence[bytes]) -> int:
    """Return the maximum number of pages that a batch takes in a new file."""
    return (sum(map(len, batch)) + 4 * len(batch)) // (PAGE_SIZE - 4) + OVERHEAD_PAGES


def _translated(error: sqlite3.Error | OSError, stem: Path, verb: str) -> SpoolError:
    """Return the ``SpoolError`` for an error of SQLite or the system."""
    hint = "its directory must exist, be writable and be on a local disk"
    if isinstance(error, sqlite3.Error) and code_of(error) == sqlite3.SQLITE_FULL:
        return SpoolFullError(f"the spool {stem} cannot be {verb}: the disk is full; free some space")
    return SpoolError(f"the spool {stem} cannot be {verb}: {error}; {hint}")


# The spool of each stem that is open in this process.
_claims: dict[Path, Spool] = {}
at_fork(in_child=_claims.clear)
