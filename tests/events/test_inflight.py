"""Several batches in flight at once (``inflight``), and order without it; on both twins and all loops."""

from __future__ import annotations

import asyncio
import random
import time

import msgspec
import pytest
from event_tools import ScriptedSink, assert_counters_add_up, scripted, until
from loops import LOOPS

from bgtasks import InvalidOptionError
from bgtasks.events import Publisher, Reject, Retry
from bgtasks.events import _delivery as delivery_module
from bgtasks.events.sinks.jsonl import JsonlSink
from bgtasks.events.sinks.memory import MemorySink

pytestmark = pytest.mark.usefixtures("queue_of_twin", "_quick_retries")


@pytest.fixture
def _quick_retries(monkeypatch):
    """Shorten the delays of the back-off."""
    monkeypatch.setattr(delivery_module, "FIRST_DELAY", 0.0005)
    monkeypatch.setattr(delivery_module, "LONGEST_DELAY", 0.002)


class HeldSink(ScriptedSink):
    """Holds every write until it is released, and checks that the client is not closed during a write.

    ``faults`` has, by the first event of a batch, the errors that its writes raise one after another.
    """

    def __init__(self, faults=()):
        super().__init__()
        self.faults = {first: list(errors) for first, errors in dict(faults).items()}
        self.gates = {}
        self.writing = []
        self.most = 0
        self.is_open = False
        self.free = False

    async def open(self):
        """Fail if the sink is open already."""
        assert not self.is_open
        await super().open()
        self.is_open = True

    async def write(self, batch, batch_id):
        """Wait, then fail or keep the batch."""
        self.calls.append((batch_id, list(batch)))
        assert batch_id not in self.writing
        self.writing.append(batch_id)
        self.most = max(self.most, len(self.writing))
        try:
            if not self.free:
                gate = self.gates[batch[0]] = asyncio.Event()
                await gate.wait()
            assert self.is_open
        finally:
            self.writing.remove(batch_id)
        errors = self.faults.get(batch[0])
        if errors:
            raise errors.pop(0)
        self.events.extend(batch)

    async def close(self):
        """Fail if a write is running."""
        assert not self.writing
        self.is_open = False
        await super().close()

    def let_go(self, first=None):
        """Release one write, or all present and future ones."""
        if first is None:
            self.free = True
            for gate in self.gates.values():
                gate.set()
        else:
            self.gates.pop(first).set()


def held(inflight=3, faults=(), *, sink=HeldSink, **options):
    """Return a publisher with a ``HeldSink``."""
    return Publisher(sink(faults), inflight=inflight, **{"batch": 2, "linger": 0.001, **options})


def emit_numbers(publisher, count):
    """Emit events numbered from 0."""
    for number in range(count):
        assert publisher.emit(b"%d" % number)


def numbers(count):
    """Return the events of ``emit_numbers``."""
    return [b"%d" % number for number in range(count)]


def assert_each_once(publisher, count):
    """Fail unless ``count`` events arrived, each once, and were counted."""
    assert sorted(publisher.sink.events) == sorted(numbers(count))
    stats = publisher.stats()
    assert stats["delivered"] == stats["accepted"] == count
    assert_counters_add_up(stats)


async def test_one_batch_is_in_flight_by_default_and_order_holds():
    """Without ``inflight``, batches are written one by one and in order."""
    publisher = held(inflight=1, faults={b"4": [OSError("down"), Retry()]})
    emit_numbers(publisher, 20)
    await until(lambda: publisher.sink.writing)
    for _ in range(20):
        await asyncio.sleep(0)
    publisher.sink.let_go()
    await publisher.close()
    assert publisher.sink.most == 1
    assert publisher.sink.events == numbers(20)
    assert_each_once(publisher, 20)


async def test_at_most_inflight_batches_are_written_at_once():
    """Each batch has its own id; the queue holds the other events, and the counters add up at all times."""
    publisher = held(inflight=3)
    emit_numbers(publisher, 20)
    await until(lambda: len(publisher.sink.writing) == 3)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(publisher.sink.writing) == len(set(publisher.sink.writing)) == 3
    assert publisher.stats()["queue_events"] == 20
    publisher.sink.let_go(b"2")
    await until(lambda: b"6" in publisher.sink.gates)
    assert publisher.sink.events == [b"2", b"3"]
    assert publisher.stats()["queue_events"] == 18
    assert_counters_add_up(publisher.stats())
    publisher.sink.let_go()
    report = await publisher.close()
    assert report["status"] == "flushed"
    assert publisher.sink.most == 3
    assert len({batch_id for batch_id, _ in publisher.sink.calls}) == 10
    assert publisher.sink.opened == publisher.sink.closed == 1
    assert_each_once(publisher, 20)


