"""One file of a spool: batches in an SQLite database that belongs to the process that has it open.

A row holds a batch, not an event: beside a busy loop every row costs a hand-over of the GIL. The rows are numbered
without gaps and deleted from the first one on. So the numbers of the first row and of the next one, which the process
knows, say what every query must return; anything else is damage. SQLite itself has no checksums for its pages.

The only connection locks the file while it is open (``locking_mode=EXCLUSIVE``). No second process reads the file, no
shared memory is needed, and SQLite's WAL-reset race, which takes two connections, cannot happen.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final, Self

from bgtasks.events.info import SpoolSync
from bgtasks.events.spool._clock import BOOT, AgeClock, uptime
from bgtasks.events.spool._row import DamagedRowError, Row, checked, make_row, renumbered

__all__ = ["PAGE_SIZE", "DamagedFileError", "FullError", "SpoolFile", "code_of", "is_damage", "log_of", "set_aside"]

PAGE_SIZE: Final = 8192
# The log is written back into the file whenever it has grown to this number of bytes.
LOG_BYTES: Final = 4 << 20
# "bgsp": distinguishes a spool from the database of another program.
APPLICATION_ID: Final = 0x62677370
FORMAT: Final = 2

# SQLite's codes for what is not the fault of a file: its lock, the disk, memory, permissions.
CIRCUMSTANCES: Final = (
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_ABORT,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_MISUSE,
    sqlite3.SQLITE_NOLFS,
    sqlite3.SQLITE_AUTH,
)
# Extended codes of an input error that stays: a sector that cannot be read, a file that ends too early.
UNREADABLE: Final = (
    sqlite3.SQLITE_IOERR_READ,
    sqlite3.SQLITE_IOERR_SHORT_READ,
    sqlite3.SQLITE_IOERR | (32 << 8),  # SQLITE_IOERR_DATA
    sqlite3.SQLITE_IOERR | (33 << 8),  # SQLITE_IOERR_CORRUPTFS
)

CREATE: Final = """
CREATE TABLE batches (
    sequence INTEGER PRIMARY KEY,
    floor INTEGER NOT NULL,
    position INTEGER NOT NULL,
    batch_id TEXT NOT NULL,
    events INTEGER NOT NULL,
    size INTEGER NOT NULL,
    created REAL NOT NULL,
    uptime REAL NOT NULL,
    boot INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    head INTEGER NOT NULL,
    body BLOB NOT NULL
)
"""
COLUMNS: Final = ", ".join(Row._fields)
INSERT: Final = f"INSERT INTO batches ({COLUMNS}) VALUES ({', '.join('?' * len(Row._fields))})"
SELECT: Final = f"SELECT {COLUMNS} FROM batches WHERE sequence >= ? ORDER BY sequence LIMIT ?"
SELECT_HEADS: Final = SELECT.replace("body", "x''")
DELETE: Final = "DELETE FROM batches WHERE sequence < ?"


class DamagedFileError(sqlite3.DatabaseError):
    """The file does not hold what was written to it."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


class FullError(sqlite3.OperationalError):
    """There is no room for a file, on the disk or in the quota."""

    sqlite_errorcode = sqlite3.SQLITE_FULL


