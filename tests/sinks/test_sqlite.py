"""SQLite: the sink and its publisher, into real files."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap

import pytest
from disks import fill_disk, small_disk
from event_tools import has_failed

from bgtasks.errors import InvalidOptionError
from bgtasks.events import Publisher
from bgtasks.events.errors import Reject, SinkError
from bgtasks.events.sinks.sqlite import SqliteSink


@pytest.fixture
def path(tmp_path):
    """Give the path of a file that does not exist yet."""
    return tmp_path / "events.db"


def query(path, statement):
    """Return the rows that a statement finds."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement).fetchall()


def texts(path, rows="event"):
    """Return the events of a file in their order."""
    if rows == "event":
        return [text for (text,) in query(path, "SELECT event FROM events ORDER BY id")]
    return [text for (text,) in query(path, "SELECT value FROM events, json_each(events.events) ORDER BY batch, id")]


@pytest.mark.parametrize("rows", ["event", "batch"])
async def test_events_arrive_in_order(path, rows):
    """Every event is a row, or an element of its batch, in the order in which it was emitted."""
    async with Publisher(SqliteSink(path, rows=rows), linger=0.001) as publisher:
        for number in range(1234):
            assert publisher.emit({"number": number})
    expected = [f'{{"number":{number}}}' for number in range(1234)]
    assert texts(path, rows) == expected
    assert publisher.stats()["delivered"] == 1234


async def test_fields_can_be_queried(path):
    """SQLite reads the text as JSON."""
    async with Publisher(SqliteSink(path)) as publisher:
        publisher.emit({"event": "order_paid", "order": 42})
    assert query(path, "SELECT json_extract(event, '$.order') FROM events") == [(42,)]


NO_JSON = ["", "no JSON", "1 2", '{"a":1}x', "[1", "2]", "3,4", "NaN", '"\x01"', "[" * 5000]


@pytest.mark.parametrize("has_msgspec", [True, False], ids=["msgspec", "json"])
@pytest.mark.parametrize("rows", ["event", "batch"])
async def test_bytes_that_are_no_json_do_not_break_queries(path, rows, has_msgspec, monkeypatch):
    """They are stored as JSON strings; JSON of any form stays as it is."""
    if not has_msgspec:
        monkeypatch.setitem(sys.modules, "msgspec", None)
    good = ['{"name":"ann"}', ' {"name": "bob"}', '{"name":"\\ud800"}', "17"]
    events = [*good, *NO_JSON, '{"name":"cyd"}']
    async with SqliteSink(path, rows=rows) as sink:
        await sink.write([event.encode() for event in events], "batch-1")
        await sink.write([b'{"name":"dan"}'], "batch-2")
    if rows == "event":
        assert texts(path)[:4] == good
        assert query(path, "SELECT count(*) FROM events WHERE json_extract(event, '$.name') = 'cyd'") == [(1,)]
        assert query(path, "SELECT json_extract(event, '$') FROM events LIMIT 10 OFFSET 4") == [
            (text,) for text in NO_JSON
        ]
    else:
        values = query(path, "SELECT value FROM events, json_each(events.events) ORDER BY batch, id")
        assert [value for (value,) in values[4:14]] == NO_JSON
        assert len(values) == len(events) + 1


@pytest.mark.parametrize("rows", ["event", "batch"])
async def test_a_batch_that_is_written_again_is_there_once(path, rows):
    """A batch whose id is in the table is not written, by the same sink or by another one on the file."""
    for _ in range(2):
        sink = SqliteSink(path, rows=rows)
        for _ in range(2):
            async with sink:
                await sink.write([b"1", b"2"], "batch-1")
                await sink.write([b"3"], "batch-2")
    assert list(map(str, texts(path, rows))) == ["1", "2", "3"]
    assert [batch_id for (batch_id,) in query(path, "SELECT batch_id FROM events_batches ORDER BY batch")] == [
        "batch-1",
        "batch-2",
    ]


async def test_a_batch_may_be_larger_than_a_statement(path):
    """A batch of thousands of events is one transaction."""
    async with SqliteSink(path) as sink:
        await sink.write([b"%d" % number for number in range(2345)], "batch-1")
        assert len(texts(path)) == 2345


