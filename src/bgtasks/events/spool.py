"""Store and forward: batches wait on the disk for a sink that does not take them.

A spool is a queue of batches in a file of its own, ``STEM.PID-TIME.spool``. The file is locked while its process lives.
What a process leaves behind, whichever way it ended, is taken up by the next spool of that stem: the first file whose
lock is free becomes its own, so order, ids and quota go on where they stopped. With nothing to take up, it makes a new
file. A spool that was drained looks for another file to take up; one that is closed empty deletes its own.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, ParamSpec, TypeAlias, TypeVar, get_args

from bgtasks.errors import InvalidOptionError, describe
from bgtasks.events._spool_file import DAMAGED, DamagedBatchError, Row, SpoolFile, Sync, code_of, decode
from bgtasks.events._spool_folder import SpoolFolder
from bgtasks.events.errors import SpoolError, SpoolFullError, SpoolLockedError

__all__ = ["Full", "Spool", "SpoolStats", "Sync"]

Full: TypeAlias = Literal["drop_oldest", "refuse"]

MIN_BYTES: Final = 1 << 20
# A drained file with more pages is given back to the disk; a smaller one is kept for what comes next.
KEPT_PAGES: Final = 512
# A spool that is drained again and again looks so seldom, in seconds, for files left behind since.
LOOK_INTERVAL: Final = 10.0
# The batches that may have to make room are looked at so many at a time.
ROWS_AT_ONCE: Final = 64

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class SpoolStats(NamedTuple):
    """What a spool holds and what became of the rest; counts are events unless they say otherwise.

    ``recovered`` were taken up from earlier processes. ``dropped`` counts by reason: ``spool_full`` those that made
    room, ``expired`` those older than ``max_age``, ``corrupt`` those in a damaged row or file, as far as they are
    known. ``corrupt_files`` counts the files that were set aside.
    """

    events: int = 0
    bytes: int = 0
    batches: int = 0
    recovered: int = 0
    dropped: Mapping[str, int] = {}
    corrupt_files: int = 0


class Spool:
    """A bounded queue of batches on the disk that outlives its process.

    Its methods wait for the disk and for nothing else: they belong into a thread, not into that of an event loop.

    Args:
        path: the stem of its files, in a directory that exists. Processes may share one, sinks must not: what a process
            leaves behind goes to the sink of the next.
        max_bytes: the size of the file in bytes, at least 1 MiB; a log of up to 8 MiB comes on top.
        full: a batch that finds no room takes that of the oldest, ``"drop_oldest"``, or is refused, ``"refuse"``.
        max_age: seconds after which a batch is dropped when its turn comes, by the system's clock; None for never.
        sync: what is committed survives the end of its process with ``"normal"``, that of the machine with ``"full"``,
            which waits for the disk once a batch.

    Raises:
        InvalidOptionError: an argument is outside its values, or the path is a directory.

    Example:
        >>> spool = Spool("/var/spool/app/events")
        >>> spool.append([b"one", b"two"], "publisher-1")
        >>> for batch_id, batch in spool.oldest(4):
        ...     send(batch)
        ...     spool.done(batch_id)

    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int = 1 << 30,
        full: Full = "drop_oldest",
        max_age: float | None = None,
        sync: Sync = "normal",
    ) -> None:
        _check_options(max_bytes, full, max_age, sync)
        stem = Path(os.path.abspath(os.fspath(path)))
        if not stem.name or stem.is_dir():
            raise InvalidOptionError(
                f"{stem} is a directory; a spool's path is the stem of its files: {stem / 'events'}"
            )
        self._folder = SpoolFolder(stem, sync=sync, max_bytes=max_bytes)
        self._max_bytes = max_bytes
        self._full = full
        self._max_age = max_age
        self._reset()
        with _fork_lock:
            _spools.add(self)

    def _reset(self) -> None:
        # Held whenever SQLite is at work: a fork waits for it, so that no child inherits half of something.
        self._lock = threading.RLock()
        self._file: SpoolFile | None = None
        # Handed out and not done: they never make room, and are written again where their file turns out damaged.
        self._held: dict[str, Row] = {}
        # Done or dropped, but not deleted yet: a full disk takes no deletion either.
        self._gone: dict[int, Row] = {}
        self._recovered = 0
        self._dropped: Counter[str] = Counter()
        self._folder.corrupt_files = 0
        self._next_look = 0.0
        self._stats = SpoolStats()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._folder.stem}, {self._stats.events} events>"

    # -- the queue ----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Take up a file that was left behind, or make one. The other methods do it where it was not done.

        Raises:
            SpoolError: there can be no file there; the text says why.
            SpoolLockedError: another spool of this process has the stem.

        """
        with self._at_work("opened"):
            self._opened()

    def append(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Commit a batch behind all others.

        Args:
            batch: the encoded events.
            batch_id: names the batch until it is done; no other batch may have it.

        Raises:
            SpoolFullError: there is no room, in the quota or on the disk. Nothing was written.
            SpoolError: the disk failed, or the file cannot be opened. Nothing was written.

        """
        with self._at_work("written"):
            self._mended(self._append, batch, batch_id, time.time())

    def oldest(self, count: int) -> list[tuple[str, list[bytes]]]:
        """Return up to ``count`` batches that are not done, oldest first; they stay where they are.

        What is returned again is the same, byte for byte. Batches that are too old or damaged are dropped on the way.

        Raises:
            SpoolError: the disk failed, or the file cannot be opened.

        """
        with self._at_work("read"):
            return self._mended(self._oldest, count)

    def done(self, batch_id: str) -> None:
        """Delete a batch that ``oldest`` returned or would return; nothing happens where it is gone already.

        A disk that does not even take a deletion is no error here: the batch is deleted later and not returned again.
        """
        with contextlib.suppress(SpoolError), self._at_work("written"):
            if self._file is None:
                return
            row = self._held.pop(batch_id, None) or self._mended(self._head_named, batch_id)
            if row is not None:
                self._gone[row.sequence] = row._replace(body=b"")
                self._mended(self._settle)

    def size(self) -> tuple[int, int]:
        """Return how many events wait, and how many bytes they are. Any thread may ask; it does not wait."""
        return self._stats.events, self._stats.bytes

    def stats(self) -> SpoolStats:
        """Return what the spool holds and what became of the rest. Any thread may ask; it does not wait."""
        return self._stats

    def close(self) -> None:
        """Give up the file: deleted if it is empty, left for the next spool of this stem if not. It does not raise."""
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

    # -- what they do, under the lock ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _at_work(self, verb: str) -> Iterator[None]:
        """Hold the lock, turn SQLite's errors into ours, and note the new counts."""
        with self._lock:
            try:
                yield
            except (sqlite3.Error, OSError) as error:
                raise _translated(error, self._folder.stem, verb) from error
            finally:
                self._note()

    def _note(self) -> None:
        events, size, batches = self._stats[:3]
        # What a closed one left on the disk is what it last held.
        if (file := self._file) is not None:
            events = file.events - sum(row.events for row in self._gone.values())
            size = file.bytes - sum(row.size for row in self._gone.values())
            batches = file.batches - len(self._gone)
        self._stats = SpoolStats(
            events, size, batches, self._recovered, dict(self._dropped), self._folder.corrupt_files
        )

    def _mended(self, method: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Call a method; where it meets a damaged file, set that aside and call it once more on a new one."""
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
        """Yield what may be dropped to make room, oldest first, without bodies."""
        if self._full == "refuse":
            return
        held = {row.sequence for row in self._held.values()} | self._gone.keys()
        last = 0
        while rows := file.heads(ROWS_AT_ONCE, after=last):
            last = rows[-1].sequence
            yield from (row for row in rows if row.sequence not in held)

    def _append_in_room_of(self, idle: Iterator[Row], batch: Sequence[bytes], batch_id: str, now: float) -> bool:
        """Commit a batch to a full file, in place of what has to go for it; return False if nothing helps."""
        file = self._opened()
        size = sum(map(len, batch))
        wanted = size
        if file.has_quota_for(size):
            # The disk is full. A log that is written back is used again from its beginning and needs no more of it.
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
            # Twice as much every time: how many pages a row gives back is not known.
            wanted = max(2 * wanted, size)

    def _no_room(self, file: SpoolFile, batch: Sequence[bytes]) -> SpoolFullError:
        events, size = len(batch), sum(map(len, batch))
        if file.has_quota_for(size):
            why = "the disk is full: free some space"
        else:
            why = f"it may have {self._max_bytes:,} bytes: raise max_bytes, or see why the sink takes nothing"
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
            self._settle()
            file = self._opened()

    def _head_named(self, batch_id: str) -> Row | None:
        """Return a batch that was not read yet, looked for where the next ones to be read are."""
        for row in self._opened().heads(ROWS_AT_ONCE + len(self._gone)):
            if row.batch_id == batch_id and row.sequence not in self._gone:
                return row
        return None

    def _drop(self, row: Row, reason: str) -> None:
        self._held.pop(row.batch_id, None)
        self._gone[row.sequence] = row._replace(body=b"")
        self._dropped[reason] += row.events

    def _settle(self) -> None:
        """Delete what is gone, if the disk takes it; from a file that is empty then, go on to the next one."""
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

    # -- its files ----------------------------------------------------------------------------------------------------

    def _opened(self) -> SpoolFile:
        if self._file is None:
            other = _claims.setdefault(self._folder.stem, self)
            if other is not self:
                raise SpoolLockedError(
                    f"the spool {self._folder.stem} is in use by another publisher of this process; "
                    "what one leaves behind would go to the other's sink: give each its own path"
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
        """Take up another file in place of an empty one, or give the room of a large one back to the disk."""
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


def _check_options(max_bytes: object, full: object, max_age: Any, sync: object) -> None:
    """Refuse what is outside its values."""
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < MIN_BYTES:
        raise InvalidOptionError(
            f"max_bytes must be a whole number of at least {MIN_BYTES:,}, got {describe(max_bytes)}"
        )
    for name, value, values in (("full", full, get_args(Full)), ("sync", sync, get_args(Sync))):
        if value not in values:
            raise InvalidOptionError(f"{name} must be one of {', '.join(map(repr, values))}, got {describe(value)}")
    if max_age is not None and not (isinstance(max_age, int | float) and max_age > 0):
        raise InvalidOptionError(
            f"max_age must be a number of seconds greater than 0, or None; got {describe(max_age)}"
        )


def _translated(error: sqlite3.Error | OSError, stem: Path, verb: str) -> SpoolError:
    """Return our error for one of SQLite or the system."""
    hint = "its directory must exist, be writable and lie on a disk of this machine"
    if isinstance(error, sqlite3.Error) and code_of(error) == sqlite3.SQLITE_FULL:
        return SpoolFullError(f"the spool {stem} cannot be {verb}: the disk is full; free some space")
    return SpoolError(f"the spool {stem} cannot be {verb}: {error}; {hint}")


# -- fork -------------------------------------------------------------------------------------------------------------

_spools: weakref.WeakSet[Spool] = weakref.WeakSet()
# The spool that has a stem open in this process.
_claims: dict[Path, Spool] = {}
_fork_lock = threading.Lock()
_forking: list[Spool] = []


def _before_fork() -> None:
    _fork_lock.acquire()
    _forking.extend(_spools)
    for spool in _forking:
        spool._lock.acquire()


def _after_fork_in_parent() -> None:
    for spool in _forking:
        spool._lock.release()
    _forking.clear()
    _fork_lock.release()


def _after_fork_in_child() -> None:
    """Leave file and lock to the parent; a spool here starts anew, with a file of its own."""
    global _fork_lock
    _fork_lock = threading.Lock()
    _claims.clear()
    for spool in _forking:
        if spool._file is not None:
            spool._file.leak()
        spool._reset()
    _forking.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
