"""Several batches on their way at once (``inflight``), and order without it; on both rings and all loops."""

from __future__ import annotations

import asyncio
import random
import time

import msgspec
import pytest
from event_tools import ScriptedPublisher, assert_books_close, until
from loops import LOOPS

from bgtasks import InvalidOptionError
from bgtasks.events import Reject, Retry
from bgtasks.events import _delivery as delivery_module
from bgtasks.events.sinks.fanout import FanoutPublisher
from bgtasks.events.sinks.jsonl import JsonlPublisher
from bgtasks.events.sinks.memory import MemoryPublisher

pytestmark = pytest.mark.usefixtures("ring_of_twin", "_quick_retries")


@pytest.fixture
def _quick_retries(monkeypatch):
    """Keep the form of the back-off and shorten it."""
    monkeypatch.setattr(delivery_module, "FIRST_DELAY", 0.0005)
    monkeypatch.setattr(delivery_module, "LONGEST_DELAY", 0.002)


class Held(ScriptedPublisher):
    """Holds every write until it is let go, and looks that none of them has its client closed under it.

    ``faults`` are what the next write of a batch with that first event raises, one after another.
    """

    def __init__(self, inflight=3, faults=(), **options):
        super().__init__(inflight=inflight, **{"batch": 2, **options})
        self.faults = {first: list(errors) for first, errors in dict(faults).items()}
        self.gates = {}
        self.writing = []
        self.most = 0
        self.is_open = False
        self.free = False

    async def open(self):
        """Open once."""
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

    async def release(self):
        """Close."""
        assert not self.writing
        self.is_open = False
        await super().release()

    def let_go(self, first=None):
        """Let one write go on, or all of them for ever."""
        if first is None:
            self.free = True
            for gate in self.gates.values():
                gate.set()
        else:
            self.gates.pop(first).set()

    def emit_numbers(self, count):
        """Emit so many events."""
        for number in range(count):
            assert self.emit(b"%d" % number)


def numbers(count):
    """Return the events of ``emit_numbers``."""
    return [b"%d" % number for number in range(count)]


def assert_each_once(publisher, count):
    """Fail unless so many events arrived, each once, and were counted so."""
    assert sorted(publisher.events) == sorted(numbers(count))
    stats = publisher.stats()
    assert stats["delivered"] == stats["accepted"] == count
    assert_books_close(stats)


async def test_one_batch_is_in_flight_by_default_and_order_holds():
    """The promise without the option."""
    publisher = Held(inflight=1, faults={b"4": [OSError("down"), Retry()]})
    publisher.emit_numbers(20)
    await until(lambda: publisher.writing)
    for _ in range(20):
        await asyncio.sleep(0)
    publisher.let_go()
    await publisher.close()
    assert publisher.most == 1
    assert publisher.events == numbers(20)
    assert_each_once(publisher, 20)


async def test_so_many_are_written_at_once_and_no_more():
    """Each has its own id; the queue holds the rest, and the books close all the while."""
    publisher = Held(inflight=3)
    publisher.emit_numbers(20)
    await until(lambda: len(publisher.writing) == 3)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(publisher.writing) == len(set(publisher.writing)) == 3
    assert publisher.stats()["queue_events"] == 20
    publisher.let_go(b"2")
    await until(lambda: b"6" in publisher.gates)
    assert publisher.events == [b"2", b"3"]
    assert publisher.stats()["queue_events"] == 18
    assert_books_close(publisher.stats())
    publisher.let_go()
    report = await publisher.close()
    assert report["status"] == "flushed"
    assert publisher.most == 3
    assert len({batch_id for batch_id, _ in publisher.calls}) == 10
    assert publisher.opened == publisher.released == 1
    assert_each_once(publisher, 20)


