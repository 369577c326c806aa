"""A sink for a table of an SQLite file: a row per event, or a row per batch."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import ClassVar, Final, Literal, TypeAlias, get_args

from bgtasks._checks import check_choice
from bgtasks.errors import InvalidOptionError, describe
from bgtasks.events._thread import WorkerThread
from bgtasks.events.errors import Reject, Retry, SinkError
from bgtasks.events.info import Sync
from bgtasks.events.sink import Sink
from bgtasks.events.sinks._inherited import keep_inherited

__all__ = ["Rows", "SqliteSink", "Sync"]

Rows: TypeAlias = Literal["event", "batch"]

# Two values per row: older SQLite allows 999 values in a statement.
ROWS_PER_STATEMENT: Final = 499
# Seconds that the thread waits while another program writes to the file; then the batch is tried again.
BUSY_TIMEOUT: Final = 1.0

BATCHES: Final = """
CREATE TABLE IF NOT EXISTS "{0}_batches" (
    batch INTEGER PRIMARY KEY,
    batch_id TEXT NOT NULL UNIQUE,
    written_at REAL NOT NULL
)
"""
CREATE: Final[dict[Rows, str]] = {
    "event": """
CREATE TABLE IF NOT EXISTS "{0}" (
    id INTEGER PRIMARY KEY,
    batch INTEGER NOT NULL,
    event TEXT NOT NULL
)
""",
    "batch": """
