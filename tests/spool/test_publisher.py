"""A publisher with a spool: what waits for the sink on the disk, in which order, and how the books stay right."""

from __future__ import annotations

import asyncio

import pytest

from bgtasks.events import Retry
from bgtasks.events.sinks.memory import MemoryPublisher
from bgtasks.events.spool import Spool

MEBIBYTE = 1 << 20

pytestmark = pytest.mark.usefixtures("ring_of_twin")


class Sink(MemoryPublisher):
    """A sink that can be down, and one that can hang; written batches are compared by id."""

    def __init__(self, **options):
        super().__init__(**{"linger": 0.001, "batch": 10, **options})
        self.is_down = False
        self.hangs = False
        self.tries = 0

    async def write(self, batch, batch_id):
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


def numbers(first, count):
    """Return events."""
    return [b"%d" % number for number in range(first, first + count)]


def emit_all(publisher, events):
    """Emit events, which all have to be accepted."""
    assert all(map(publisher.emit, events))


def assert_books_close(publisher):
    """Check the equation of the books."""
    stats = publisher.stats()
    assert stats["accepted"] == (
        stats["delivered"] + sum(stats["dropped"].values()) + stats["queue_events"] + stats["spooled"]
    )


async def until(condition):
    """Wait for a condition."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


def is_empty(directory):
    """Tell whether no file is left."""
    return not any(directory.iterdir())


async def test_a_sink_that_is_up_gets_everything_in_order(stem):
    """With a spool in between nothing is lost, doubled or reordered, and no file is left."""
    async with Sink(spool=stem) as sink:
        emit_all(sink, numbers(0, 1000))
        report = await sink.flush(30)
        assert report["status"] == "flushed"
        assert_books_close(sink)
    assert sink.events == numbers(0, 1000)
    assert sink.stats()["delivered"] == 1000
    assert is_empty(stem.parent)


async def test_events_wait_on_the_disk_while_the_sink_is_down(stem):
    """They are counted as spooled, the state says so, and what comes later stands behind them."""
    sink = Sink(spool=stem)
    sink.is_down = True
    emit_all(sink, numbers(0, 100))
    await until(lambda: sink.stats()["spooled"] == 100 and sink.tries > 3)
    assert sink.stats()["state"] == "spooling"
    assert sink.stats()["queue_events"] == 0
    assert_books_close(sink)
    emit_all(sink, numbers(100, 100))
    await until(lambda: sink.stats()["spooled"] == 200)
    sink.is_down = False
    emit_all(sink, numbers(200, 10))
    report = await sink.close(30)
    assert report["status"] == "flushed"
    assert sink.events == numbers(0, 210)
    assert sink.stats()["delivered"] == 210
    assert_books_close(sink)
    assert is_empty(stem.parent)


async def test_a_durable_publish_returns_after_the_commit(stem):
    """Whatever becomes of the process then, the event is on the disk."""
    sink = Sink(spool=stem)
    sink.is_down = True
    assert await sink.publish(b"precious", durable=True)
    assert sink.stats()["spooled"] == 1
    report = await sink.close(0.5)
    assert report["spooled"] == 1
    await until(lambda: sink._flusher.store._spool._file is None)
    spool = Spool(stem)
    assert [batch for _, batch in spool.oldest(9)] == [[b"precious"]]
    spool.close()


async def test_what_was_left_behind_does_not_count_as_what_is_waited_for(stem):
    """Neither a durable publish nor a flush takes the delivery of an earlier process's events for that of its own."""
    spool = Spool(stem)
    for number in range(50):
        spool.append([b"earlier"] * 10, f"earlier-{number}")
    spool.close()
    sink = Sink(spool=stem)
    assert await sink.publish(b"mine", durable=True)
    assert (await sink.flush(30))["status"] == "flushed"
    assert sink.events == [b"earlier"] * 500 + [b"mine"]
    await sink.close(30)


@pytest.mark.parametrize("state", ["down", "hangs"])
async def test_close_spools_the_rest_by_its_deadline(stem, state):
    """What the sink did not take is left to the next publisher, which delivers it first, with its ids."""
    sink = Sink(spool=stem)
    sink.is_down = state == "down"
    sink.hangs = state == "hangs"
    emit_all(sink, numbers(0, 55))
    began = asyncio.get_running_loop().time()
    report = await sink.close(1.0)
    assert asyncio.get_running_loop().time() - began < 5.0
    assert report["status"] == "deadline"
    assert (report["queued"], report["spooled"], report["dropped"]) == (0, 55, 0)
    assert_books_close(sink)
    following = Sink(spool=stem)
    emit_all(following, numbers(55, 5))
    await following.close(30)
    assert following.events == numbers(0, 60)
    assert following.stats()["recovered"] == 55
    assert_books_close(following)
    assert is_empty(stem.parent)


async def test_close_lets_go_of_the_spool_without_time_for_it(stem):
    """A deadline that is over at once leaves the file to the next one all the same, as soon as the disk is through."""
    sink = Sink(spool=stem)
    sink.is_down = True
    emit_all(sink, numbers(0, 20))
    await until(lambda: sink.stats()["spooled"] == 20)
    await sink.close(0)
    await until(lambda: sink._flusher.store._spool._file is None)
    following = Sink(spool=stem)
    emit_all(following, numbers(20, 5))
    await following.flush(30)
    assert following.events == numbers(0, 25)
    await following.close(30)


