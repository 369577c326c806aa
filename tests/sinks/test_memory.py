"""The memory sink: the test double for programs that publish."""

from __future__ import annotations

import pytest

from bgtasks.events import Publisher
from bgtasks.events.sinks.memory import MemorySink


async def test_events_and_batches_are_kept():
    """``events`` holds the encoded events, ``batches`` the ids and sizes of the batches, both in order."""
    async with MemorySink() as sink:
        await sink.write([b"1", b"2"], "id-1")
        await sink.write([b"3"], "id-2")
    assert sink.events == [b"1", b"2", b"3"]
    assert sink.batches == [("id-1", 2), ("id-2", 1)]


@pytest.mark.usefixtures("queue_of_twin")
async def test_it_can_be_read_while_and_after_its_publisher_is_open():
    """A flush brings every event that was emitted before."""
    sink = MemorySink()
    async with Publisher(sink) as publisher:
        publisher.emit({"event": "started"})
        await publisher.flush()
        assert sink.events == [b'{"event":"started"}']
        publisher.emit({"event": "ended"})
    assert sink.events == [b'{"event":"started"}', b'{"event":"ended"}']
    assert publisher.sink is sink