async def test_a_batch_is_retried_while_others_pass(caplog):
    """A failing batch is retried with the same bytes and id while others pass; the failure is logged once."""
    publisher = held(faults={b"0": [Retry()] * 1_000_000})
    publisher.sink.free = True
    emit_numbers(publisher, 20)
    await until(lambda: len(publisher.sink.events) == 18 and publisher.stats()["retried"] > 5)
    stats = publisher.stats()
    assert stats["state"] == "retrying"
    assert stats["last_error"]
    assert stats["queue_events"] == 2
    assert_counters_add_up(stats)
    assert len({batch_id for batch_id, batch in publisher.sink.calls if b"0" in batch}) == 1
    publisher.sink.faults.clear()
    await publisher.flush(20)
    assert publisher.stats()["state"] == "ok"
    await publisher.close()
    records = [record for record in caplog.records if record.name == "bgtasks.events"]
    assert len([record for record in records if record.levelname == "WARNING"]) == 1
    assert_each_once(publisher, 20)


async def test_flush_and_durable_wait_for_the_batch_that_was_overtaken():
    """Flush and durable wait for their own events, not for any equal number of events."""
    publisher = held()
    published = asyncio.create_task(publisher.publish(b"0", durable=True))
    await until(lambda: publisher.sink.writing)
    flushed = asyncio.create_task(publisher.flush(20))
    await asyncio.sleep(0)
    for number in range(1, 9):
        publisher.emit(b"%d" % number)
    await until(lambda: len(publisher.sink.writing) == 3)
    publisher.sink.let_go(b"1")
    publisher.sink.let_go(b"3")
    await until(lambda: publisher.stats()["delivered"] == 4)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not published.done()
    assert not flushed.done()
    assert publisher.stats()["oldest_age_seconds"] > 0
    publisher.sink.let_go(b"0")
    assert await published
    assert (await flushed)["delivered"] >= 1
    publisher.sink.let_go()
    await publisher.close()
    assert_each_once(publisher, 9)


async def test_a_client_is_not_closed_under_other_writes():
    """A failed write waits for the other writes before it closes the client; new writes wait for the next client."""
    publisher = held(inflight=3, faults={b"0": [OSError("broken pipe")], b"4": [OSError("so it is")]})
    emit_numbers(publisher, 10)
    await until(lambda: len(publisher.sink.writing) == 3)
    publisher.sink.let_go(b"0")
    publisher.sink.let_go(b"2")
    await until(lambda: publisher.sink.events)
    for _ in range(20):
        await asyncio.sleep(0.0005)
    assert len(publisher.sink.writing) == 1
    assert publisher.sink.closed == 0
    assert publisher.stats()["state"] == "retrying"
    publisher.sink.let_go(b"4")
    await until(lambda: len(publisher.sink.writing) == 3)
    # Two writes failed on one client.
    assert publisher.sink.opened == 2
    assert publisher.sink.closed == 1
    publisher.sink.let_go()
    await publisher.close()
    assert publisher.sink.opened == publisher.sink.closed == 2
    assert_each_once(publisher, 10)


async def test_a_sink_that_cannot_be_opened_is_not_closed():
    """After a failed open nothing is closed; every batch tries to open the sink."""

    class Closed(HeldSink):
        refusals = 5

        async def open(self):
            if self.refusals:
                self.refusals -= 1
                await asyncio.sleep(0)
                raise OSError("not yet")
            await super().open()

    publisher = held(sink=Closed)
    emit_numbers(publisher, 6)
    await until(lambda: len(publisher.sink.writing) == 3)
    publisher.sink.let_go()
    await publisher.close()
    assert publisher.sink.opened == publisher.sink.closed == 1
    assert_each_once(publisher, 6)