async def test_one_batch_is_tried_again_while_others_pass(caplog):
    """Same bytes, same id; the state stays, and the log says it once, until the last one is through."""
    publisher = Held(faults={b"0": [Retry()] * 1_000_000})
    publisher.free = True
    publisher.emit_numbers(20)
    await until(lambda: len(publisher.events) == 18 and publisher.stats()["retried"] > 5)
    stats = publisher.stats()
    assert stats["state"] == "retrying"
    assert stats["last_error"]
    assert stats["queue_events"] == 2
    assert_books_close(stats)
    assert len({batch_id for batch_id, batch in publisher.calls if b"0" in batch}) == 1
    publisher.faults.clear()
    await publisher.flush(20)
    assert publisher.stats()["state"] == "ok"
    await publisher.close()
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    assert_each_once(publisher, 20)


async def test_flush_and_durable_wait_for_the_batch_that_was_overtaken():
    """So many others delivered are not the ones that were asked for."""
    publisher = Held()
    published = asyncio.create_task(publisher.publish(b"0", durable=True))
    await until(lambda: publisher.writing)
    flushed = asyncio.create_task(publisher.flush(20))
    await asyncio.sleep(0)
    for number in range(1, 9):
        publisher.emit(b"%d" % number)
    await until(lambda: len(publisher.writing) == 3)
    publisher.let_go(b"1")
    publisher.let_go(b"3")
    await until(lambda: publisher.stats()["delivered"] == 4)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not published.done()
    assert not flushed.done()
    assert publisher.stats()["oldest_age"] > 0
    publisher.let_go(b"0")
    assert await published
    assert (await flushed)["delivered"] >= 1
    publisher.let_go()
    await publisher.close()
    assert_each_once(publisher, 9)


async def test_a_client_is_not_closed_under_other_writes():
    """Who fails waits for them; who comes meanwhile waits for the client that is opened then."""
    publisher = Held(inflight=3, faults={b"0": [OSError("broken pipe")], b"4": [OSError("so it is")]})
    publisher.emit_numbers(10)
    await until(lambda: len(publisher.writing) == 3)
    publisher.let_go(b"0")
    publisher.let_go(b"2")
    await until(lambda: publisher.events)
    for _ in range(20):
        await asyncio.sleep(0.0005)
    assert len(publisher.writing) == 1
    assert publisher.released == 0
    assert publisher.stats()["state"] == "retrying"
    publisher.let_go(b"4")
    await until(lambda: len(publisher.writing) == 3)
    # Two writes failed on one client.
    assert publisher.opened == 2
    assert publisher.released == 1
    publisher.let_go()
    await publisher.close()
    assert publisher.opened == publisher.released == 2
    assert_each_once(publisher, 10)


async def test_a_sink_that_cannot_be_opened_is_tried_by_all_and_closed_by_none():
    """A failed open has nothing to close, least of all what another one opened."""

    class Closed(Held):
        refusals = 5

        async def open(self):
            if self.refusals:
                self.refusals -= 1
                await asyncio.sleep(0)
                raise OSError("not yet")
            await super().open()

    publisher = Closed()
    publisher.emit_numbers(6)
    await until(lambda: len(publisher.writing) == 3)
    publisher.let_go()
    await publisher.close()
    assert publisher.opened == publisher.released == 1
    assert_each_once(publisher, 6)


async def test_each_batch_is_halved_by_itself(tmp_path):
    """Poison in several batches at once ends among the dead letters, alone."""
    bad = {b"1", b"8", b"17", b"30", b"31"}

    class Picky(Held):
        async def write(self, batch, batch_id):
            await super().write([event for event in batch if event not in bad] or [b"none"], batch_id)
            if bad.intersection(batch):
                del self.events[-len([event for event in batch if event not in bad] or [b"none"]) :]
                raise Reject(reason="bad in here")

    publisher = Picky(batch=8, dead_letters=tmp_path / "dead.jsonl")
    publisher.emit_numbers(32)
    await until(lambda: len(publisher.writing) == 3)
    publisher.let_go()
    report = await publisher.close()
    assert report["status"] == "flushed"
    assert sorted(publisher.events) == sorted(set(numbers(32)) - bad)
    stats = publisher.stats()
    assert stats["dropped"] == {"rejected": 5}
    assert_books_close(stats)
    letters = [msgspec.json.decode(line) for line in (tmp_path / "dead.jsonl").read_bytes().splitlines()]
    assert sorted(letter["event"].encode() for letter in letters) == sorted(bad)