class SpoolFile:
    """A file of batches, oldest first. Every method may raise ``sqlite3.Error``; none leaves half a change.

    ``set_up`` must be called first. ``is_sealed`` is set on a file to which nothing is appended any more.

    Args:
        path: the file.
        create: create the file; if False, it must exist.
        sync: with ``"full"`` each commit waits until it is on the disk.

    Raises:
        sqlite3.Error: the file cannot be opened.

    """

    def __init__(self, path: Path, *, create: bool, sync: SpoolSync) -> None:
        self.path = path
        self.log = log_of(path)
        self.is_sealed = False
        self.clock = AgeClock()
        # The first row that is neither deleted nor gone, and the first that is not deleted.
        self.first = self._undeleted = 0
        self._next = 0
        self._position = 0
        # Sums over the rows that are not gone.
        self.events = 0
        self.bytes = 0
        # Sent or dropped, but not deleted: a full disk may refuse the deletion, and rows are deleted in order.
        self._gone: set[int] = set()
        # An upper bound of the size.
        self._most_pages = 0
        self._sync: SpoolSync = sync
        mode = "rwc" if create else "rw"
        # The caller's lock keeps threads apart; isolation_level=None because transactions are explicit here.
        self._connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=0,
            isolation_level=None,
            check_same_thread=False,
        )
        # Bytes: a damaged text must not raise an error where it is read.
        self._connection.text_factory = bytes

    @property
    def batches(self) -> int:
        """The number of rows that are not gone."""
        return self._next - self._undeleted - len(self._gone)

    # -- opening --------------------------------------------------------------------------------------------------

    @classmethod
    def make(cls, path: Path, *, sync: SpoolSync) -> Self:
        """Make a file that does not exist, and lock it.

        Raises:
            sqlite3.Error: as for ``set_up``. No file is left.
            OSError: the file cannot be made.

        """
        content = _template()
        if content is not None:
            # Written as a whole: SQLite itself would wait for the disk several times.
            _write(path, content, sync)
        file = cls(path, create=content is None, sync=sync)
        try:
            file.set_up()
        except BaseException:
            file.remove()
            raise
        return file

    def set_up(self, most_downtime: float = 0.0) -> None:
        """Lock the file, make its table if it is new, and check every row in it except the bodies.

        Args:
            most_downtime: see ``AgeClock``.

        Raises:
            sqlite3.Error: another process has the file open (``SQLITE_BUSY``), or an error for which ``is_damage`` is
                true: it is damaged, or no spool.

        """
        execute = self._connection.execute
        execute(f"PRAGMA page_size = {PAGE_SIZE}")
        # Before the first read, which takes the lock: then the log's index stays in this process's memory.
        execute("PRAGMA locking_mode = EXCLUSIVE")
        (journal,) = execute("PRAGMA journal_mode = WAL").fetchone()
        if journal != b"wal":
            error = sqlite3.OperationalError(f"a write-ahead log is not possible there (journal mode {journal!r})")
            error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
            raise error
        execute(f"PRAGMA synchronous = {'full' if self._sync == 'full' else 'normal'}")
        if self._sync == "full":
            # For macOS, where fsync alone leaves data in the drive's cache.
            execute("PRAGMA fullfsync = 1")
        execute(f"PRAGMA wal_autocheckpoint = {LOG_BYTES // PAGE_SIZE}")
        execute(f"PRAGMA journal_size_limit = {2 * LOG_BYTES}")
        execute("BEGIN EXCLUSIVE")
        (tables,) = execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables:
            _define(self._connection)
        execute("COMMIT")
        found = tuple(map(self._number, ("application_id", "user_version", "page_size")))
        if found != (APPLICATION_ID, FORMAT, PAGE_SIZE):
            raise DamagedFileError(f"it is a database of another kind or version {found}")
        if tables:
            self._load(most_downtime)

    def _load(self, most_downtime: float) -> None:
        row: Row | None = None
        names: set[str] = set()
        for values in self._connection.execute(SELECT_HEADS, (-(1 << 63), -1)):
            following = self._expected(values)
            if row is None:
                self.first = self._undeleted = following.sequence
            elif (following.sequence, following.position) != (row.sequence + 1, row.position + row.events):
                raise DamagedFileError(f"rows are missing behind number {row.sequence}")
            row = following
            if row.batch_id in names:
                raise DamagedFileError(f"the batch {row.batch_id} is there twice")
            names.add(row.batch_id)
            self.events += row.events
            self.bytes += row.size
        if row is not None:
            self._next = row.sequence + 1
            self._position = row.position + row.events
            self.clock = AgeClock(row, most_downtime)

    @staticmethod
    def _expected(values: Sequence[Any]) -> Row:
        try:
            return checked(values)
        except DamagedRowError as error:
            raise DamagedFileError(f"a row in it is damaged: {error}") from error

    # -- batches --------------------------------------------------------------------------------------------------

    def append(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Commit a batch."""
        row = make_row(batch, batch_id, self._next, self.first, self._position, time.time(), uptime(), BOOT)
        # A single statement is a transaction: one hand-over of the GIL instead of three.
        self._connection.execute(INSERT, row)
        self._count(row)
        self._most_pages += len(row.body) // PAGE_SIZE + 3

    def append_rows(self, rows: Iterable[Row], most_downtime: float) -> None:
        """Commit rows of another file as the first ones of this one, all or none."""
        execute = self._connection.execute
        with self._transaction():
            position = 0
            for sequence, row in enumerate(rows):
                execute(INSERT, renumbered(row, sequence, position))
                position += row.events
        self._load(most_downtime)

    def _count(self, row: Row) -> None:
        self._next += 1
        self._position += row.events
        self.events += row.events
        self.bytes += row.size

    def oldest(self, count: int) -> list[Row]:
        """Return the first rows that are not gone, whose bodies are not checked yet."""
        return self._read(SELECT, count)

    def heads(self, count: int) -> list[Row]:
        """Return the same rows without their bodies."""
        return self._read(SELECT_HEADS, count)

    def _read(self, select: str, count: int) -> list[Row]:
        count = min(count, self.batches)
        if not self._gone:
            return self._span(select, self.first, count)
        numbers = (number for number in range(self.first, self._next) if number not in self._gone)
        return [row for number in islice(numbers, count) for row in self._span(select, number, 1)]

    def _span(self, select: str, first: int, count: int) -> list[Row]:
        if not count:
            return []
        rows = [self._expected(values) for values in self._connection.execute(select, (first, count))]
        if len(rows) != count or any(row.sequence != number for number, row in enumerate(rows, first)):
            raise DamagedFileError(f"rows are missing among numbers {first} to {first + count - 1}")
        return rows

    def has(self, sequence: int) -> bool:
        """Return whether a row of this number was written and is not gone."""
        return self.first <= sequence < self._next and sequence not in self._gone

    def discard(self, row: Row) -> None:
        """Mark a row as gone, which is never read again; ``clean_up`` deletes it."""
        self._gone.add(row.sequence)
        self.events -= row.events
        self.bytes -= row.size
        while self.first in self._gone:
            self.first += 1

    def clean_up(self) -> None:
        """Delete the rows that are gone, except those behind one that is not."""
        if self.first == self._undeleted:
            return
        try:
            deleted = self._connection.execute(DELETE, (self.first,)).rowcount
        except sqlite3.Error as error:
            if code_of(error) != sqlite3.SQLITE_FULL:
                raise
            self.write_back()
            deleted = self._connection.execute(DELETE, (self.first,)).rowcount
        expected = self.first - self._undeleted
        self._gone.difference_update(range(self._undeleted, self.first))
        self._undeleted = self.first
        if deleted != expected:
            raise DamagedFileError(f"{deleted} rows were deleted where {expected} had been written")

    # -- size -----------------------------------------------------------------------------------------------------

    def write_back(self) -> None:
        """Write the log back into the file, so that the next commit needs no room for a longer log."""
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def seal(self) -> None:
        """Have nothing appended any more, and release the memory and the log of the file as far as possible."""
        self.is_sealed = True
        with contextlib.suppress(sqlite3.Error):
            self.write_back()
            self._connection.execute("PRAGMA shrink_memory")

    def has_reached(self, pages: int) -> bool:
        """Return whether the file has at least this number of pages."""
        if self._most_pages < pages:
            return False
        self._most_pages = self.pages()
        return self._most_pages >= pages

    def pages(self) -> int:
        """Return the size of the file in pages, free ones included."""
        return self._number("page_count")

    def limit(self, pages: int) -> None:
        """Set the maximum size of the file in pages."""
        self._connection.execute(f"PRAGMA max_page_count = {max(pages, 1)}").fetchone()

    def has_quota_for(self, pages: int) -> bool:
        """Return whether the limit leaves room for a number of pages, whatever space the disk has."""
        free = self._number("max_page_count") - self._number("page_count") + self._number("freelist_count")
        return free >= pages

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

    # -- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the file; a log that cannot be written back stays for the next opening."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()

    def remove(self) -> None:
        """Delete the file and close it, in this order: the lock must hold until no process can find the file."""
        # Windows deletes no open file; there the next process finds it empty.
        with contextlib.suppress(OSError):
            self.path.unlink()
        with contextlib.suppress(sqlite3.Error):
            # The log is written back by closing; it need not reach the disk.
            self._connection.execute("PRAGMA synchronous = off")
        self.close()
        if not self.path.exists():
            # SQLite does not delete the log of a deleted file.
            self.log.unlink(missing_ok=True)

    def leak(self) -> None:
        """Never close the connection, in the child of a fork: closing it would write to, and unlink, the parent's log.

        The reference that is added here is never released, so that not even the interpreter's exit closes it.
        """
        import ctypes

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))


def _define(connection: sqlite3.Connection) -> None:
    """Define the table of a new file."""
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {FORMAT}")
    connection.execute(CREATE)


@functools.cache
def _template() -> bytes | None:
    """Return the content of a new file, None if this SQLite cannot tell it."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
        _define(connection)
        if not hasattr(connection, "serialize"):
            return None
        content = bytearray(connection.serialize())
    # The versions of a file with a write-ahead log.
    content[18:20] = b"\2\2"
    return bytes(content)


def _write(path: Path, content: bytes, sync: SpoolSync) -> None:
    """Write a new file, on the disk unless that is left to the system."""
    try:
        with path.open("xb", buffering=0) as file:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if sync != "normal":
                os.fsync(file.fileno())
    except OSError as error:
        if error.errno != errno.EEXIST:
            path.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise FullError("database or disk is full") from error


def log_of(path: Path) -> Path:
    """Return the write-ahead log of a file."""
    return Path(f"{path}-wal")


def code_of(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code, without the higher bits, which distinguish variants."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def is_damage(error: sqlite3.Error) -> bool:
    """Return whether an error says that the file is damaged, rather than the disk full or the file locked."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    is_mistake = isinstance(error, (sqlite3.ProgrammingError, sqlite3.InterfaceError))
    return not is_mistake and (code & 0xFF not in CIRCUMSTANCES or code in UNREADABLE)


def remove_left_log(log: Path) -> None:
    """Delete a log if its file is gone: the process was killed while it deleted both."""
    path = log.with_name(log.name.removesuffix("-wal"))
    # In this order: a file that is set aside has one name or the other, and its log still the old one for a moment.
    if not path.exists() and not _aside(path).exists():
        # It may belong to another user. It harms nothing.
        with contextlib.suppress(OSError):
            log.unlink()


def _aside(path: Path) -> Path:
    return path.with_suffix(".corrupt")


def set_aside(path: Path) -> Path:
    """Rename a closed file and its log to names that no spool opens; return the name of the file."""
    aside = _aside(path)
    for source, target in ((path, aside), (log_of(path), log_of(aside))):
        with contextlib.suppress(OSError):
            os.replace(source, target)
    return aside