async def test_each_batch_is_halved_alone(tmp_path):
    """Bad events of several batches at once go to the dead letters, and no others."""
    bad = {b"1", b"8", b"17", b"30", b"31"}

    class Picky(HeldSink):
        async def write(self, batch, batch_id):
            await super().write([event for event in batch if event not in bad] or [b"none"], batch_id)
            if bad.intersection(batch):
                del self.events[-len([event for event in batch if event not in bad] or [b"none"]) :]
                raise Reject(reason="bad in here")

    publisher = held(sink=Picky, batch=8, dead_letters=tmp_path / "dead.jsonl")
    emit_numbers(publisher, 32)
    await until(lambda: len(publisher.sink.writing) == 3)
    publisher.sink.let_go()
    report = await publisher.close()
    assert report["status"] == "flushed"
    assert sorted(publisher.sink.events) == sorted(set(numbers(32)) - bad)
    stats = publisher.stats()
    assert stats["dropped"] == {"rejected": 5}
    assert_counters_add_up(stats)
    letters = [msgspec.json.decode(line) for line in (tmp_path / "dead.jsonl").read_bytes().splitlines()]
    assert sorted(letter["event"].encode() for letter in letters) == sorted(bad)


async def test_a_batch_is_given_up_alone():
    """retry_for counts for each batch."""
    publisher = held(faults={b"2": [Retry()] * 1_000_000}, retry_for=0.01)
    publisher.sink.free = True
    emit_numbers(publisher, 10)
    report = await publisher.close()
    assert report["status"] == "flushed"
    stats = publisher.stats()
    assert stats["dropped"] == {"retries_exhausted": 2}
    assert stats["delivered"] == 8
    assert_counters_add_up(stats)


async def test_delivered_batches_are_freed_behind_one_in_flight():
    """Delivered batches are freed although an older one is still in flight."""
    publisher = held(inflight=2)
    publisher.emit(b"stuck")
    publisher.emit(b"too")
    await until(lambda: publisher.sink.writing)
    publisher.sink.free = True
    emit_numbers(publisher, 1000)
    await until(lambda: len(publisher.sink.events) == 1000)
    assert len(publisher._pending.batches) == 1
    publisher.sink.let_go()
    await publisher.close()


@pytest.mark.parametrize("swallows", [False, True], ids=["hanging", "stubborn"])
async def test_close_returns_in_time_though_all_writes_hang(swallows):
    """The counters add up, and late answers do not change them."""
    gate = asyncio.Event()

    async def hang(batch, batch_id):
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                if not swallows:
                    raise

    publisher = scripted([hang] * 10, inflight=3, batch=2)
    for event in numbers(20):
        publisher.emit(event)
    await until(lambda: len(publisher.sink.calls) == 3)
    begun = time.monotonic()
    report = await publisher.close(0.3)
    assert time.monotonic() - begun < 5
    assert report["status"] == "timeout"
    assert report["dropped"] == 20
    stats = publisher.stats()
    assert stats["dropped"] == {"timeout": 20}
    assert_counters_add_up(stats)
    gate.set()
    await asyncio.wait((publisher._flusher._task,))
    assert publisher.stats() == stats
    assert len(publisher.sink.calls) == 3


async def test_a_flusher_that_is_cancelled_in_the_middle_neither_loses_nor_repeats():
    """Batches in flight are written again with their ids, by the flusher's last flush or by the next flusher."""
    publisher = held(inflight=4)
    emit_numbers(publisher, 20)
    await until(lambda: len(publisher.sink.writing) == 4)
    publisher.sink.let_go(b"2")
    await until(lambda: publisher.sink.events)
    publisher._flusher._task.cancel()
    await asyncio.sleep(0)
    # Again, while it is stopping.
    publisher._flusher._task.cancel()
    await until(lambda: publisher._flusher._task.done())
    assert not publisher.sink.writing
    assert publisher.stats()["queue_events"] == 18
    assert_counters_add_up(publisher.stats())
    publisher.sink.let_go()
    report = await publisher.close()
    assert report["status"] == "flushed"
    contents = {}
    for batch_id, batch in publisher.sink.calls:
        assert contents.setdefault(batch_id, batch) == batch
    assert_each_once(publisher, 20)


@pytest.mark.parametrize("inflight", [1, 3])
async def test_a_flush_that_begins_while_the_flusher_ends_goes_on_with_the_next_one(inflight):
    """The flush starts the next flusher without a further event; ``durable`` does as well."""

    async def hang(batch, batch_id):
        await asyncio.Event().wait()

    publisher = scripted([hang] * 2, inflight=inflight, batch=2)
    publisher.emit(b"0")
    await until(lambda: publisher.sink.calls)
    flusher = publisher._flusher._task
    flusher.cancel()
    # Its last flush hangs as well.
    await until(lambda: len(publisher.sink.calls) == 2)
    published = asyncio.create_task(publisher.publish(b"1", durable=True))
    flushed = asyncio.create_task(publisher.flush(20))
    await until(lambda: publisher.stats()["accepted"] == 2)
    assert publisher._pending.progress
    publisher.sink.script.clear()
    flusher.cancel()
    assert (await flushed)["status"] == "flushed"
    assert await published
    await publisher.close()
    assert_each_once(publisher, 2)


