"""A publisher from emit to close: batches, lingering, threads, bounds, books; on both rings and all loops."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import logging
import operator
import threading
import time
import weakref

import msgspec
import pytest
from event_tools import ScriptedPublisher, assert_books_close, until
from loops import LOOPS

from bgtasks import InvalidOptionError
from bgtasks.events import BasePublisher
from bgtasks.events.sinks.memory import MemoryPublisher

pytestmark = pytest.mark.usefixtures("ring_of_twin")

FOREVER = 1000.0


async def test_what_is_emitted_arrives_encoded_and_in_order():
    """The usual case."""
    publisher = MemoryPublisher()
    assert all(publisher.emit({"number": number}) for number in range(1234))
    report = await publisher.close()
    assert [msgspec.json.decode(event)["number"] for event in publisher.events] == list(range(1234))
    assert [count for _, count in publisher.batches] == [500, 500, 234]
    assert report["status"] == "flushed"
    assert report["delivered"] == 1234
    stats = publisher.stats()
    assert stats["delivered"] == stats["accepted"] == 1234
    assert stats["state"] == "closed"
    assert_books_close(stats)


async def test_batch_ids_are_the_publishers_own_and_never_repeat():
    """A random id of the publisher, then a number."""
    first, second = MemoryPublisher(batch=2), MemoryPublisher(batch=2)
    for publisher in (first, second):
        for number in range(6):
            publisher.emit({"number": number})
        await publisher.close()
    ids = [batch_id for publisher in (first, second) for batch_id, _ in publisher.batches]
    assert len(set(ids)) == 6
    prefixes = {batch_id.rpartition("-")[0] for batch_id in ids}
    assert len(prefixes) == 2
    assert [batch_id.rpartition("-")[2] for batch_id in ids] == ["0", "1", "2"] * 2


async def test_a_full_batch_goes_without_lingering():
    """The ring wakes the flusher at the last event of a batch."""
    publisher = MemoryPublisher(batch=10, linger=FOREVER)
    for number in range(10):
        publisher.emit({"number": number})
    await until(lambda: len(publisher.events) == 10)
    for number in range(9):
        publisher.emit({"number": number})
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(publisher.events) == 10
    await publisher.close()
    assert len(publisher.events) == 19


async def test_a_batch_goes_when_it_has_its_bytes():
    """batch_bytes, exactly: what was only estimated is cut to size."""
    publisher = ScriptedPublisher(batch_bytes=1000, linger=FOREVER)
    publisher.emit(b"x" * 600)
    publisher.emit(b"x" * 600)
    await until(lambda: len(publisher.events) == 1)
    for _ in range(10):
        publisher.emit({"text": "y" * 390})
    publisher.emit(b"z" * 2000)
    await publisher.close()
    sizes = [[len(event) for event in batch] for _, batch in publisher.calls]
    assert all(sum(batch) <= 1000 or len(batch) == 1 for batch in sizes)
    assert functools.reduce(operator.iadd, sizes, []) == [600, 600] + [401] * 10 + [2000]


async def test_a_ring_smaller_than_a_batch_does_not_wait_for_the_linger_timer():
    """The flusher is woken before the ring refuses."""
    publisher = MemoryPublisher(max_events=10, batch=500, linger=FOREVER)
    for _ in range(20):
        for number in range(5):
            assert publisher.emit({"number": number})
        await until(lambda: not publisher.stats()["queue_events"])
    await publisher.close()


async def test_one_event_goes_after_lingering():
    """Nobody has to flush."""
    publisher = MemoryPublisher(linger=0.005)
    publisher.emit({"number": 1})
    await until(lambda: publisher.events)
    publisher.emit({"number": 2})
    await until(lambda: len(publisher.events) == 2)
    await publisher.close()


async def test_events_of_other_threads_go_without_anybodys_help():
    """The first event of a thread wakes a loop that sleeps; the books close."""
    publisher = MemoryPublisher(linger=0.001)
    await publisher.start()
    await asyncio.sleep(0)

    def produce(name):
        for number in range(2000):
            assert publisher.emit({"thread": name, "number": number})

    threads = [threading.Thread(target=produce, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    await until(lambda: len(publisher.events) == 8000)
    for thread in threads:
        thread.join()
    for name in range(4):
        own = [event for event in map(msgspec.json.decode, publisher.events) if event["thread"] == name]
        assert [event["number"] for event in own] == list(range(2000))
    report = await publisher.close()
    assert report["status"] == "flushed"
    assert_books_close(publisher.stats())


async def test_no_wake_up_an_event(monkeypatch):
    """A thousand events of another thread cost a handful of calls into the loop."""
    publisher = MemoryPublisher(batch=500, linger=FOREVER)
    await publisher.start()
    await asyncio.sleep(0)
    calls = 0
    waker = publisher._flusher._waker
    wake = waker.wake

    def count():
        nonlocal calls
        calls += 1
        wake()

    monkeypatch.setattr(waker, "wake", count, raising=False)
    await asyncio.to_thread(lambda: [publisher.emit({"number": number}) for number in range(1000)])
    await until(lambda: len(publisher.events) == 1000)
    assert calls <= 6
    await publisher.close()


def test_one_publisher_serves_loops_one_after_another(loop_kind):
    """Each asyncio.run empties the queue before it ends, without a close."""
    publisher = ScriptedPublisher(linger=FOREVER)

    async def main(number):
        assert publisher.emit({"number": number})

    for number in range(3):
        with asyncio.Runner(debug=True, loop_factory=LOOPS[loop_kind]) as runner:
            runner.run(main(number))
        assert len(publisher.events) == number + 1
    assert publisher.opened == publisher.released == 3
    assert publisher.stats()["delivered"] == 3


def test_a_write_that_a_dying_loop_interrupts_is_written_again_with_its_id(loop_kind):
    """What was in flight goes out on the next loop, same bytes, same id."""

    async def hang(batch, batch_id):
        await asyncio.sleep(FOREVER)

    publisher = ScriptedPublisher([hang, hang])

    async def first():
        publisher.emit(b"one")
        await until(lambda: publisher.calls)

    async def second():
        publisher.emit(b"two")
        return await publisher.close()

    with asyncio.Runner(loop_factory=LOOPS[loop_kind]) as runner:
        runner.run(first())
    assert_books_close(publisher.stats())
    assert publisher.stats()["queue_events"] == 1
    with asyncio.Runner(loop_factory=LOOPS[loop_kind]) as runner:
        report = runner.run(second())
    assert report["status"] == "flushed"
    assert publisher.events == [b"one", b"two"]
    assert publisher.calls[0] == publisher.calls[1] == publisher.calls[2]


def test_a_loop_that_is_closed_under_the_flusher_is_left_behind(loop_kind):
    """No cancellation came; a flush, or the event that fills a batch, starts anew elsewhere."""
    publisher = ScriptedPublisher(batch=2)
    loop = LOOPS[loop_kind]()

    async def begin():
        publisher.emit(b"one")

    loop.run_until_complete(begin())
    task = publisher._flusher._task
    loop.close()

    async def main():
        publisher.emit(b"two")
        publisher.emit(b"three")
        await until(lambda: len(publisher.events) == 3)
        await publisher.close()

    with asyncio.Runner(loop_factory=LOOPS[loop_kind]) as runner:
        runner.run(main())
    assert publisher.events == [b"one", b"two", b"three"]
    assert not task.done()
    # Its loop is closed: nobody else can end it.
    task._log_destroy_pending = False
    task.get_coro().close()


def test_events_emitted_before_any_loop_runs_wait_for_one():
    """From a thread without a loop, from module level."""
    publisher = ScriptedPublisher()
    assert publisher.emit(b"early")
    assert publisher.emit(b"also early")

    async def main():
        publisher.emit(b"late")
        await until(lambda: len(publisher.events) == 3)
        return await publisher.close()

    assert asyncio.run(main())["status"] == "flushed"
    assert publisher.events == [b"early", b"also early", b"late"]


async def test_a_flusher_that_others_cancel_comes_back_with_the_next_event():
    """cancel_all of whoever is no death of the publisher."""
    publisher = ScriptedPublisher()
    publisher.emit(b"one")
    publisher._flusher._task.cancel()
    await until(lambda: publisher._flusher._task.done())
    publisher.emit(b"two")
    await until(lambda: len(publisher.events) == 2)
    publisher._flusher._task.cancel()
    await until(lambda: publisher._flusher._task.done())
    assert publisher.emit(b"three")
    await publisher.close()
    assert publisher.events == [b"one", b"two", b"three"]


async def test_an_event_emitted_between_the_end_of_a_flusher_and_its_callbacks_waits_for_no_other():
    """The ring was not armed then, and no later event may ever come."""
    publisher = ScriptedPublisher()
    publisher.emit(b"one")
    publisher._flusher._task.cancel()
    asyncio.get_running_loop().call_soon(publisher.emit, b"two")
    await until(lambda: publisher.events == [b"one", b"two"])
    await publisher.close()


async def test_block_waits_for_room_and_nothing_grows():
    """The producer waits, emit refuses, every event that was accepted arrives."""
    gate = asyncio.Event()

    async def wait(batch, batch_id):
        await gate.wait()

    publisher = ScriptedPublisher([wait], overflow="block", max_events=4, batch=2)
    producing = asyncio.create_task(produce(publisher, 50))
    await until(lambda: publisher.stats()["queue_events"] >= 4 and publisher._flusher.room)
    for _ in range(20):
        await asyncio.sleep(0)
        assert publisher.stats()["queue_events"] <= 6
    assert not publisher.emit(b"no room")
    gate.set()
    assert await producing == 50
    report = await publisher.close()
    assert report["status"] == "flushed"
    assert publisher.events == [b"%d" % number for number in range(50)]
    assert publisher.stats()["refused"] == {"full": 1}


async def produce(publisher, count):
    """Publish, and count what was accepted."""
    return sum([await publisher.publish(b"%d" % number) for number in range(count)])


async def test_those_who_wait_for_room_are_told_of_the_end():
    """Close wakes them, and they get False."""
    never = asyncio.Event()

    async def wait(batch, batch_id):
        await never.wait()

    publisher = ScriptedPublisher([wait] * 9, overflow="block", max_events=1)
    producing = asyncio.create_task(produce(publisher, 9))
    await until(lambda: publisher._flusher.room)
    report = await publisher.close(0.05)
    assert report["status"] == "deadline"
    accepted = await producing
    stats = publisher.stats()
    assert accepted == stats["accepted"] == stats["dropped"]["deadline"]
    assert_books_close(stats)


async def test_a_waiting_producer_can_be_cancelled():
    """Its event is not accepted."""

    async def wait(batch, batch_id):
        await asyncio.sleep(FOREVER)

    publisher = ScriptedPublisher([wait] * 9, overflow="block", max_events=1)
    producing = asyncio.create_task(produce(publisher, 9))
    await until(lambda: publisher._flusher.room)
    accepted = publisher.stats()["accepted"]
    producing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await producing
    assert publisher.stats()["accepted"] == accepted
    assert not publisher._flusher.room
    await publisher.close(0)


async def test_close_returns_by_its_deadline_though_the_sink_hangs():
    """Even one that swallows its cancellation; the books close and the late answer changes nothing."""
    gate = asyncio.Event()

    async def stubborn(batch, batch_id):
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                continue

    publisher = ScriptedPublisher([stubborn])
    for number in range(3):
        publisher.emit({"number": number})
    await until(lambda: publisher.calls)
    publisher.emit({"number": 3})
    begun = time.monotonic()
    report = await publisher.close(0.3)
    assert time.monotonic() - begun < 2
    assert report["status"] == "deadline"
    assert report["dropped"] == 4
    stats = publisher.stats()
    assert stats["dropped"] == {"deadline": 4}
    assert_books_close(stats)
    task = publisher._flusher._task
    gate.set()
    await asyncio.wait((task,))
    assert publisher.stats()["dropped"] == {"deadline": 4}
    assert publisher.stats()["delivered"] == 0


async def test_close_is_once_and_emit_after_it_is_refused(caplog):
    """The second call gets the report of the first; what comes later is counted and told."""
    publisher = ScriptedPublisher()
    publisher.emit({"number": 1})
    first, second = await asyncio.gather(publisher.close(), publisher.close())
    assert first == second == await publisher.close()
    assert not publisher.emit({"number": 2})
    assert not await publisher.publish({"number": 3})
    assert not await publisher.publish({"number": 3}, durable=True)
    stats = publisher.stats()
    assert stats["refused"] == {"closed": 3}
    assert stats["accepted"] == stats["delivered"] == 1
    assert publisher._flusher._task.done()


async def test_a_publisher_can_be_closed_without_ever_having_been_used():
    """Nothing to flush, no client to close."""
    publisher = ScriptedPublisher()
    assert (await publisher.close())["status"] == "flushed"
    assert (await publisher.flush())["status"] == "flushed"
    assert publisher.opened == publisher.released == 0


async def test_flush_sends_what_lingers_and_reports_what_it_could_not():
    """By its deadline."""
    gate = asyncio.Event()

    async def wait(batch, batch_id):
        await gate.wait()

    publisher = ScriptedPublisher([None, wait], linger=FOREVER)
    publisher.emit({"number": 1})
    report = await publisher.flush(30)
    assert report["status"] == "flushed"
    assert report["delivered"] == 1
    publisher.emit({"number": 2})
    report = await publisher.flush(0.05)
    assert report["status"] == "deadline"
    assert report["queued"] == 1
    gate.set()
    await publisher.close()
    assert len(publisher.events) == 2


async def test_flush_and_close_from_another_loop():
    """A publisher may be ended from a thread with a loop of its own."""
    publisher = ScriptedPublisher(linger=FOREVER)
    publisher.emit({"number": 1})
    await asyncio.sleep(0)

    async def end():
        flushed = await publisher.flush(20)
        publisher.emit({"number": 2})
        return flushed, await publisher.close(20)

    flushed, closed = await asyncio.to_thread(asyncio.run, end())
    assert flushed["status"] == closed["status"] == "flushed"
    assert len(publisher.events) == 2
    assert publisher.released == 1


async def test_durable_waits_until_the_event_is_out_of_memory():
    """Without a spool: delivered; False when something was dropped meanwhile."""
    publisher = ScriptedPublisher()
    assert await publisher.publish({"number": 1}, durable=True)
    assert publisher.events == [b'{"number":1}']
    assert not await publisher.publish(object(), durable=True)
    assert publisher.stats()["refused"] == {"encode": 1}
    await publisher.close()


@dataclasses.dataclass
class Point:
    """A dataclass."""

    x: int


class Struct(msgspec.Struct):
    """A Struct."""

    x: int


async def test_what_can_be_encoded_is():
    """Struct, dataclass, mapping, bytes, pydantic models, also inside one another."""
    import pydantic

    class Model(pydantic.BaseModel):
        x: int

    publisher = MemoryPublisher()
    for event in (Struct(1), Point(1), {"x": 1}, b'{"x":1}', bytearray(b'{"x":1}'), Model(x=1)):
        assert publisher.emit(event)
    publisher.emit({"inner": [Model(x=1), Point(2)]})
    await publisher.close()
    assert publisher.events == [b'{"x":1}'] * 6 + [b'{"inner":[{"x":1},{"x":2}]}']


async def test_what_cannot_be_encoded_is_dropped_alone_and_its_type_named(caplog, tmp_path):
    """One in many: the others of its batch arrive."""
    publisher = MemoryPublisher(dead_letters=tmp_path / "dead.jsonl")
    for number in range(100):
        publisher.emit({"number": number} if number != 50 else {"inner": threading.Lock()})
    report = await publisher.close()
    assert report["delivered"] == 99
    assert len(publisher.events) == 99
    stats = publisher.stats()
    assert stats["dropped"] == {"encode": 1}
    assert_books_close(stats)
    assert "event of type dict" in caplog.text
    assert "_thread.lock" in caplog.text
    (letter,) = map(msgspec.json.decode, (tmp_path / "dead.jsonl").read_bytes().splitlines())
    assert letter["reason"] == "encode"
    assert "lock" in letter["object"]


async def test_flush_does_not_wait_for_what_came_to_nothing():
    """A batch of which no event can be encoded is over."""
    publisher = MemoryPublisher()
    publisher.emit(object())
    begun = time.monotonic()
    assert (await publisher.flush(30))["dropped"] == 1
    assert time.monotonic() - begun < 15
    await publisher.close()


async def test_encode_now_allows_changes_and_refuses_what_has_no_json():
    """encode="now"."""
    publisher = MemoryPublisher(encode="now")
    event = {"number": 1}
    assert publisher.emit(event)
    event["number"] = 2
    assert publisher.emit(event)
    assert not publisher.emit(object())
    assert "type object" in publisher.stats()["last_error"]
    await publisher.close()
    assert publisher.events == [b'{"number":1}', b'{"number":2}']
    assert publisher.stats()["refused"] == {"encode": 1}


async def test_an_event_too_large_is_dropped_alone():
    """At emit where its size is known, at encoding otherwise."""
    publisher = MemoryPublisher(max_event_bytes=100)
    assert not publisher.emit(b"x" * 101)
    assert publisher.emit({"text": "x" * 200})
    assert publisher.emit({"text": "x"})
    await publisher.close()
    stats = publisher.stats()
    assert stats["refused"] == {"too_large": 1}
    assert stats["dropped"] == {"too_large": 1}
    assert stats["delivered"] == 1
    assert_books_close(stats)


async def test_losses_are_told_once_in_an_interval_with_totals(caplog, monkeypatch):
    """Not once a drop, and not never."""
    monkeypatch.setattr("bgtasks.events._drops.WARNING_INTERVAL", 0.05)
    publisher = MemoryPublisher(max_events=1)
    for number in range(1000):
        publisher.emit(number)
    assert publisher.stats()["state"] != "closed"
    await until(lambda: caplog.records)
    assert len(caplog.records) == 1
    assert "refused" in caplog.text
    assert publisher.stats()["state"] == "dropping"
    await until(lambda: publisher.stats()["state"] == "ok")
    publisher.emit(1)
    for number in range(1000):
        publisher.emit(number)
    await until(lambda: len(caplog.records) == 2)
    refused = publisher.stats()["refused"]["full"]
    assert f"full {refused}" in caplog.records[-1].getMessage()
    await publisher.close()


class EmittingHandler(logging.Handler):
    """Makes an event of every log record, as an OpenTelemetry handler would."""

    def __init__(self, publisher):
        super().__init__()
        self.publisher = publisher

    def emit(self, record):
        self.publisher.emit({"log": record.getMessage()})


async def test_a_publisher_does_not_publish_its_own_log_records():
    """A handler on our logger feeds it back; that ends at once."""

    async def log(batch, batch_id):
        logging.getLogger("client").warning("written")
        raise OSError("down")

    publisher = ScriptedPublisher([log, log], max_events=2)
    handler = EmittingHandler(publisher)
    logging.getLogger().addHandler(handler)
    try:
        for number in range(10):
            publisher.emit(number)
        await publisher.flush(20)
        await publisher.close()
    finally:
        logging.getLogger().removeHandler(handler)
    assert publisher.events == [b"0", b"1"]
    assert publisher.stats()["refused"]["feedback"] >= 3


async def test_a_flusher_keeps_no_context_of_whoever_emitted_first():
    """A request that happens to be first is not pinned."""
    from contextvars import ContextVar

    class Request:
        pass

    variable = ContextVar("variable")

    async def emit_in_request():
        variable.set(Request())
        publisher.emit({"number": 1})
        return weakref.ref(variable.get())

    publisher = MemoryPublisher(linger=FOREVER)
    request = await asyncio.create_task(emit_in_request())
    await until(lambda: gc.collect() >= 0 and request() is None)
    await publisher.close()


async def test_the_sink_is_opened_once_whoever_is_first():
    """The flusher and start at the same time."""

    class Slow(ScriptedPublisher):
        async def open(self):
            await super().open()
            await asyncio.sleep(0.01)

    publisher = Slow(connect=True, linger=0)
    publisher.emit({"number": 1})
    await asyncio.gather(publisher.start(), publisher.start())
    await publisher.close()
    assert publisher.opened == publisher.released == 1
    assert publisher.events == [b'{"number":1}']


async def test_connect_raises_what_open_raises():
    """A wrong password is told at once where that is asked for."""

    class Broken(ScriptedPublisher):
        async def open(self):
            raise PermissionError("wrong password")

    publisher = Broken(connect=True)
    with pytest.raises(PermissionError):
        await publisher.start()
    await publisher.close()
    publisher = Broken(retry_for=0)
    publisher.emit({"number": 1})
    report = await publisher.flush(20)
    assert "wrong password" in report["last_error"]
    assert publisher.stats()["dropped"] == {"retries_exhausted": 1}
    await publisher.close()


@pytest.mark.parametrize(
    "options",
    [
        {"max_events": 0},
        {"max_bytes": True},
        {"max_event_bytes": 1.5},
        {"batch": "500"},
        {"batch_bytes": -1},
        {"linger": -1},
        {"linger": float("nan")},
        {"retry_for": "60"},
        {"retry_for": float("inf")},
        {"overflow": "drop"},
        {"overflow": "spool"},
        {"encode": "later"},
    ],
    ids=str,
)
def test_bad_options_are_named(options):
    """Each with what it takes."""
    with pytest.raises(InvalidOptionError, match=next(iter(options))):
        MemoryPublisher(**options)


def test_write_must_be_written():
    """BasePublisher is abstract."""
    with pytest.raises(TypeError, match="write"):
        BasePublisher()


async def test_a_publisher_shows_what_it_is():
    """Repr."""
    publisher = MemoryPublisher(name="audit")
    publisher.emit(1)
    assert repr(publisher) == "<MemoryPublisher 'audit' ok, 1 events>"
    assert publisher.stats()["name"] == "audit"
    await publisher.close()


async def test_the_age_of_the_oldest_event_is_known():
    """Health."""
    gate = asyncio.Event()

    async def wait(batch, batch_id):
        await gate.wait()

    publisher = ScriptedPublisher([wait])
    assert publisher.stats()["oldest_age"] == 0
    publisher.emit({"number": 1})
    await until(lambda: publisher.calls and publisher.stats()["oldest_age"] > 0.01)
    gate.set()
    await publisher.close()
    assert publisher.stats()["oldest_age"] == 0
