"""A publisher with a spool: which events wait on the disk, in which order they are sent, and that counters add up."""

from __future__ import annotations

import asyncio

import pytest
from event_tools import assert_counters_add_up, until

from bgtasks.events import Publisher, Retry
from bgtasks.events.errors import SpoolFullError
from bgtasks.events.sinks.memory import MemorySink
from bgtasks.events.spool import Spool

MEBIBYTE = 1 << 20

pytestmark = pytest.mark.usefixtures("queue_of_twin")


class FaultySink(MemorySink):
    """A sink that can be down and can hang; ``batches`` shows the ids of what it wrote."""

    def __init__(self):
        super().__init__()
        self.is_down = False
        self.hangs = False
        self.tries = 0

    async def write(self, batch, batch_id):
        """Keep a batch, once the sink works."""
        self.tries += 1
        while self.hangs:
            await asyncio.sleep(0.001)
        if self.is_down:
            raise Retry(after=0.001, reason="it is down")
        await super().write(batch, batch_id)


@pytest.fixture
def stem(tmp_path):
    """Give the stem of a spool in a directory of its own."""
    return tmp_path / "events"


def make_publisher(spool, **options):
    """Return a publisher with a spool, and its sink."""
    sink = FaultySink()
    return Publisher(sink, **{"spool": spool, "linger": 0.001, "batch": 10, **options}), sink


def numbers(first, count):
    """Return events."""
    return [b"%d" % number for number in range(first, first + count)]


def emit_all(publisher, events):
    """Emit events, which all have to be accepted."""
    assert all(map(publisher.emit, events))


def is_empty(directory):
    """Tell whether a directory has no file."""
    return not any(directory.iterdir())


async def test_a_sink_that_is_up_gets_everything_in_order(stem):
    """With a spool in between no event is lost, doubled or reordered, and no file is left."""
    publisher, sink = make_publisher(stem)
    async with publisher:
        emit_all(publisher, numbers(0, 1000))
        report = await publisher.flush(30)
        assert report["status"] == "flushed"
        assert_counters_add_up(publisher.stats())
    assert sink.events == numbers(0, 1000)
    assert publisher.stats()["delivered"] == 1000
    assert is_empty(stem.parent)


async def test_events_wait_on_the_disk_while_the_sink_is_down(stem):
    """They are counted as spooled, the state says so, and later events are sent after them."""
    publisher, sink = make_publisher(stem)
    sink.is_down = True
    emit_all(publisher, numbers(0, 100))
    await until(lambda: publisher.stats()["spooled"] == 100 and sink.tries > 3)
    assert publisher.stats()["state"] == "spooling"
    assert publisher.stats()["queue_events"] == 0
    assert_counters_add_up(publisher.stats())
    emit_all(publisher, numbers(100, 100))
    await until(lambda: publisher.stats()["spooled"] == 200)
    sink.is_down = False
    emit_all(publisher, numbers(200, 10))
    report = await publisher.close(30)
    assert report["status"] == "flushed"
    assert sink.events == numbers(0, 210)
    assert publisher.stats()["delivered"] == 210
    assert_counters_add_up(publisher.stats())
    assert is_empty(stem.parent)


async def test_a_durable_publish_returns_after_the_commit(stem):
    """The event is on the disk then, whatever happens to the process."""
    publisher, sink = make_publisher(stem)
    sink.is_down = True
    assert await publisher.publish(b"precious", durable=True)
    assert publisher.stats()["spooled"] == 1
    report = await publisher.close(0.5)
    assert report["spooled"] == 1
    await until(lambda: publisher._store._spool._is_open is False)
    spool = Spool(stem)
    assert [batch for _, batch in spool.oldest(9)] == [[b"precious"]]
    spool.close()


async def test_recovered_events_do_not_count_as_those_that_are_waited_for(stem):
    """A durable publish and a flush wait for their own events, not for the delivery of an earlier process's."""
    spool = Spool(stem)
    for number in range(50):
        spool.append([b"earlier"] * 10, f"earlier-{number}")
    spool.close()
    publisher, sink = make_publisher(stem)
    assert await publisher.publish(b"mine", durable=True)
    assert (await publisher.flush(30))["status"] == "flushed"
    assert sink.events == [b"earlier"] * 500 + [b"mine"]
    await publisher.close(30)