async def test_cancelling_at_random_neither_loses_nor_repeats():
    """The flusher is cancelled at random points; the sink keeps a batch in the step in which it returns."""

    class Slow(HeldSink):
        async def write(self, batch, batch_id):
            for _ in range(random.randrange(4)):
                await asyncio.sleep(0)
            if random.random() < 0.2:
                raise random.choice([Retry(), OSError("down")])
            await super().write(batch, batch_id)

    publisher = held(inflight=4, sink=Slow)
    publisher.sink.free = True
    count = 400
    for number in range(count):
        publisher.emit(b"%d" % number)
        if number % 10 == 0:
            for _ in range(random.randrange(12)):
                await asyncio.sleep(0)
            publisher._flusher._task.cancel()
            assert_counters_add_up(publisher.stats())
    report = await publisher.close(30)
    assert report["status"] == "flushed"
    assert_each_once(publisher, count)


async def test_cancelling_a_write_cancels_the_flusher():
    """The batch is written again, by the flusher's last flush or by the next flusher."""
    publisher = held(inflight=2)
    emit_numbers(publisher, 4)
    await until(lambda: len(publisher.sink.writing) == 2)
    flusher = publisher._flusher._task
    (task, *_) = [task for task in asyncio.all_tasks() if task.get_name().endswith("a batch")]
    task.cancel()
    publisher.sink.free = True
    await until(lambda: flusher.done())
    assert flusher.cancelled()
    await publisher.close()
    assert_each_once(publisher, 4)


def test_events_left_by_a_loop_are_written_on_the_next_one(loop_kind):
    """asyncio.run cancels the flusher and its writes; the remaining events are written on the next loop."""
    publisher = held(inflight=3)

    async def first(count):
        emit_numbers(publisher, count)
        await until(lambda: len(publisher.sink.writing) == 3)
        publisher.sink.let_go(b"2")
        await until(lambda: publisher.sink.events)

    async def second():
        publisher.sink.free = True
        publisher.emit(b"12")
        return await publisher.close()

    with asyncio.Runner(debug=True, loop_factory=LOOPS[loop_kind]) as runner:
        runner.run(first(12))
    assert not publisher.sink.writing
    assert publisher.stats()["queue_events"] == 10
    assert_counters_add_up(publisher.stats())
    with asyncio.Runner(loop_factory=LOOPS[loop_kind]) as runner:
        report = runner.run(second())
    assert report["status"] == "flushed"
    assert_each_once(publisher, 13)


def test_a_loop_that_ends_empties_the_queue(loop_kind):
    """The last flush also writes several batches at once."""
    publisher = held(inflight=3)
    publisher.sink.free = True

    async def main():
        emit_numbers(publisher, 50)

    with asyncio.Runner(debug=True, loop_factory=LOOPS[loop_kind]) as runner:
        runner.run(main())
    assert_each_once(publisher, 50)
    assert publisher.sink.opened == publisher.sink.closed


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2", None], ids=repr)
def test_inflight_must_be_a_positive_whole_number(wrong):
    """``inflight`` must be a positive whole number."""
    with pytest.raises(InvalidOptionError, match="inflight must be a whole number, 1 or more"):
        Publisher(MemorySink(), inflight=wrong)


def test_a_spool_has_one_batch_in_flight(tmp_path):
    """A spool excludes ``inflight``, because it keeps the order; the error says so."""
    with pytest.raises(InvalidOptionError, match="leave out inflight, or spool"):
        Publisher(MemorySink(), inflight=2, spool=tmp_path / "spool")
    assert not (tmp_path / "spool").exists()
    Publisher(MemorySink(), inflight=1, spool=tmp_path / "spool")


def test_inflight_is_limited_by_the_sink(tmp_path):
    """``inflight`` must not exceed the ``max_inflight`` of a sink with one connection, file or thread."""
    with pytest.raises(InvalidOptionError, match="at most 1 for JsonlSink"):
        Publisher(JsonlSink(tmp_path / "events.jsonl"), inflight=2)
    assert Publisher(JsonlSink(tmp_path / "events.jsonl"), inflight=1)
