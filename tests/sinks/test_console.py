"""The console sink: one line per event, on standard output or another stream."""

from __future__ import annotations

import io

import pytest

from bgtasks.events import Publisher
from bgtasks.events.sinks.console import ConsoleSink


async def test_each_event_of_a_batch_is_a_line():
    """Bytes that are not UTF-8 are shown escaped."""
    stream = io.StringIO()
    async with ConsoleSink(stream) as sink:
        await sink.write([b'{"n":1}', b"\xff"], "id-1")
        await sink.write([b'{"n":2}'], "id-2")
    assert stream.getvalue() == '{"n":1}\n\\xff\n{"n":2}\n'


@pytest.mark.usefixtures("queue_of_twin")
async def test_the_console_is_standard_output_at_the_time_of_writing(capsys):
    """A stream that is given is used instead."""
    async with Publisher(ConsoleSink()) as publisher:
        publisher.emit({"n": 1})
        publisher.emit(b"\xff")
    assert capsys.readouterr().out == '{"n":1}\n\\xff\n'
    stream = io.StringIO()
    async with Publisher(ConsoleSink(stream)) as publisher:
        publisher.emit({"n": 2})
    assert stream.getvalue() == '{"n":2}\n'