@pytest.mark.parametrize("state", ["down", "hangs"])
async def test_close_spools_the_rest_within_its_timeout(stem, state):
    """The next publisher delivers the events that the sink did not take, before all others and with their ids."""
    publisher, sink = make_publisher(stem)
    sink.is_down = state == "down"
    sink.hangs = state == "hangs"
    emit_all(publisher, numbers(0, 55))
    begun = asyncio.get_running_loop().time()
    report = await publisher.close(1.0)
    assert asyncio.get_running_loop().time() - begun < 5.0
    assert report["status"] == "timeout"
    assert (report["queued"], report["spooled"], report["dropped"]) == (0, 55, 0)
    assert_counters_add_up(publisher.stats())
    next_publisher, next_sink = make_publisher(stem)
    emit_all(next_publisher, numbers(55, 5))
    await next_publisher.close(30)
    assert next_sink.events == numbers(0, 60)
    assert next_publisher.stats()["recovered"] == 55
    assert_counters_add_up(next_publisher.stats())
    assert is_empty(stem.parent)


async def test_close_releases_the_spool_without_time_for_it(stem):
    """With a timeout of 0 the file is released, too, as soon as the disk has finished."""
    publisher, sink = make_publisher(stem)
    sink.is_down = True
    emit_all(publisher, numbers(0, 20))
    await until(lambda: publisher.stats()["spooled"] == 20)
    await publisher.close(0)
    await until(lambda: publisher._store._spool._is_open is False)
    next_publisher, next_sink = make_publisher(stem)
    emit_all(next_publisher, numbers(20, 5))
    await next_publisher.flush(30)
    assert next_sink.events == numbers(0, 25)
    await next_publisher.close(30)


async def test_recovered_events_are_sent_without_a_new_event(stem):
    """A publisher looks at its start for events of an earlier process."""
    spool = Spool(stem)
    spool.append(numbers(0, 3), "earlier-1")
    spool.close()
    publisher, sink = make_publisher(stem)
    await publisher.start()
    await until(lambda: sink.events == numbers(0, 3))
    assert sink.batches == [("earlier-1", 3)]
    await publisher.close(30)
    assert is_empty(stem.parent)


async def test_a_batch_that_was_sent_and_not_deleted_is_sent_again_with_its_id(stem):
    """After a crash between the two, the sink can tell by the id that it has the batch already."""
    publisher, sink = make_publisher(stem)
    sink.is_down = True
    emit_all(publisher, numbers(0, 5))
    await until(lambda: sink.tries)
    batch_id = publisher._store._in_hand.batch_id
    await publisher.close(0.5)
    await until(lambda: publisher._store._spool._is_open is False)
    next_publisher, next_sink = make_publisher(stem)
    await next_publisher.start()
    await until(lambda: next_sink.batches)
    assert next_sink.batches == [(batch_id, 5)]
    await next_publisher.close(30)


async def test_as_an_overflow_the_spool_stays_empty_while_the_sink_takes_everything(stem):
    """No event goes through the disk without need."""
    spool = Spool(stem)
    appended = []
    spool.append = lambda batch, batch_id: appended.append(batch_id)
    publisher, sink = make_publisher(spool, overflow="spool")
    async with publisher:
        await until(lambda: publisher._store.is_empty)
        emit_all(publisher, numbers(0, 500))
        await publisher.flush(30)
    assert sink.events == numbers(0, 500)
    assert appended == []


async def test_as_an_overflow_the_spool_is_used_when_the_sink_fails(stem):
    """From the first failed try on, every event goes to the end of the spool until that is empty."""
    publisher, sink = make_publisher(stem, overflow="spool")
    emit_all(publisher, numbers(0, 50))
    await until(lambda: len(sink.events) == 50)
    sink.is_down = True
    emit_all(publisher, numbers(50, 50))
    await until(lambda: publisher.stats()["spooled"] == 50)
    emit_all(publisher, numbers(100, 50))
    await until(lambda: publisher.stats()["spooled"] == 100)
    sink.is_down = False
    await publisher.close(30)
    assert sink.events == numbers(0, 150)
    assert_counters_add_up(publisher.stats())


