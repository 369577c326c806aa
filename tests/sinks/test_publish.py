"""Publishers of other packages as sinks: a few calls at once, refused events alone, every event at most once."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from bgtasks import InvalidOptionError
from bgtasks.events import Publisher, Reject
from bgtasks.events.sinks.publish import PublishSink

with_each_queue = pytest.mark.usefixtures("queue_of_twin")


class OtherPublisher:
    """A publisher such as agentflow's: it takes one event per call, and refuses the bad ones."""

    def __init__(self, bad=()):
        self.events = []
        self.bad = bad
        self.begun = []
        self.running = self.most = 0

    async def publish(self, event):
        """Take one event."""
        self.begun.append(event)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        if event in self.bad:
            raise RuntimeError(f"cannot take {event}")
        self.events.append(event)


# -- the sink alone ---------------------------------------------------------------------------------------------------


async def test_the_events_of_a_batch_are_published_by_a_few_workers():
    """``write`` returns when all of them are published."""
    other = OtherPublisher()
    async with PublishSink(other, workers=3) as sink:
        await sink.write([(number,) for number in range(20)], "id-1")
        assert sorted(other.events) == [(number,) for number in range(20)]
        await sink.write([(20,)], "id-2")
    assert other.events[-1] == (20,)
    assert other.most == 3


async def test_one_worker_publishes_in_order():
    """Of the same batch, no call begins before the one before has ended."""
    other = OtherPublisher()
    async with PublishSink(other, workers=1) as sink:
        await sink.write(range(20), "id")
    assert other.events == list(range(20))
    assert other.most == 1


async def test_a_refused_event_is_rejected_alone():
    """The error has its index and the reason; the others of the batch are published."""
    other = OtherPublisher(bad={2, 5})
    async with PublishSink(other) as sink:
        with pytest.raises(Reject, match="cannot take 2") as caught:
            await sink.write(range(8), "id")
    assert caught.value.indexes == (2, 5)
    assert sorted(other.events) == [0, 1, 3, 4, 6, 7]


async def test_a_cancelled_batch_goes_on_where_it_stopped():
    """A second write of the same id calls ``publish`` only for the events for which it was not called before."""
    other = OtherPublisher()
    async with PublishSink(other, workers=1) as sink:
        writing = asyncio.create_task(sink.write(range(10), "id"))
        while len(other.begun) < 5:
            await asyncio.sleep(0)
        writing.cancel()
        await asyncio.wait((writing,))
        assert writing.cancelled()
        assert len(other.begun) < 10
        await sink.write(range(10), "id")
    assert other.begun == list(range(10))


def test_an_argument_outside_its_values_is_refused():
    """The error names it."""
    with pytest.raises(InvalidOptionError, match="publish"):
        PublishSink(object())
    with pytest.raises(InvalidOptionError, match="workers"):
        PublishSink(OtherPublisher(), workers=0)


# -- with a publisher -------------------------------------------------------------------------------------------------


@with_each_queue
async def test_another_publisher_gets_the_events_themselves():
    """Eight workers publish them, not one task per event; they are not encoded."""
    other = OtherPublisher()
    publisher = Publisher(PublishSink(other))
    for number in range(1000):
        publisher.emit((number,))
    report = await publisher.close()
    assert report["delivered"] == 1000
    assert sorted(other.events) == [(number,) for number in range(1000)]
    assert other.most == 8


@with_each_queue
async def test_one_worker_keeps_the_order_of_all_events():
    """With workers=1 the events arrive as they were emitted."""
    other = OtherPublisher()
    publisher = Publisher(PublishSink(other, workers=1))
    for number in range(100):
        publisher.emit(number)
    await publisher.close()
    assert other.events == list(range(100))


@with_each_queue
async def test_a_refused_event_is_a_dead_letter_and_not_tried_again(tmp_path):
    """It is counted as rejected; all others arrive."""
    other = OtherPublisher(bad={7})
    publisher = Publisher(PublishSink(other), dead_letters=tmp_path / "dead")
    for number in range(20):
        publisher.emit(number)
    await publisher.close()
    assert publisher.stats()["dropped"] == {"rejected": 1}
    assert publisher.stats()["retried"] == 0
    assert sorted(other.events) == [number for number in range(20) if number != 7]
    letter = msgspec.json.decode((tmp_path / "dead").read_bytes())
    assert letter["object"] == "7"
    assert "cannot take 7" in letter["error"]