async def test_events_that_are_no_text_are_refused_alone(path):
    """The error has the indexes of events that are not UTF-8; the others of the batch are written."""
    async with SqliteSink(path) as sink:
        with pytest.raises(Reject, match="no UTF-8") as caught:
            await sink.write([b"1", b"\xff", b"2", b"\xfe"], "batch-1")
        assert caught.value.indexes == (1, 3)
        assert texts(path) == ["1", "2"]


async def test_a_locked_file_is_tried_again(path):
    """Another program's transaction delays events; none is lost."""
    query(path, "PRAGMA journal_mode = WAL")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    publisher = Publisher(SqliteSink(path), linger=0.001)
    publisher.emit(b"1")
    report = await publisher.flush(1.5)
    assert report["status"] == "timeout"
    assert "database is locked" in report["last_error"]
    other.execute("COMMIT")
    other.close()
    await publisher.close(30)
    assert texts(path) == ["1"]


async def test_a_table_with_other_columns_is_an_error_that_says_so(path):
    """A table of another program is not written to; another name can be given."""
    query(path, "CREATE TABLE events (mine)")
    sink = SqliteSink(path)
    with pytest.raises(SinkError, match=r"events\.db: no such column"):
        await sink.open()
    await sink.close()
    async with SqliteSink(path, table="other") as sink:
        await sink.write([b"1"], "batch-1")
    assert query(path, "SELECT event FROM other") == [("1",)]


async def test_a_path_that_cannot_be_opened_is_named(tmp_path):
    """With connect=True ``start`` raises; otherwise the report has the error."""
    with pytest.raises(SinkError, match=r"missing/events\.db: unable to open"):
        async with Publisher(SqliteSink(tmp_path / "missing" / "events.db"), connect=True):
            pass
    publisher = Publisher(SqliteSink(tmp_path / "missing" / "events.db"), linger=0.001)
    publisher.emit(b"1")
    await has_failed(publisher)
    report = await publisher.close(0.1)
    assert "missing/events.db" in report["last_error"]
    assert report["dropped"] == 1


@pytest.mark.parametrize("options", [{"rows": "line"}, {"sync": "off"}, {"table": "a b"}, {"table": ""}], ids=str)
def test_an_option_outside_its_values_is_refused(path, options):
    """The error names the option."""
    (name,) = options
    with pytest.raises(InvalidOptionError, match=f"^{name} must be"):
        SqliteSink(path, **options)


async def test_a_full_disk_delays_events_and_loses_none(tmp_path):
    """A batch is in the file as a whole or not at all; it is written when there is space again."""
    with small_disk(tmp_path / "disk", 6) as disk:
        publisher = Publisher(SqliteSink(disk / "events.db"), linger=0.001)
        publisher.emit(b"0")
        await publisher.flush(30)
        filler = fill_disk(disk)
        for number in range(1, 3001):
            assert publisher.emit(b'"%d %s"' % (number, b"x" * 200))
        await has_failed(publisher)
        report = await publisher.flush(0.01)
        assert "full" in report["last_error"]
        filler.unlink()
        assert (await publisher.close(30))["dropped"] == 0
        assert [text.strip('"').split()[0] for text in texts(disk / "events.db")] == [str(n) for n in range(3001)]


WRITER = """
    import asyncio, os, sys
    from bgtasks.events.sinks.sqlite import SqliteSink

    async def main():
        number = int(sys.argv[2])
        async with SqliteSink(sys.argv[1]) as sink:
            while True:
                await sink.write([b"%d" % (100 * number + index) for index in range(100)], f"b-{number}")
                os.write(1, b"%d\\n" % number)
                number += 1

    asyncio.run(main())
"""


def test_committed_batches_survive_a_kill(path):
    """After SIGKILL no committed batch is missing, and every batch is whole."""
    first = 0
    for lines in (30, 77, 5):
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            printed = [int(process.stdout.readline()) for _ in range(lines)]
            os.kill(process.pid, signal.SIGKILL)
            printed += [int(line) for line in process.stdout.readlines()]
        found = list(map(int, texts(path)))
        assert found == list(range(len(found)))
        assert len(found) in (100 * (printed[-1] + 1), 100 * (printed[-1] + 2))
        # The next process writes again a batch that was committed and not printed.
        first = printed[-1] + 1
