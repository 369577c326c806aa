"""A full disk under the files of a publisher: events wait, no line is torn, delivery goes on."""

from __future__ import annotations

import json

import pytest
from disks import fill_disk, small_disk
from event_tools import assert_counters_add_up, until

from bgtasks.events import Publisher, Retry
from bgtasks.events.sinks.jsonl import JsonlSink
from bgtasks.events.sinks.memory import MemorySink

PADDING = "x" * 200


@pytest.fixture
def disk(tmp_path):
    """Give a disk of 12 MiB."""
    with small_disk(tmp_path / "disk", 12) as directory:
        yield directory


def emit_numbers(publisher, first, count):
    """Emit events, all of which must be accepted."""
    for number in range(first, first + count):
        assert publisher.emit({"number": number, "padding": PADDING})


def numbers_in(path):
    """Return the numbers of the events in a file; every line must be complete."""
    return [json.loads(line)["number"] for line in path.read_bytes().split(b"\n")[:-1]]


async def test_jsonl_waits_for_disk_space(disk):
    """A batch that did not fit is cut off, retried, and written once when the disk has space."""
    publisher = Publisher(JsonlSink(disk / "events.jsonl"), linger=0.001)
    emit_numbers(publisher, 0, 100)
    await publisher.flush(30)
    filler = fill_disk(disk, leave=50_000)
    emit_numbers(publisher, 100, 5000)
    await until(lambda: publisher.stats()["retried"] > 1)
    assert "No space left" in publisher.stats()["last_error"]
    # Meanwhile the file has complete lines only.
    delivered = publisher.stats()["delivered"]
    assert numbers_in(disk / "events.jsonl") == list(range(delivered))
    filler.unlink()
    report = await publisher.close(60)
    assert (report["status"], report["dropped"]) == ("flushed", 0)
    assert numbers_in(disk / "events.jsonl") == list(range(5100))
    assert_counters_add_up(publisher.stats())


async def test_jsonl_gives_up_after_retry_for_and_counts(disk):
    """Events that find no space until retry_for are dropped and counted; the lines around them are complete."""
    publisher = Publisher(JsonlSink(disk / "events.jsonl"), linger=0.001, retry_for=0.05)
    filler = fill_disk(disk)
    emit_numbers(publisher, 0, 400)
    await until(lambda: publisher.stats()["dropped"].get("retries_exhausted", 0) == 400)
    filler.unlink()
    emit_numbers(publisher, 400, 100)
    await publisher.close(60)
    assert numbers_in(disk / "events.jsonl") == list(range(400, 500))
    assert_counters_add_up(publisher.stats())


async def test_a_full_disk_under_the_spool_does_not_stop_delivery(disk):
    """The sink gets all events although the spool fails; its errors are counted."""
    fill_disk(disk)
    publisher = Publisher(MemorySink(), spool=disk / "events", linger=0.001)
    emit_numbers(publisher, 0, 2000)
    report = await publisher.close(60)
    assert (report["status"], report["dropped"]) == ("flushed", 0)
    assert [json.loads(event)["number"] for event in publisher.sink.events] == list(range(2000))
    assert publisher.stats()["spool_errors"] > 0
    assert_counters_add_up(publisher.stats())


async def test_a_disk_that_a_spool_filled_is_empty_again_after_delivery(disk):
    """Once the sink is up all is delivered, the disk has its space back, and the next publisher finds nothing."""

    class Breakable(MemorySink):
        is_down = True

        async def write(self, batch, batch_id):
            if self.is_down:
                raise Retry(after=0.01, reason="it is down")
            await super().write(batch, batch_id)

    publisher = Publisher(Breakable(), spool=disk / "events", linger=0.001, max_events=10_000)
    for first in range(0, 80_000, 1000):
        emit_numbers(publisher, first, 1000)
        await until(lambda: publisher.stats()["queue_events"] < 5000)
    publisher.sink.is_down = False
    report = await publisher.close(60)
    assert (report["status"], report["spooled"]) == ("flushed", 0)
    dropped = publisher.stats()["dropped"]["spool_full"]
    numbers = [json.loads(event)["number"] for event in publisher.sink.events]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 79_999
    assert len(numbers) == 80_000 - dropped
    assert list(disk.iterdir()) == []
    following = Publisher(MemorySink(), spool=disk / "events", linger=0.001)
    await following.start()
    await following.close(60)
    assert following.stats()["recovered"] == 0


async def test_every_event_is_counted_when_the_disk_fills_under_the_spool(disk):
    """With the sink down and the disk full, events are refused or dropped by reason; the others arrive."""

    class Breakable(MemorySink):
        is_down = True

        async def write(self, batch, batch_id):
            if self.is_down:
                raise ConnectionError("it is down")
            await super().write(batch, batch_id)

    publisher = Publisher(Breakable(), spool=disk / "events", linger=0.001, max_events=10_000)
    fill_disk(disk, leave=3 << 20)
    accepted = 0
    for first in range(0, 40_000, 1000):
        accepted += sum(publisher.emit({"number": n, "padding": PADDING}) for n in range(first, first + 1000))
        await until(lambda: publisher.stats()["queue_events"] < 5000 or publisher.stats()["spool_errors"])
    stats = publisher.stats()
    assert stats["spool_errors"] or stats["dropped"]["spool_full"]
    publisher.sink.is_down = False
    await publisher.close(60)
    stats = publisher.stats()
    assert_counters_add_up(stats)
    assert stats["accepted"] == accepted
    numbers = [json.loads(event)["number"] for event in publisher.sink.events]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == accepted - sum(stats["dropped"].values())
