"""One file of a spool: batches in an SQLite database that belongs to whoever has it open.

A row holds a batch, not an event: next to a busy loop every row costs a hand-over of the interpreter's lock. Its body
is a table of the lengths of the events, then the events; with a checksum, since SQLite has none for its pages.

One connection, locked for as long as it is open (``locking_mode=EXCLUSIVE``): no second process reads the file, no
shared memory is needed, and SQLite's WAL-reset race, which takes two connections, cannot happen.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

__all__ = ["DAMAGED", "DamagedBatchError", "Row", "SpoolFile", "Sync", "code_of", "decode", "encode", "set_aside"]

Sync: TypeAlias = Literal["normal", "full"]

PAGE_SIZE: Final = 8192
# The log is written back into the file whenever it has grown to so many bytes.
LOG_BYTES: Final = 4 << 20
# "bgsp": tells a spool from the database of another program.
APPLICATION_ID: Final = 0x62677370
FORMAT: Final = 1

# What SQLite says of a file that is no good any more.
DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

CREATE: Final = """
CREATE TABLE batches (
    sequence INTEGER PRIMARY KEY,
    batch_id TEXT NOT NULL,
    events INTEGER NOT NULL,
    size INTEGER NOT NULL,
    created REAL NOT NULL,
    checksum INTEGER NOT NULL,
    body BLOB NOT NULL
)
"""
INSERT: Final = "INSERT INTO batches (batch_id, events, size, created, checksum, body) VALUES (?, ?, ?, ?, ?, ?)"
SELECT: Final = "SELECT sequence, batch_id, events, size, created, checksum, body FROM batches "
SELECT_HEADS: Final = SELECT.replace("body", "x''") + "WHERE sequence > ? ORDER BY sequence LIMIT ?"


class DamagedBatchError(Exception):
    """The body of a row is not what was written."""


class Row(NamedTuple):
    """A batch as it stands in the file; ``created`` is a Unix time, ``size`` the bytes of the events alone."""

    sequence: int
    batch_id: str
    events: int
    size: int
    created: float
    checksum: int
    body: bytes


def encode(batch: Sequence[bytes]) -> bytes:
    """Return a batch in one piece: the lengths of its events as 32-bit little-endian numbers, then the events."""
    return struct.pack(f"<{len(batch)}I", *map(len, batch)) + b"".join(batch)


def decode(row: Row) -> list[bytes]:
    """Return the events of a row.

    Raises:
        DamagedBatchError: checksum or lengths do not agree with the body.

    """
    body = row.body
    if zlib.crc32(body) != row.checksum or len(body) != 4 * row.events + row.size:
        raise DamagedBatchError(row.batch_id)
    ends = accumulate(struct.unpack_from(f"<{row.events}I", body), initial=4 * row.events)
    return [body[start:end] for start, end in pairwise(ends)]


class SpoolFile:
    """An open file of batches, oldest first. Every method may raise ``sqlite3.Error``; none leaves half a change.

    Args:
        path: the file.
        create: make the file, which must not exist; otherwise it must.
        sync: ``"full"`` has each commit on the disk before it counts, ``"normal"`` leaves that to the system.
        max_bytes: the size the file may grow to.

    Raises:
        sqlite3.Error: the file cannot be opened or is locked by another process (``SQLITE_BUSY``), is damaged or is
            something else (``SQLITE_CORRUPT``, ``SQLITE_NOTADB``).

    """

    def __init__(self, path: Path, *, create: bool, sync: Sync, max_bytes: int) -> None:
        self.path = path
        self.events = 0
        self.bytes = 0
        self.batches = 0
        mode = "rwc" if create else "rw"
        # The caller's lock keeps threads apart; isolation_level=None because transactions are begun here by hand.
        self._connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=0,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            self._set_up(create, sync, max_bytes)
        except BaseException:
            self.close()
            raise

    def _set_up(self, create: bool, sync: Sync, max_bytes: int) -> None:
        execute = self._connection.execute
        execute(f"PRAGMA page_size = {PAGE_SIZE}")
        # Before the file is first read: with the lock taken there, the log's index stays in this process's memory.
        execute("PRAGMA locking_mode = EXCLUSIVE")
        (journal,) = execute("PRAGMA journal_mode = WAL").fetchone()
        if journal != "wal":
            raise sqlite3.OperationalError(f"no write-ahead log is to be had there (journal mode {journal})")
        execute(f"PRAGMA synchronous = {sync}")
        if sync == "full":
            # Only macOS needs it, where fsync alone leaves data in the drive's cache.
            execute("PRAGMA fullfsync = 1")
        execute(f"PRAGMA wal_autocheckpoint = {LOG_BYTES // PAGE_SIZE}")
        execute(f"PRAGMA journal_size_limit = {2 * LOG_BYTES}")
        execute("BEGIN EXCLUSIVE")
        (tables,) = execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables:
            execute(f"PRAGMA application_id = {APPLICATION_ID}")
            execute(f"PRAGMA user_version = {FORMAT}")
            execute(CREATE)
        execute("COMMIT")
        found = tuple(map(self._number, ("application_id", "user_version", "page_size")))
        if found != (APPLICATION_ID, FORMAT, PAGE_SIZE):
            error = sqlite3.DatabaseError(f"it is a database of another kind or version {found}")
            error.sqlite_errorcode = sqlite3.SQLITE_NOTADB
            raise error
        execute(f"PRAGMA max_page_count = {max_bytes // PAGE_SIZE}")
        counts = execute("SELECT count(*), total(events), total(size) FROM batches").fetchone()
        self.batches, self.events, self.bytes = map(int, counts)

    def append(self, batch: Sequence[bytes], batch_id: str, created: float) -> None:
        """Commit a batch."""
        body = encode(batch)
        size = len(body) - 4 * len(batch)
        self._insert([(batch_id, len(batch), size, created, zlib.crc32(body), body)], ())

    def append_rows(self, rows: Iterable[Row]) -> None:
        """Commit rows of another file, behind what is here."""
        self._insert([row[1:] for row in rows], ())

    def replace(self, old: Sequence[Row], batch: Sequence[bytes], batch_id: str, created: float) -> None:
        """Delete rows and commit a batch in their room, both or neither; the rows need no body."""
        body = encode(batch)
        size = len(body) - 4 * len(batch)
        self._insert([(batch_id, len(batch), size, created, zlib.crc32(body), body)], old)

    def _insert(self, new: Sequence[tuple[str, int, int, float, int, bytes]], old: Sequence[Row]) -> None:
        execute = self._connection.execute
        if len(new) == 1 and not old:
            # A statement is a transaction: one step, and one hand-over of the interpreter's lock, instead of three.
            execute(INSERT, new[0])
        else:
            with self._transaction():
                for row in old:
                    execute("DELETE FROM batches WHERE sequence = ?", (row.sequence,))
                for values in new:
                    execute(INSERT, values)
        self.batches += len(new) - len(old)
        self.events += sum(values[1] for values in new) - sum(row.events for row in old)
        self.bytes += sum(values[2] for values in new) - sum(row.size for row in old)

    def oldest(self, count: int, without: AbstractSet[int] = frozenset()) -> list[Row]:
        """Return the first rows, those whose sequence is in ``without`` left out."""
        if not without:
            return [Row(*values) for values in self._connection.execute(SELECT + "ORDER BY sequence LIMIT ?", (count,))]
        rows = [row for row in self.heads(count + len(without)) if row.sequence not in without]
        select = SELECT + "WHERE sequence = ?"
        return [Row(*self._connection.execute(select, (row.sequence,)).fetchone()) for row in rows[:count]]

    def heads(self, count: int, *, after: int = 0) -> list[Row]:
        """Return the first rows whose sequence is greater than ``after``, without their bodies."""
        return [Row(*values) for values in self._connection.execute(SELECT_HEADS, (after, count))]

    def delete(self, rows: Sequence[Row]) -> None:
        """Delete rows; they need no body."""
        if len(rows) == 1:
            self._connection.execute("DELETE FROM batches WHERE sequence = ?", (rows[0].sequence,))
            self.batches -= 1
            self.events -= rows[0].events
            self.bytes -= rows[0].size
        else:
            self._insert((), rows)

    def write_back(self) -> None:
        """Write the log back into the file, so that the next commit needs no room for a longer log."""
        self._connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()

    def pages(self) -> int:
        """Return the size of the file in pages, free ones included."""
        return self._number("page_count")

    def has_quota_for(self, size: int) -> bool:
        """Return whether ``max_bytes`` leaves room for a batch of so many bytes, whatever the disk has."""
        free = self._number("max_page_count") - self._number("page_count") + self._number("freelist_count")
        # One page more for the rest that a row leaves in its last one, and one for the row itself.
        return free >= size // PAGE_SIZE + 2

    def _number(self, name: str) -> int:
        (value,) = self._connection.execute(f"PRAGMA {name}").fetchone()
        return int(value)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        execute = self._connection.execute
        execute("BEGIN IMMEDIATE")
        try:
            yield
            execute("COMMIT")
        except BaseException:
            # A full disk has often rolled it back already.
            if self._connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Close the file; what could not be written back stays in its log for the next one to open it."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()

    def remove(self) -> None:
        """Delete the file and close it, in this order: the lock must hold until nobody can find it any more."""
        # Windows deletes no open file; there the next one finds it empty.
        with contextlib.suppress(OSError):
            self.path.unlink()
        self.close()
        if not self.path.exists():
            # SQLite leaves the log of a file that is gone.
            Path(f"{self.path}-wal").unlink(missing_ok=True)

    def set_aside(self) -> None:
        """Close the file and rename it, with its log, to what no spool will open."""
        self.close()
        set_aside(self.path)

    def leak(self) -> None:
        """Never close the connection, for the child of a fork: closing it would write to, and unlink, the parent's log.

        The reference that is taken here is never given back, so that not even the end of the interpreter closes it.
        """
        import ctypes

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))


def code_of(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code; the higher bits tell variants apart."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def set_aside(path: Path) -> None:
    """Rename a closed file and its log to what no spool will open."""
    aside = path.with_suffix(".corrupt")
    for ending in ("", "-wal"):
        with contextlib.suppress(OSError):
            os.replace(f"{path}{ending}", f"{aside}{ending}")
