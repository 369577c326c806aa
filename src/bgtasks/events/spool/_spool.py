"""A queue of batches on the disk, for a sink that is down.

Each spool has its own file, ``STEM.PID-TIME.spool``, which is locked while its process lives. The next spool of the
stem takes over the file of a process that ended, in whatever way: it opens the oldest file whose lock is free. Order,
ids and quota go on. If there is no such file, it makes a new one. A drained spool looks for another file to take over.
A spool that is closed empty deletes its file.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, ParamSpec, TypeVar, get_args

from bgtasks._checks import check_choice, check_count, check_optional_seconds
from bgtasks._fork import ForkLock, at_fork, follow_forks
from bgtasks.errors import InvalidOptionError
from bgtasks.events.errors import SpoolError, SpoolFullError, SpoolLockedError
from bgtasks.events.info import SpoolOverflow, SpoolStats, Sync
from bgtasks.events.spool._file import DAMAGED, DamagedBatchError, Row, SpoolFile, code_of, decode
from bgtasks.events.spool._folder import SpoolFolder

__all__ = ["Spool"]

MIN_BYTES: Final = 1 << 20
# A drained file with more pages than this is deleted; a smaller one is used again.
KEPT_PAGES: Final = 512
# The minimum number of seconds between two searches for files to take over, in a spool that is often drained.
LOOK_INTERVAL: Final = 10.0
# Rows that are read at a time in a search through the file.
ROWS_AT_ONCE: Final = 64

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class Spool:
    """A bounded queue of batches on the disk that outlives its process.

    Its methods wait for the disk: call them in a thread that runs no event loop.

    Args:
        path: the stem of its files, in an existing directory. Processes may share a stem, sinks must not: batches that
            a process leaves go to the sink of the next one.
        max_bytes: the maximum size of the file in bytes, at least 1 MiB. A log of up to 8 MiB is extra.
        overflow: what a full spool does: ``"drop_oldest"`` drops the oldest batches, ``"raise"`` raises a
            ``SpoolFullError``.
        max_age: the maximum age of a batch in seconds, by the system's clock. An older batch is dropped when its turn
            comes. None for no limit.
        sync: with ``"normal"``, committed batches survive a crash of the process. With ``"full"`` they survive a crash
            of the machine, at the cost of one wait for the disk per batch.

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
        sync: Sync = "normal",
    ) -> None:
        check_count("max_bytes", max_bytes, MIN_BYTES)
        check_choice("overflow", overflow, get_args(SpoolOverflow))
        check_optional_seconds("max_age", max_age, none="for never")
        check_choice("sync", sync, get_args(Sync))
        stem = Path(os.path.abspath(os.fspath(path)))
        if not stem.name or stem.is_dir():
            raise InvalidOptionError(
                f"{stem} is a directory; a spool's path is the stem of its files: {stem / 'events'}"
            )
        self._folder = SpoolFolder(stem, sync=sync, max_bytes=max_bytes)
        self._max_bytes = max_bytes
        self._overflow = overflow
        self._max_age = max_age
        # Held during all calls of SQLite.
        self._lock = ForkLock()
        self._reset()
        follow_forks(self, Spool._after_fork)

    def _after_fork(self) -> None:
        """Reset in the child of a fork: file and lock belong to the parent, and the child makes its own file."""
        if self._file is not None:
            self._file.leak()
        self._reset()

    def _reset(self) -> None:
        self._file: SpoolFile | None = None
        # Returned and not done: they are never dropped to make room, and are kept if their file turns out damaged.
        self._held: dict[str, Row] = {}
        # Done or dropped, but not deleted yet: a full disk may refuse the deletion.
        self._gone: dict[int, Row] = {}
        self._recovered = 0
        self._dropped: Counter[str] = Counter()
        self._folder.corrupt_files = 0
        self._next_look = 0.0
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
        """Take over a file of an ended process, or make one. The other methods do so if needed.

        Raises:
            SpoolError: no file can be opened there; the message says why.
            SpoolLockedError: another spool of this process uses the stem.

        """
        with self._at_work("opened"):
            self._opened()

    def append(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Commit a batch after all others.

        Args:
            batch: the encoded events.
            batch_id: identifies the batch until it is done; no other batch may have the same id.

        Raises:
            SpoolFullError: there is no room, in the quota or on the disk. Nothing was written.
            SpoolError: the disk failed, or the file cannot be opened. Nothing was written.

        """
        with self._at_work("written"):
            self._repaired(self._append, batch, batch_id, time.time())

    def oldest(self, count: int) -> list[tuple[str, list[bytes]]]:
        """Return up to ``count`` batches that are not done, oldest first; they stay in the spool.

        A batch that is returned again is identical. Batches that are too old or damaged are dropped on the way.

        Raises:
            SpoolError: the disk failed, or the file cannot be opened.

        """
        with self._at_work("read"):
            return self._repaired(self._oldest, count)

    def done(self, batch_id: str) -> None:
        """Delete a batch that ``oldest`` returned or would return; do nothing if it is gone already.

        If a full disk refuses the deletion, no error is raised: the batch is deleted later and not returned again.
        """
        with contextlib.suppress(SpoolError), self._at_work("written"):
            if self._file is None:
                return
            row = self._held.pop(batch_id, None) or self._repaired(self._head_named, batch_id)
            if row is not None:
                self._gone[row.sequence] = row._replace(body=b"")
                self._repaired(self._clean_up)

    def stats(self) -> SpoolStats:
        """Return the contents and losses of the spool. Safe from any thread; never waits."""
        return self._stats.copy()

    def close(self) -> None:
        """Release the file; never raises. An empty file is deleted, any other is left for the next spool."""
        with contextlib.suppress(SpoolError), self._at_work("closed"):
            if (file := self._file) is None:
                return
            with contextlib.suppress(sqlite3.Error):
                self._delete_gone(file)
            self._note()
            if file.batches:
                file.close()
            else:
                file.remove()
            self._file = None
            self._held.clear()
            self._gone.clear()
            del _claims[self._folder.stem]

    # -- under the lock -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _at_work(self, verb: str) -> Iterator[None]:
        """Hold the lock, translate errors of SQLite and the system, and update the statistics."""
        with self._lock:
            try:
                yield
            except (sqlite3.Error, OSError) as error:
                raise _translated(error, self._folder.stem, verb) from error
            finally:
                self._note()

    def _note(self) -> None:
        stats: SpoolStats = {
            **self._stats,
            "recovered": self._recovered,
            "dropped": dict(self._dropped),
            "corrupt_files": self._folder.corrupt_files,
        }
        # A closed spool keeps its last counts: the batches are still on the disk.
        if (file := self._file) is not None:
            stats["events"] = file.events - sum(row.events for row in self._gone.values())
            stats["bytes"] = file.bytes - sum(row.size for row in self._gone.values())
            stats["batches"] = file.batches - len(self._gone)
        self._stats = stats

    def _repaired(
        self, method: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Call a method; if the file is damaged, set it aside and call the method once more on a new file."""
        file = self._opened()
        try:
            return method(*args, **kwargs)
        except sqlite3.Error as error:
            if code_of(error) not in DAMAGED:
                raise
        self._replace_damaged(file)
        return method(*args, **kwargs)

    def _append(self, batch: Sequence[bytes], batch_id: str, now: float) -> None:
        file = self._opened()
        try:
            file.append(batch, batch_id, now)
        except sqlite3.Error as error:
            if code_of(error) != sqlite3.SQLITE_FULL:
                raise
        else:
            return
        if not self._append_in_room_of(self._oldest_idle(file), batch, batch_id, now):
            raise self._no_room(file, batch)

    def _oldest_idle(self, file: SpoolFile) -> Iterator[Row]:
        """Yield the rows that may be dropped to make room, oldest first, without bodies."""
        if self._overflow == "raise":
            return
        held = {row.sequence for row in self._held.values()} | self._gone.keys()
        last = 0
        while rows := file.heads(ROWS_AT_ONCE, after=last):
            last = rows[-1].sequence
            yield from (row for row in rows if row.sequence not in held)

    def _append_in_room_of(self, idle: Iterator[Row], batch: Sequence[bytes], batch_id: str, now: float) -> bool:
        """Commit a batch to a full file in place of the oldest rows; return False if that is impossible."""
        file = self._opened()
        size = sum(map(len, batch))
        wanted = size
        if file.has_quota_for(size):
            # The disk is full. A log that was written back is overwritten from its beginning and needs no more room.
            wanted = 0
            with contextlib.suppress(sqlite3.Error):
                file.write_back()
        rows = list(self._gone.values())
        dropped = 0
        while True:
            freed = 0
            while freed < wanted and (row := next(idle, None)):
                rows.append(row)
                freed += row.size
                dropped += row.events
            try:
                file.replace(rows, batch, batch_id, now)
            except sqlite3.Error as error:
                if code_of(error) != sqlite3.SQLITE_FULL:
                    raise
            else:
                self._gone.clear()
                self._dropped["spool_full"] += dropped
                return True
            if wanted and not freed:
                return False
            # Twice as much every time: the number of pages that a row frees is unknown.
            wanted = max(2 * wanted, size)

    def _no_room(self, file: SpoolFile, batch: Sequence[bytes]) -> SpoolFullError:
        events, size = len(batch), sum(map(len, batch))
        if file.has_quota_for(size):
            why = "the disk is full: free some space"
        else:
            why = f"it is limited to {self._max_bytes:,} bytes: raise max_bytes, or find out why the sink is behind"
        return SpoolFullError(
            f"the spool {file.path} has no room for a batch of {events:,} events, {size:,} bytes; {why}"
        )

    def _oldest(self, count: int) -> list[tuple[str, list[bytes]]]:
        file = self._opened()
        while True:
            rows = file.oldest(count, self._gone.keys())
            batches: list[tuple[str, list[bytes]]] = []
            expiry = -1.0 if self._max_age is None else time.time() - self._max_age
            for row in rows:
                if row.created < expiry:
                    self._drop(row, "expired")
                    continue
                try:
                    batches.append((row.batch_id, decode(row)))
                except DamagedBatchError:
                    self._drop(row, "corrupt")
                else:
                    self._held[row.batch_id] = row
            if len(batches) == len(rows):
                return batches
            self._clean_up()
            file = self._opened()

    def _head_named(self, batch_id: str) -> Row | None:
        """Return a batch that was not read yet, if it is among the next ones to read."""
        for row in self._opened().heads(ROWS_AT_ONCE + len(self._gone)):
            if row.batch_id == batch_id and row.sequence not in self._gone:
                return row
        return None

    def _drop(self, row: Row, reason: str) -> None:
        self._held.pop(row.batch_id, None)
        self._gone[row.sequence] = row._replace(body=b"")
        self._dropped[reason] += row.events

    def _clean_up(self) -> None:
        """Delete the rows that are gone, if the disk allows it; replace a file that is then empty."""
        file = self._opened()
        try:
            self._delete_gone(file)
        except sqlite3.Error as error:
            if code_of(error) in DAMAGED:
                raise
            return
        if not file.batches and time.monotonic() >= self._next_look:
            with contextlib.suppress(sqlite3.Error, OSError):
                self._replace_drained(file)

    def _delete_gone(self, file: SpoolFile) -> None:
        if self._gone:
            rows = list(self._gone.values())
            try:
                file.delete(rows)
            except sqlite3.Error as error:
                if code_of(error) != sqlite3.SQLITE_FULL:
                    raise
                file.write_back()
                file.delete(rows)
            self._gone.clear()

    # -- files ----------------------------------------------------------------------------------------------------

    def _opened(self) -> SpoolFile:
        if self._file is None:
            other = _claims.setdefault(self._folder.stem, self)
            if other is not self:
                raise SpoolLockedError(
                    f"the spool {self._folder.stem} is in use by another publisher of this process; "
                    "batches of one would go to the sink of the other: give each its own path"
                )
            try:
                self._file = self._left_behind() or self._folder.make()
            except BaseException:
                del _claims[self._folder.stem]
                raise
        return self._file

    def _left_behind(self) -> SpoolFile | None:
        file = self._folder.take_up()
        if file is None:
            self._next_look = time.monotonic() + LOOK_INTERVAL
        else:
            self._recovered += file.events
            self._next_look = 0.0
        return file

    def _replace_drained(self, file: SpoolFile) -> None:
        """Take over another file in place of an empty one, or start a new file if the empty one is large."""
        successor = self._left_behind()
        if successor is None and file.pages() > KEPT_PAGES:
            successor = self._folder.make()
        if successor is not None:
            self._file = successor
            self._held.clear()
            file.remove()

    def _replace_damaged(self, file: SpoolFile) -> None:
        """Set a damaged file aside and start a new one with the batches that were read already."""
        kept = sorted(self._held.values())
        successor = self._folder.make()
        successor.append_rows(kept)
        known = sum(row.events for row in kept) + sum(row.events for row in self._gone.values())
        self._dropped["corrupt"] += file.events - known
        self._folder.corrupt_files += 1
        file.set_aside()
        self._file = successor
        self._gone.clear()
        self._held = {
            row.batch_id: row._replace(sequence=head.sequence)
            for row, head in zip(kept, successor.heads(len(kept)), strict=True)
        }


def _translated(error: sqlite3.Error | OSError, stem: Path, verb: str) -> SpoolError:
    """Return the ``SpoolError`` for an error of SQLite or the system."""
    hint = "its directory must exist, be writable and be on a local disk"
    if isinstance(error, sqlite3.Error) and code_of(error) == sqlite3.SQLITE_FULL:
        return SpoolFullError(f"the spool {stem} cannot be {verb}: the disk is full; free some space")
    return SpoolError(f"the spool {stem} cannot be {verb}: {error}; {hint}")


# The spool of each stem that is open in this process.
_claims: dict[Path, Spool] = {}
at_fork(in_child=_claims.clear)
