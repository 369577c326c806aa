"""A spool has a thread of its own: files that hang elsewhere do not stop its commits."""

from __future__ import annotations

import asyncio
import sqlite3
import threading

import pytest
from event_tools import until
from requirements import need

from bgtasks.events import Publisher
from bgtasks.events.sinks.jsonl import JsonlSink
from bgtasks.events.sinks.sqlite import SqliteSink

need("msgspec")


async def committed(tmp_path, sink, hang):
    """Return whether durable publishes end while the sink of the publisher, and that of another one, hang."""
    spooled = Publisher(sink, spool=tmp_path / "spool")
    await spooled.publish({"number": 0}, durable=True)
    await until(lambda: spooled.stats()["delivered"] == 1)
    with hang:
        for number in range(1, 20):
            async with asyncio.timeout(5):
                assert await spooled.publish({"number": number}, durable=True)
        assert spooled.stats()["spooled"] == 19
    report = await spooled.close(20)
    assert report["status"] == "flushed"


@pytest.mark.loops("asyncio")
async def test_a_hanging_file_of_lines_does_not_stop_commits(tmp_path):
    """The disk of the JSON lines hangs, that of the spool does not."""
    lock = threading.Lock()
    sink = JsonlSink(tmp_path / "lines")
    append = sink._file.append

    def wait_and_append(lines):
        with lock:
            append(lines)

    sink._file.append = wait_and_append
    await committed(tmp_path, sink, lock)
    assert len((tmp_path / "lines").read_text().splitlines()) == 20


@pytest.mark.loops("asyncio")
async def test_a_locked_database_does_not_stop_commits(tmp_path, monkeypatch):
    """Another program holds the write lock of the sink's file; the sink's thread waits for it."""
    from bgtasks.events.sinks import sqlite as sqlite_sink

    monkeypatch.setattr(sqlite_sink, "BUSY_TIMEOUT", 30.0)
    other = sqlite3.connect(tmp_path / "events.db", isolation_level=None, check_same_thread=False)

    class Locked:
        def __enter__(self):
            other.execute("BEGIN IMMEDIATE")

        def __exit__(self, *exception):
            other.execute("ROLLBACK")
            other.close()

    await committed(tmp_path, SqliteSink(tmp_path / "events.db"), Locked())
