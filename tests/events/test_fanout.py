"""A fan-out: every publisher gets every event, and none waits for another."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from event_tools import assert_counters_add_up, scripted, until

from bgtasks import InvalidOptionError
from bgtasks.events import Fanout, Publisher
from bgtasks.events.sinks.memory import MemorySink
from bgtasks.events.sinks.publish import PublishSink

pytestmark = pytest.mark.usefixtures("queue_of_twin")


async def test_every_publisher_gets_every_event():
    """Each publisher has its own queue and keeps the order; ``close`` closes all."""
    publishers = [Publisher(MemorySink(), batch=7), Publisher(MemorySink(), linger=0)]
    fanout = Fanout(publishers)
    for number in range(100):
        assert fanout.emit({"n": number})
    report = await fanout.close()
    assert report["status"] == "flushed"
    assert report["delivered"] == 200
    for publisher in publishers:
        assert [msgspec.json.decode(event)["n"] for event in publisher.sink.events] == list(range(100))
        assert publisher.stats()["state"] == "closed"


async def test_a_publisher_that_hangs_or_fails_does_not_delay_another():
    """Its queue fills and its report shows it; the other publisher delivers everything."""
    gate = asyncio.Event()

    async def hang(batch, batch_id):
        await gate.wait()

    stuck = scripted([hang] * 100, name="stuck", max_events=10)
    healthy = Publisher(MemorySink())
    fanout = Fanout([stuck, healthy])
    accepted = [fanout.emit({"n": number}) for number in range(100)]
    assert accepted == [True] * 10 + [False] * 90
    await until(lambda: len(healthy.sink.events) == 100)
    assert fanout.stats()[0]["refused"] == {"full": 90}
    report = await fanout.close(0.3)
    assert report["status"] == "timeout"
    assert report["dropped"] == 10
    for publisher in (stuck, healthy):
        assert_counters_add_up(publisher.stats())


async def test_publish_waits_for_a_publisher_that_blocks():
    """With overflow="block" in one publisher, no event is refused."""
    blocking, other = Publisher(MemorySink(), max_events=3, overflow="block"), Publisher(MemorySink())
    fanout = Fanout([blocking, other])
    for number in range(100):
        assert await fanout.publish({"n": number})
    await fanout.close()
    assert len(blocking.sink.events) == len(other.sink.events) == 100


async def test_publish_can_wait_for_the_delivery_to_all():
    """With durable=True the event has left the memory of each publisher."""
    first, second = Publisher(MemorySink(), linger=0), Publisher(MemorySink(), linger=0.05)
    async with Fanout([first, second]) as fanout:
        assert await fanout.publish({"n": 1}, durable=True)
        assert first.sink.events == second.sink.events == [b'{"n":1}']


async def test_an_event_is_encoded_once_for_all():
    """``emit_encoded`` queues the event as it is now; one that cannot be encoded is refused by each publisher."""
    publishers = [Publisher(MemorySink()), Publisher(MemorySink())]
    fanout = Fanout(publishers)
    event = {"n": 1}
    assert fanout.emit_encoded(event)
    event["n"] = 2
    assert not fanout.emit_encoded({"n": object()})
    await fanout.close()
    for publisher in publishers:
        assert publisher.sink.events == [b'{"n":1}']
        assert publisher.stats()["refused"] == {"encode": 1}


async def test_a_manager_shows_every_flusher_and_closes_all(make_manager):
    """``shutdown`` flushes and closes the publishers of a fan-out."""
    manager = make_manager()
    publishers = [Publisher(MemorySink(), name="first"), Publisher(MemorySink(), name="second")]
    fanout = Fanout(publishers, manager=manager)
    assert fanout.manager is manager
    assert fanout.emit({"n": 1})
    await until(lambda: len(manager.get_task_info()) == 2)
    assert {info["name"] for info in manager.get_task_info()} == {"publisher first", "publisher second"}
    await manager.shutdown()
    for publisher in publishers:
        assert publisher.sink.events == [b'{"n":1}']
        assert publisher.stats()["state"] == "closed"


def test_only_publishers_of_bytes_are_accepted():
    """Anything else is refused when the fan-out is made."""

    class OtherPublisher:
        async def publish(self, event):
            """Take one event."""

    for publishers in ([object()], [Publisher(PublishSink(OtherPublisher()))], [MemorySink()]):
        with pytest.raises(InvalidOptionError, match="needs publishers whose sinks take bytes"):
            Fanout(publishers)
    with pytest.raises(InvalidOptionError, match="at least one publisher"):
        Fanout([])