async def test_a_batch_is_given_up_by_itself():
    """retry_for is a batch's own."""
    publisher = Held(faults={b"2": [Retry()] * 1_000_000}, retry_for=0.01)
    publisher.free = True
    publisher.emit_numbers(10)
    report = await publisher.close()
    assert report["status"] == "flushed"
    stats = publisher.stats()
    assert stats["dropped"] == {"retries_exhausted": 2}
    assert stats["delivered"] == 8
    assert_books_close(stats)


async def test_settled_batches_are_not_kept_behind_one_that_is_not():
    """Memory is bounded by what is in flight."""
    publisher = Held(inflight=2)
    publisher.emit(b"stuck")
    publisher.emit(b"too")
    await until(lambda: publisher.writing)
    publisher.free = True
    publisher.emit_numbers(1000)
    await until(lambda: len(publisher.events) == 1000)
    assert len(publisher._flusher._pending) == 1
    publisher.let_go()
    await publisher.close()


@pytest.mark.parametrize("swallows", [False, True], ids=["hanging", "stubborn"])
async def test_close_returns_by_its_deadline_though_all_writes_hang(swallows):
    """The books close, and late answers change nothing."""
    gate = asyncio.Event()

    async def hang(batch, batch_id):
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                if not swallows:
                    raise

    publisher = ScriptedPublisher([hang] * 10, inflight=3, batch=2)
    for event in numbers(20):
        publisher.emit(event)
    await until(lambda: len(publisher.calls) == 3)
    begun = time.monotonic()
    report = await publisher.close(0.3)
    assert time.monotonic() - begun < 5
    assert report["status"] == "deadline"
    assert report["dropped"] == 20
    stats = publisher.stats()
    assert stats["dropped"] == {"deadline": 20}
    assert_books_close(stats)
    gate.set()
    await asyncio.wait((publisher._flusher._task,))
    assert publisher.stats() == stats
    assert len(publisher.calls) == 3


async def test_a_flusher_that_is_cancelled_in_the_middle_neither_loses_nor_repeats():
    """What was in flight is written again with its id, by the flusher in its last second or by the next one."""
    publisher = Held(inflight=4)
    publisher.emit_numbers(20)
    await until(lambda: len(publisher.writing) == 4)
    publisher.let_go(b"2")
    await until(lambda: publisher.events)
    publisher._flusher._task.cancel()
    await asyncio.sleep(0)
    # Once more, in the middle of stopping.
    publisher._flusher._task.cancel()
    await until(lambda: publisher._flusher._task.done())
    assert not publisher.writing
    assert publisher.stats()["queue_events"] == 18
    assert_books_close(publisher.stats())
    publisher.let_go()
    report = await publisher.close()
    assert report["status"] == "flushed"
    contents = {}
    for batch_id, batch in publisher.calls:
        assert contents.setdefault(batch_id, batch) == batch
    assert_each_once(publisher, 20)


@pytest.mark.parametrize("inflight", [1, 3])
async def test_a_flush_that_begins_while_the_flusher_ends_goes_on_with_the_next_one(inflight):
    """No event comes that would start it; nor is ``durable`` left waiting."""

    async def hang(batch, batch_id):
        await asyncio.Event().wait()

    publisher = ScriptedPublisher([hang] * 2, inflight=inflight, batch=2)
    publisher.emit(b"0")
    await until(lambda: publisher.calls)
    flusher = publisher._flusher._task
    flusher.cancel()
    # Its last flush hangs, too.
    await until(lambda: len(publisher.calls) == 2)
    published = asyncio.create_task(publisher.publish(b"1", durable=True))
    flushed = asyncio.create_task(publisher.flush(20))
    await until(lambda: publisher.stats()["accepted"] == 2)
    assert publisher._flusher.progress
    publisher.script.clear()
    flusher.cancel()
    assert (await flushed)["status"] == "flushed"
    assert await published
    await publisher.close()
    assert_each_once(publisher, 2)


