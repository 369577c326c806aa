"""One file of a spool: batches in an SQLite database that belongs to the process that has it open.

A row holds a batch, not an event: beside a busy loop every row costs a hand-over of the GIL. The body of a row is a
table of the lengths of the events, then the events. It has a checksum, because SQLite has none for its pages.

The only connection locks the file while it is open (``locking_mode=EXCLUSIVE``). No second process reads the file, no
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
from typing import Final, NamedTuple

from bgtasks.events.info import Sync

__all__ = ["DAMAGED", "DamagedBatchError", "Row", "SpoolFile", "code_of", "decode", "encode", "set_aside"]

PAGE_SIZE: Final = 8192
# The log is written back into the file whenever it has grown to this number of bytes.
LOG_BYTES: Final = 4 << 20
# "bgsp": distinguishes a spool from the database of another program.
APPLICATION_ID: Final = 0x62677370
FORMAT: Final = 1

# SQLite's codes for a damaged file.
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
    """The body of a row differs from what was written."""


class Row(NamedTuple):
    """A batch as stored in the file; ``created`` is a Unix time, ``size`` the bytes of the events alone."""

    sequence: int
    batch_id: str
    events: int
    size: int
    created: float
    checksum: int
    body: bytes


def encode(batch: Sequence[bytes]) -> bytes:
    """Return a batch as one body: the lengths of its events as 32-bit little-endian numbers, then the events."""
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
        create: create the file, which must not exist; if False, it must exist.
        sync: ``"full"`` waits until each commit is on the disk, ``"normal"`` leaves that to the system.
        max_bytes: the maximum size of the file.

    Raises:
        sqlite3.Error: the file cannot be opened, is locked by another process (``SQLITE_BUSY``), is damaged, or is no
            spool (``SQLITE_CORRUPT``, ``SQLITE_NOTADB``).

    """

    def __init__(self, path: Path, *, create: bool, sync: Sync, max_bytes: int) -> None:
        self.path = path
        self.events = 0
        self.bytes = 0
        self.batches = 0
        mode = "rwc" if create else "rw"
        # The caller's lock keeps threads apart; isolation_level=None because transactions are explicit here.
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
        # Before the first read, which takes the lock: then the log's index stays in this process's memory.
        execute("PRAGMA locking_mode = EXCLUSIVE")
        (journal,) = execute("PRAGMA journal_mode = WAL").fetchone()
        if journal != "wal":
            raise sqlite3.OperationalError(f"a write-ahead log is not possible there (journal mode {journal})")
        execute(f"PRAGMA synchronous = {sync}")
        if sync == "full":
            # For macOS, where fsync alone leaves data in the drive's cache.
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
        """Commit rows of another file, after the existing ones."""
        self._insert([row[1:] for row in rows], ())

    def replace(self, old: Sequence[Row], batch: Sequence[bytes], batch_id: str, created: float) -> None:
        """Delete rows and commit a batch in their place, both or neither; the rows need no body."""
        body = encode(batch)
        size = len(body) - 4 * len(batch)
        self._insert([(batch_id, len(batch), size, created, zlib.crc32(body), body)], old)

    def _insert(self, new: Sequence[tuple[str, int, int, float, int, bytes]], old: Sequence[Row]) -> None:
        execute = self._connection.execute
        if len(new) == 1 and not old:
            # A single statement is a transaction: one hand-over of the GIL instead of three.
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
        """Return the first rows, except those whose sequence is in ``without``."""
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
        """Return whether ``max_bytes`` leaves room for a batch of ``size`` bytes, whatever space the disk has."""
        free = self._number("max_page_count") - self._number("page_count") + self._number("freelist_count")
        # One page more for the unused rest of the last one, and one for the row itself.
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
            # On a full disk, SQLite has often rolled it back already.
            if self._connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Close the file; a log that cannot be written back stays for the next opening."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()

    def remove(self) -> None:
        """Delete the file and close it, in this order: the lock must hold until no process can find the file."""
        # Windows deletes no open file; there the next process finds it empty.
        with contextlib.suppress(OSError):
            self.path.unlink()
        self.close()
        if not self.path.exists():
            # SQLite does not delete the log of a deleted file.
            Path(f"{self.path}-wal").unlink(missing_ok=True)

    def set_aside(self) -> None:
        """Close the file and rename it, with its log, to a name that no spool opens."""
        self.close()
        set_aside(self.path)

    def leak(self) -> None:
        """Never close the connection, in the child of a fork: closing it would write to, and unlink, the parent's log.

        The reference that is added here is never released, so that not even the interpreter's exit closes it.
        """
        import ctypes

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))


def code_of(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code, without the higher bits, which distinguish variants."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def set_aside(path: Path) -> None:
    """Rename a closed file and its log to names that no spool opens."""
    aside = path.with_suffix(".corrupt")
    for ending in ("", "-wal"):
        with contextlib.suppress(OSError):
            os.replace(f"{path}{ending}", f"{aside}{ending}")