CREATE TABLE IF NOT EXISTS "{0}" (
    batch INTEGER PRIMARY KEY,
    events TEXT NOT NULL
)
""",
}
COLUMNS: Final[dict[Rows, str]] = {"event": "id, batch, event", "batch": "batch, events"}


class SqliteSink(Sink):
    """Writes to an SQLite file, one transaction per batch, in a thread.

    With ``rows="event"``, ``TABLE`` has the columns ``id`` (in the order of the events), ``batch`` and ``event`` (the
    JSON text), for ``SELECT event ->> '$.name' FROM events``. With ``rows="batch"`` it has ``batch`` and ``events``, a
    JSON array, for ``SELECT value FROM events, json_each(events.events)``. That is twice as fast, and more beside a
    busy loop. ``TABLE_batches`` has the id of each batch, so a batch that is written again, after a crash for example,
    is there once; and the Unix time at which it was written. No index is made: an index on a field at least halves the
    speed. An event of bytes that are no JSON is stored as a JSON string, so that these queries work; bytes that are no
    UTF-8 are rejected.

    The file is in WAL mode; other programs may read it meanwhile.

    Args:
        path: the file, in an existing directory; created if it is missing.
        table: the name of the table.
        rows: ``"event"`` or ``"batch"``, the same each time for one table.
        sync: with ``"normal"``, committed batches survive a crash of the process; with ``"full"``, one of the machine.

    Raises:
        InvalidOptionError: an option is outside its values.

    Example:
        >>> publisher = Publisher(SqliteSink("events.db"))

    """

    # One thread.
    max_inflight: ClassVar[int | None] = 1

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        table: str = "events",
        rows: Rows = "event",
        sync: Sync = "normal",
    ) -> None:
        check_choice("rows", rows, get_args(Rows))
        check_choice("sync", sync, get_args(Sync))
        if not (isinstance(table, str) and table.isascii() and table.isidentifier()):
            raise InvalidOptionError(f"table must be a name of ASCII letters, digits and _, got {describe(table)}")
        self._thread = WorkerThread("SQLite sink")
        self._skip = _skipper()
        self._path = Path(os.path.abspath(os.fspath(path)))
        self._table = table
        self._rows: Rows = rows
        self._sync = sync
        self._connection: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Open the file, and create missing tables."""
        await self._thread.run(self._connect_file)

    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Write a batch in a transaction, unless a batch of that id was written before."""
        await self._thread.run(self._write_batch, batch, batch_id)

    async def close(self) -> None:
        """Close the file and end the thread."""
        try:
            await self._thread.run(self._close_file)
        finally:
            self._thread.stop()

    # -- in the thread --------------------------------------------------------------------------------------------

    def _connect_file(self) -> None:
        # Only a fork or a lost loop leaves a connection here; closing it would release the locks of its owner.
        keep_inherited(self._connection)
        with self._named_errors():
            connection = sqlite3.connect(
                self._path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
            )
            try:
                self._set_up_file(connection)
            except BaseException:
                connection.close()
                raise
        self._connection = connection

    def _set_up_file(self, connection: sqlite3.Connection) -> None:
        execute = connection.execute
        (mode,) = execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise SinkError(f"{self._path}: a write-ahead log is not possible there (journal mode {mode})")
        execute(f"PRAGMA synchronous = {self._sync}")
        with _transaction(connection):
            execute(BATCHES.format(self._table))
            execute(CREATE[self._rows].format(self._table))
        # A table of that name may belong to another program, or have the other kind of rows.
        execute(f'SELECT {COLUMNS[self._rows]} FROM "{self._table}" LIMIT 0')

    def _write_batch(self, batch: Sequence[bytes], batch_id: str) -> None:
        texts, bad = _decoded(batch)
        connection = self._connection
        assert connection is not None
        with self._named_errors(), _transaction(connection):
            batches = f'"{self._table}_batches"'
            noted = connection.execute(
                f"INSERT OR IGNORE INTO {batches} (batch_id, written_at) VALUES (?, ?)", (batch_id, time.time())
            )
            if noted.rowcount and texts:
                self._insert_rows(connection, noted.lastrowid, _as_json(texts, self._skip))
        if bad:
            raise Reject(bad, "it is no UTF-8 text")

    def _insert_rows(self, connection: sqlite3.Connection, number: int | None, texts: list[str]) -> None:
        if self._rows == "batch":
            row = (number, f"[{','.join(texts)}]")
            connection.execute(f'INSERT INTO "{self._table}" (batch, events) VALUES (?, ?)', row)
            return
        insert = f'INSERT INTO "{self._table}" (batch, event) VALUES '
        for start in range(0, len(texts), ROWS_PER_STATEMENT):
            part = texts[start : start + ROWS_PER_STATEMENT]
            # Not executemany: it releases the GIL for each row, and waits for it beside a busy loop.
            values = ", ".join(["(?, ?)"] * len(part))
            connection.execute(insert + values, tuple(chain.from_iterable((number, text) for text in part)))

    def _close_file(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            text = f"{self._path}: {error}"
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                raise Retry(reason=text) from error
            raise SinkError(text) from error


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # On a full disk, SQLite has often rolled it back already.
        if connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        raise


def _skipper() -> Callable[[str], object]:
    """Return a function that raises an error for a text that is no JSON, or perhaps none."""
    try:
        import msgspec
    except ModuleNotFoundError:
        # A sink without a publisher needs no extra.
        return _load
    # Skips through the text, without making objects of it.
    return msgspec.json.Decoder(msgspec.Raw).decode


def _load(text: str) -> object:
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def _as_json(texts: list[str], skip: Callable[[str], object]) -> list[str]:
    """Return texts that SQLite reads as JSON: those that are none become JSON strings."""
    try:
        for text in texts:
            skip(text)
    except Exception:  # of msgspec, which refuses some texts that are JSON
        return [text if _is_json(text) else json.dumps(text) for text in texts]
    return texts


def _is_json(text: str) -> bool:
    try:
        _load(text)
    except (ValueError, RecursionError):
        return False
    return True


def _decoded(batch: Sequence[bytes]) -> tuple[list[str], list[int]]:
    """Return the events as text, and the indexes of those that are no UTF-8."""
    try:
        return [event.decode() for event in batch], []
    except UnicodeDecodeError:
        texts, bad = [], []
        for index, event in enumerate(batch):
            try:
                texts.append(event.decode())
            except UnicodeDecodeError:
                bad.append(index)
        return texts, bad