async def test_cancelling_at_random_neither_loses_nor_repeats():
    """Wherever flusher and writes stand; the sink keeps a batch in the same step as it returns."""

    class Slow(Held):
        async def write(self, batch, batch_id):
            for _ in range(random.randrange(4)):
                await asyncio.sleep(0)
            if random.random() < 0.2:
                raise random.choice([Retry(), OSError("down")])
            await super().write(batch, batch_id)

    publisher = Slow(inflight=4)
    publisher.free = True
    count = 400
    for number in range(count):
        publisher.emit(b"%d" % number)
        if number % 10 == 0:
            for _ in range(random.randrange(12)):
                await asyncio.sleep(0)
            publisher._flusher._task.cancel()
            assert_books_close(publisher.stats())
    report = await publisher.close(30)
    assert report["status"] == "flushed"
    assert_each_once(publisher, count)


async def test_whoever_cancels_a_write_cancels_the_flusher():
    """Its batch is written again, by the flusher's last flush or by the next flusher; nothing is stuck."""
    publisher = Held(inflight=2)
    publisher.emit_numbers(4)
    await until(lambda: len(publisher.writing) == 2)
    flusher = publisher._flusher._task
    (task, *_) = [task for task in asyncio.all_tasks() if task.get_name().endswith("a batch")]
    task.cancel()
    publisher.free = True
    await until(lambda: flusher.done())
    assert flusher.cancelled()
    await publisher.close()
    assert_each_once(publisher, 4)


def test_a_loop_that_ends_has_the_last_flush_and_the_next_loop_the_rest(loop_kind):
    """asyncio.run cancels flusher and writes at once."""
    publisher = Held(inflight=3)

    async def first(count):
        publisher.emit_numbers(count)
        await until(lambda: len(publisher.writing) == 3)
        publisher.let_go(b"2")
        await until(lambda: publisher.events)

    async def second():
        publisher.free = True
        publisher.emit(b"12")
        return await publisher.close()

    with asyncio.Runner(debug=True, loop_factory=LOOPS[loop_kind]) as runner:
        runner.run(first(12))
    assert not publisher.writing
    assert publisher.stats()["queue_events"] == 10
    assert_books_close(publisher.stats())
    with asyncio.Runner(loop_factory=LOOPS[loop_kind]) as runner:
        report = runner.run(second())
    assert report["status"] == "flushed"
    assert_each_once(publisher, 13)


def test_a_loop_that_ends_empties_the_queue(loop_kind):
    """The last flush has several in flight, too."""
    publisher = Held(inflight=3)
    publisher.free = True

    async def main():
        publisher.emit_numbers(50)

    with asyncio.Runner(debug=True, loop_factory=LOOPS[loop_kind]) as runner:
        runner.run(main())
    assert_each_once(publisher, 50)
    assert publisher.opened == publisher.released


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2", None], ids=repr)
def test_inflight_is_a_whole_number(wrong):
    """Like its neighbours."""
    with pytest.raises(InvalidOptionError, match="inflight must be a whole number, 1 or more"):
        MemoryPublisher(inflight=wrong)


def test_a_spool_has_one_batch_in_flight(tmp_path):
    """It keeps order; the error says what to leave out."""
    with pytest.raises(InvalidOptionError, match="leave out inflight, or spool"):
        MemoryPublisher(inflight=2, spool=tmp_path / "spool")
    assert not (tmp_path / "spool").exists()
    MemoryPublisher(inflight=1, spool=tmp_path / "spool")


def test_a_sink_that_can_write_one_batch_at_a_time_says_so(tmp_path):
    """One connection, one file, one thread."""
    with pytest.raises(InvalidOptionError, match="at most 1 for JsonlPublisher"):
        JsonlPublisher(tmp_path / "events.jsonl", inflight=2)
    with pytest.raises(InvalidOptionError, match="at most 1 for FanoutPublisher"):
        FanoutPublisher([MemoryPublisher()], inflight=2)
    assert JsonlPublisher(tmp_path / "events.jsonl", inflight=1)