async def test_as_an_overflow_the_spool_is_used_when_the_sink_hangs(stem):
    """While a write does not return, new events go to the disk; none is dropped or refused."""
    publisher, sink = make_publisher(stem, overflow="spool", max_events=100)
    sink.hangs = True
    for first in range(0, 1000, 50):
        emit_all(publisher, numbers(first, 50))
        await until(lambda: publisher.stats()["queue_events"] <= 50)
    sink.hangs = False
    await publisher.close(30)
    assert sink.events == numbers(0, 1000)
    assert publisher.stats()["dropped"] == publisher.stats()["refused"] == {}
    assert_counters_add_up(publisher.stats())


async def test_a_hanging_sink_fills_the_disk_and_not_memory(stem):
    """Events are committed to the spool while a write does not return."""
    publisher, sink = make_publisher(stem, max_events=100)
    sink.hangs = True
    for first in range(0, 1000, 50):
        emit_all(publisher, numbers(first, 50))
        await until(lambda: publisher.stats()["queue_events"] == 0)
    assert publisher.stats()["spooled"] == 1000
    sink.hangs = False
    await publisher.close(30)
    assert sink.events == numbers(0, 1000)


async def test_a_full_spool_counts_the_events_that_it_drops(stem):
    """The oldest make room; the counters still add up."""
    publisher, sink = make_publisher(Spool(stem, max_bytes=MEBIBYTE), batch=100)
    sink.is_down = True
    for first in range(0, 3000, 100):
        emit_all(publisher, [b"%d %s" % (number, b"x" * 1000) for number in range(first, first + 100)])
        await until(lambda: publisher.stats()["queue_events"] == 0)
    dropped = publisher.stats()["dropped"]["spool_full"]
    assert dropped > 1000
    assert_counters_add_up(publisher.stats())
    sink.is_down = False
    await publisher.close(30)
    assert len(sink.events) == 3000 - dropped
    assert sink.events[-1].startswith(b"2999 ")
    assert_counters_add_up(publisher.stats())


async def test_without_a_usable_spool_events_go_to_the_sink_from_memory(tmp_path, caplog):
    """The error of the spool is logged once and counted."""
    publisher, sink = make_publisher(tmp_path / "missing" / "events")
    emit_all(publisher, numbers(0, 100))
    report = await publisher.flush(30)
    assert sink.events == numbers(0, 100)
    assert report["status"] == "flushed"
    stats = publisher.stats()
    assert stats["spool_errors"]
    assert "missing/events cannot be" in stats["last_error"]
    assert len([record for record in caplog.records if "spool" in record.getMessage()]) == 1
    await publisher.close(30)
    assert_counters_add_up(publisher.stats())


async def test_a_damaged_spool_is_renamed_and_replaced(stem):
    """Events are delivered though a file in the place of the spool cannot be read."""
    stem.with_name("events.1-1.spool").write_bytes(b"no database" * 1000)
    publisher, sink = make_publisher(stem)
    emit_all(publisher, numbers(0, 20))
    await publisher.flush(30)
    assert sink.events == numbers(0, 20)
    await publisher.close(30)
    assert [path.name for path in stem.parent.iterdir()] == ["events.1-1.corrupt"]


class NoSpool:
    """A spool on a disk that takes nothing."""

    def append(self, batch, batch_id):
        raise SpoolFullError("the disk is full")

    def oldest(self, count):
        return []

    def done(self, batch_id):
        pass

    def stats(self):
        return {"events": 0, "bytes": 0, "batches": 0, "recovered": 0, "dropped": {}, "corrupt_files": 0}

    def close(self):
        pass


async def test_a_poison_event_is_given_up_also_beside_a_spool_that_fails():
    """The failed writes of a batch that bypasses the disk count towards max_attempts."""

    class Picky(MemorySink):
        async def write(self, batch, batch_id):
            if b'"poison"' in batch:
                raise ValueError("poison")
            await super().write(batch, batch_id)

    publisher = Publisher(Picky(), spool=NoSpool(), linger=0.001, max_attempts=2)
    for event in ("a", "poison", "b"):
        publisher.emit(event)
    report = await publisher.flush(20)
    assert report["status"] == "flushed"
    assert publisher.stats()["dropped"] == {"retries_exhausted": 1}
    assert publisher.sink.events == [b'"a"', b'"b"']
    await publisher.close()
