"""A sink in one SQLite file: an event counts as written when the transaction that holds it is committed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import sqlite3
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

__all__ = ["Contents", "Row", "SinkError", "SqliteSink", "checksum_of", "read_back"]

CREATE: Final = """
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    payload TEXT NOT NULL,
    published_at REAL NOT NULL
)
"""
COLUMNS: Final = "id, kind, name, payload, published_at"
INSERT: Final = f"INSERT INTO events ({COLUMNS}) VALUES "
PLACES: Final = "(?, ?, ?, ?, ?)"
# Five values a row: older SQLite takes 999 values in a statement.
ROWS_A_STATEMENT: Final = 150

Row: TypeAlias = tuple[int, str, str, str, float]


class SinkError(Exception):
    """The sink cannot be opened, or did not take an event; the text says why."""


class SqliteSink:
    """Writes rows to a table of events, in batches, from a thread of its own.

    What arrives while one batch is committed makes up the next. Belongs to the running loop.

    Args:
        path: the file; made if it is missing.

    Raises:
        SinkError: the file cannot be written, is something else, or holds events already.

    """

    def __init__(self, path: Path) -> None:
        self._loop = asyncio.get_running_loop()
        self._rows: list[Row] = []
        self._written: list[asyncio.Future[None]] = []
        self._is_writing = False
        try:
            # Used by the writing thread only, once it is set up here.
            self._connection = sqlite3.connect(path, check_same_thread=False)
            try:
                self._set_up(path)
            except BaseException:
                self._connection.close()
                raise
        except sqlite3.Error as error:
            raise SinkError(f"{path}: {error}") from error
        self._thread = ThreadPoolExecutor(1, "sink")

    def _set_up(self, path: Path) -> None:
        (mode,) = self._connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise SinkError(f"{path}: no write-ahead log is to be had there (journal mode {mode})")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute(CREATE)
        # The names of the columns are asked for, too: a table of events may be another program's.
        (count,) = self._connection.execute(f"SELECT count(*) FROM (SELECT {COLUMNS} FROM events)").fetchone()
        if count:
            raise SinkError(f"{path}: it holds events already ({count:,}); give the path of a new file")

    def append(self, row: Row) -> asyncio.Future[None]:
        """Put a row into the next batch; the future is done when that is committed, with a ``SinkError`` if it was not.

        A row whose future is cancelled before its batch is begun is not written.
        """
        written = self._loop.create_future()
        self._rows.append(row)
        self._written.append(written)
        if not self._is_writing:
            self._is_writing = True
            self._loop.call_soon(self._write)
        return written

    async def close(self) -> None:
        """Let the batch that is under way end, give up the rows that wait and close the file."""
        self._rows.clear()
        self._written.clear()
        await self._loop.run_in_executor(self._thread, self._connection.close)
        self._thread.shutdown()

    def _write(self) -> None:
        """Begin the next batch, if there is one."""
        written = self._written
        rows = [row for row, future in zip(self._rows, written, strict=True) if not future.done()]
        self._rows = []
        self._written = []
        self._is_writing = bool(rows)
        if rows:
            commit = self._loop.run_in_executor(self._thread, self._commit, rows)
            commit.add_done_callback(functools.partial(self._settle, written))

    def _commit(self, rows: list[Row]) -> None:
        """Write rows in one transaction; runs in the writing thread."""
        with self._connection:
            for start in range(0, len(rows), ROWS_A_STATEMENT):
                part = rows[start : start + ROWS_A_STATEMENT]
                # Not executemany: it lets go of the interpreter's lock for each row and, next to a busy loop, waits up
                # to 5 ms to get it back.
                self._connection.execute(
                    INSERT + ", ".join([PLACES] * len(part)), tuple(itertools.chain.from_iterable(part))
                )

    def _settle(self, written: Iterable[asyncio.Future[None]], commit: asyncio.Future[None]) -> None:
        """Tell those that wait how the commit ended and begin the next batch."""
        error = commit.exception()
        for future in written:
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                # One each: an error that many tasks raise collects the traceback of all.
                future.set_exception(SinkError(str(error)))
        self._write()


class Contents(NamedTuple):
    """What a sink holds.

    ``gaps`` are the runs of numbers that are missing, the first and the last of each; ``repeated`` and ``unexpected``
    count the rows whose number came before or was never given out.
    """

    gaps: list[tuple[int, int]]
    repeated: int
    unexpected: int
    checksum: int


def checksum_of(number: int, payload: str) -> int:
    """Return the share of one event in a checksum, which is the sum over all events, in any order."""
    return zlib.crc32(payload.encode(), number)


def read_back(path: Path, expected: int) -> Contents:
    """Read all events of a closed sink, which should hold those from 1 to ``expected``, each once.

    Raises:
        SinkError: the file cannot be read.

    """
    gaps = []
    repeated = unexpected = last = checksum = 0
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            for number, payload in connection.execute("SELECT id, payload FROM events ORDER BY id"):
                checksum += checksum_of(number, payload)
                if not 0 < number <= expected:
                    unexpected += 1
                elif number == last:
                    repeated += 1
                else:
                    if number > last + 1:
                        gaps.append((last + 1, number - 1))
                    last = number
    except sqlite3.Error as error:
        raise SinkError(f"{path}: {error}") from error
    if last < expected:
        gaps.append((last + 1, expected))
    return Contents(gaps, repeated, unexpected, checksum)