async def test_what_was_left_behind_is_sent_without_a_new_event(stem):
    """A publisher that is started looks for what an earlier process left."""
    spool = Spool(stem)
    spool.append(numbers(0, 3), "earlier-1")
    spool.close()
    sink = Sink(spool=stem)
    await sink.start()
    await until(lambda: sink.events == numbers(0, 3))
    assert sink.batches == [("earlier-1", 3)]
    await sink.close(30)
    assert is_empty(stem.parent)


async def test_a_batch_that_was_sent_and_not_deleted_is_sent_again_with_its_id(stem):
    """After a crash between the two, the sink can tell by the id that it has it already."""
    sink = Sink(spool=stem)
    sink.is_down = True
    emit_all(sink, numbers(0, 5))
    await until(lambda: sink.tries)
    first = sink._flusher.store._in_hand.batch_id
    await sink.close(0.5)
    await until(lambda: sink._flusher.store._spool._file is None)
    following = Sink(spool=stem)
    await following.start()
    await until(lambda: following.batches)
    assert following.batches == [(first, 5)]
    await following.close(30)


async def test_as_an_overflow_the_spool_stays_empty_while_the_sink_takes_all(stem):
    """Nothing goes through the disk that does not have to."""
    spool = Spool(stem)
    appended = []
    spool.append = lambda batch, batch_id: appended.append(batch_id)
    async with Sink(spool=spool, overflow="spool") as sink:
        await until(lambda: sink._flusher.store.is_empty)
        emit_all(sink, numbers(0, 500))
        await sink.flush(30)
    assert sink.events == numbers(0, 500)
    assert appended == []


async def test_as_an_overflow_the_spool_takes_over_when_the_sink_fails(stem):
    """From the first failed try on everything stands behind what is on the disk, until that is empty."""
    sink = Sink(spool=stem, overflow="spool")
    emit_all(sink, numbers(0, 50))
    await until(lambda: len(sink.events) == 50)
    sink.is_down = True
    emit_all(sink, numbers(50, 50))
    await until(lambda: sink.stats()["spooled"] == 50)
    emit_all(sink, numbers(100, 50))
    await until(lambda: sink.stats()["spooled"] == 100)
    sink.is_down = False
    await sink.close(30)
    assert sink.events == numbers(0, 150)
    assert_books_close(sink)


async def test_as_an_overflow_the_spool_takes_over_when_the_sink_hangs(stem):
    """A write that does not come back holds up nobody: what comes meanwhile goes to the disk, not over the edge."""
    sink = Sink(spool=stem, overflow="spool", max_events=100)
    sink.hangs = True
    for first in range(0, 1000, 50):
        emit_all(sink, numbers(first, 50))
        await until(lambda: sink.stats()["queue_events"] <= 50)
    sink.hangs = False
    await sink.close(30)
    assert sink.events == numbers(0, 1000)
    assert sink.stats()["dropped"] == sink.stats()["refused"] == {}
    assert_books_close(sink)


async def test_a_hanging_sink_fills_the_disk_and_not_memory(stem):
    """The write-ahead spool goes on while a write does not come back."""
    sink = Sink(spool=stem, max_events=100)
    sink.hangs = True
    for first in range(0, 1000, 50):
        emit_all(sink, numbers(first, 50))
        await until(lambda: sink.stats()["queue_events"] == 0)
    assert sink.stats()["spooled"] == 1000
    sink.hangs = False
    await sink.close(30)
    assert sink.events == numbers(0, 1000)


async def test_a_full_spool_counts_what_it_gives_up(stem):
    """The oldest make room; the books close all the same."""
    sink = Sink(spool=Spool(stem, max_bytes=MEBIBYTE), batch=100)
    sink.is_down = True
    for first in range(0, 3000, 100):
        emit_all(sink, [b"%d %s" % (number, b"x" * 1000) for number in range(first, first + 100)])
        await until(lambda: sink.stats()["queue_events"] == 0)
    dropped = sink.stats()["dropped"]["spool_full"]
    assert dropped > 1000
    assert_books_close(sink)
    sink.is_down = False
    await sink.close(30)
    assert len(sink.events) == 3000 - dropped
    assert sink.events[-1].startswith(b"2999 ")
    assert_books_close(sink)


async def test_a_spool_that_cannot_be_opened_stops_nothing(tmp_path, caplog):
    """The events go to the sink from memory; the error is named once and counted."""
    sink = Sink(spool=tmp_path / "missing" / "events")
    emit_all(sink, numbers(0, 100))
    report = await sink.flush(30)
    assert sink.events == numbers(0, 100)
    assert report["status"] == "flushed"
    stats = sink.stats()
    assert stats["spool_errors"]
    assert "missing/events cannot be" in stats["last_error"]
    assert len([record for record in caplog.records if "spool" in record.getMessage()]) == 1
    await sink.close(30)
    assert_books_close(sink)


async def test_a_damaged_spool_is_counted_and_replaced(stem):
    """A file that cannot be read any more is no reason to stop."""
    stem.with_name("events.1-1.spool").write_bytes(b"no database" * 1000)
    sink = Sink(spool=stem)
    emit_all(sink, numbers(0, 20))
    await sink.flush(30)
    assert sink.events == numbers(0, 20)
    await sink.close(30)
    assert [path.name for path in stem.parent.iterdir()] == ["events.1-1.corrupt"]
