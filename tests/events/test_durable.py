"""``publish(event, durable=True)``: what it returns follows the event itself, and impossible promises are refused."""

from __future__ import annotations

import asyncio

import pytest
from event_tools import ScriptedSink, assert_counters_add_up, scripted, until
from requirements import need

from bgtasks.errors import InvalidOptionError
from bgtasks.events import Fanout, Publisher, Reject
from bgtasks.events.sinks.console import ConsoleSink
from bgtasks.events.sinks.memory import MemorySink
from bgtasks.events.sinks.publish import PublishSink
from bgtasks.events.spool import Spool

need("msgspec")

pytestmark = pytest.mark.usefixtures("queue_of_twin")


@pytest.fixture
def stem(tmp_path):
    """Give the stem of the files of a spool."""
    return tmp_path / "events"


class PickySink(ScriptedSink):
    """Rejects events that begin with ``bad``; keeps the types of the others."""

    def __init__(self, script=()):
        super().__init__(script)
        self.types = set()

    async def write(self, batch, batch_id):
        """Write the other events."""
        self.types |= set(map(type, batch))
        bad = [index for index, event in enumerate(batch) if event.startswith(b"bad")]
        await super().write([event for event in batch if not event.startswith(b"bad")], batch_id)
        if bad:
            raise Reject(bad, "bad")


@pytest.mark.parametrize("has_spool", [False, True], ids=["", "spool"])
async def test_the_loss_of_other_events_does_not_matter(stem, has_spool):
    """An event that arrives is reported as such, whatever happens to others in its batch and meanwhile."""
    publisher = scripted(sink=PickySink, spool=stem if has_spool else None, max_event_bytes=100)
    for number in range(50):
        publisher.emit(b"bad %d" % number)
        publisher.emit({"too large": "x" * 200})
        assert await publisher.publish(b"good %d" % number, durable=True)
    await publisher.close()
    assert publisher.sink.events == [b"good %d" % number for number in range(50)]
    # A sink gets plain bytes.
    assert publisher.sink.types == {bytes}
    assert publisher.stats()["dropped"] == {"rejected": 50, "too_large": 50}
    assert_counters_add_up(publisher.stats())


async def test_an_event_that_is_dropped_is_reported_as_such(tmp_path):
    """Rejected, given up, too large, not encodable, dropped by close: False each time, and the counters add up."""
    publisher = scripted(sink=PickySink, max_event_bytes=100)
    assert not await publisher.publish(b"bad", durable=True)
    assert not await publisher.publish(b"x" * 200, durable=True)
    assert not await publisher.publish({"large": "x" * 200}, durable=True)
    assert not await publisher.publish(object(), durable=True)
    assert publisher.stats()["refused"] == {"too_large": 2, "encode": 1}
    await publisher.close()
    assert not await publisher.publish(b"late", durable=True)
    assert_counters_add_up(publisher.stats())

    publisher = scripted([OSError("down")] * 1000, retry_for=0.0, dead_letters=tmp_path / "dead")
    assert not await publisher.publish(b"unlucky", durable=True)
    await publisher.close()

    publisher = scripted([OSError("down")] * 100_000, dead_letters=tmp_path / "dead")
    publishing = asyncio.create_task(publisher.publish(b"unlucky", durable=True))
    await until(lambda: publisher.stats()["retried"])
    await publisher.close(0.05)
    assert not await publishing


async def test_halves_are_told_apart():
    """If a sink does not say which event it refuses, only that event is reported as dropped."""

    class Halving(ScriptedSink):
        async def write(self, batch, batch_id):
            if b"bad" in batch:
                raise Reject(reason="bad in here")
            await super().write(batch, batch_id)

    publisher = scripted(sink=Halving, linger=0.05)
    events = [b"1", b"2", b"bad", b"3", b"3"]
    outcomes = await asyncio.gather(*(publisher.publish(event, durable=True) for event in events))
    assert outcomes == [True, True, False, True, True]
    await publisher.close()


async def test_an_event_that_a_full_queue_drops_is_reported():
    """With drop_oldest, a queued event may be dropped for newer ones."""
    gate = asyncio.Event()

    async def wait(batch, batch_id):
        await gate.wait()

    publisher = scripted([wait], overflow="drop_oldest", max_events=4, batch=1)
    publisher.emit(b"0")
    await until(lambda: publisher.sink.calls)
    publishing = asyncio.create_task(publisher.publish(b"1", durable=True))
    await asyncio.sleep(0)
    for number in range(4):
        publisher.emit(b"%d" % number)
    assert not await publishing
    gate.set()
    await publisher.close()
    assert publisher.stats()["dropped"] == {"full": 1}


async def test_it_does_not_wait_out_the_linger(stem):
    """Its batch is due at once, and so are batches behind it; other events linger as before."""
    for spool in (None, stem):
        publisher = scripted(linger=600.0, batch=2, spool=spool)
        for _ in range(10):
            async with asyncio.timeout(20):
                assert all(await asyncio.gather(*(publisher.publish(b"x", durable=True) for _ in range(5))))
        publisher.emit(b"y")
        await until(lambda publisher=publisher: publisher.stats()["delivered"] == 50)
        # A batch leaves the queue's count once all that belongs to its delivery is done.
        await until(lambda publisher=publisher: publisher.stats()["queue_events"] == 1)
        await publisher.close()


async def test_a_locked_spool_does_not_promise_what_no_disk_has(stem):
    """If the spool cannot be opened, the event counts as durable only if the sink keeps it."""

    class Forgetful(ScriptedSink):
        is_durable = False

    spool = Spool(stem)
    spool.append([b"x"], "1")
    try:
        for sink, expected in ((Forgetful, False), (ScriptedSink, True)):
            publisher = scripted(sink=sink, spool=stem)
            assert await publisher.publish(b"1", durable=True) is expected
            assert publisher.sink.events == [b"1"]
            assert "in use by another publisher" in publisher.stats()["last_error"]
            await publisher.close()
    finally:
        spool.done("1")
        spool.close()


async def test_impossible_promises_are_refused(stem, capsys):
    """Without a spool, a sink that keeps nothing cannot be durable; nothing is queued then, in a fan-out neither."""

    class Other:
        async def publish(self, event):
            pass

    with pytest.raises(InvalidOptionError, match="PublishSink takes events as they were emitted"):
        Publisher(PublishSink(Other()), spool=stem)
    for sink in (PublishSink(Other()), ConsoleSink()):
        publisher = Publisher(sink)
        with pytest.raises(InvalidOptionError, match="needs a spool"):
            await publisher.publish(b"1", durable=True)
        assert publisher.stats()["accepted"] == 0
        await publisher.close()
    console, memory = Publisher(ConsoleSink()), Publisher(MemorySink())
    async with Fanout([memory, console]) as fanout:
        with pytest.raises(InvalidOptionError, match="needs a spool"):
            await fanout.publish(b"1", durable=True)
        assert memory.stats()["accepted"] == 0
    async with Fanout([Publisher(MemorySink()), Publisher(ConsoleSink(), spool=stem)]) as fanout:
        assert await fanout.publish(b"1", durable=True)
    assert capsys.readouterr().out == "1\n"


def test_channels_keep_nothing():
    """Subjects of core NATS and channels of Redis reach those who listen just then."""
    need("nats")
    need("redis")
    from bgtasks.events.sinks.nats import NatsSink
    from bgtasks.events.sinks.redis import RedisSink

    assert not NatsSink(jetstream=False).is_durable
    assert not RedisSink(mode="pubsub").is_durable
    assert NatsSink().is_durable
    assert RedisSink(mode="list").is_durable
