"""A publisher from emit to close: batches, lingering, threads, bounds, counters; on both twins and all loops."""

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
from event_tools import ScriptedSink, assert_counters_add_up, scripted, until
from loops import LOOPS

from bgtasks import InvalidOptionError
from bgtasks.events import Publisher, Reject, Sink
from bgtasks.events._loop_thread import loop_thread
from bgtasks.events.sinks.memory import MemorySink

pytestmark = pytest.mark.usefixtures("queue_of_twin")

FOREVER = 1000.0


async def test_events_arrive_encoded_and_in_order():
    """Events arrive as JSON, once and in order."""
    publisher = Publisher(MemorySink())
    assert all(publisher.emit({"number": number}) for number in range(1234))
    report = await publisher.close()
    assert [msgspec.json.decode(event)["number"] for event in publisher.sink.events] == list(range(1234))
    assert [count for _, count in publisher.sink.batches] == [500, 500, 234]
    assert report["status"] == "flushed"
    assert report["delivered"] == 1234
    stats = publisher.stats()
    assert stats["delivered"] == stats["accepted"] == 1234
    assert stats["state"] == "closed"
    assert_counters_add_up(stats)


async def test_batch_ids_never_repeat():
    """A batch id is a random id of the publisher and a number."""
    first, second = Publisher(MemorySink(), batch=2), Publisher(MemorySink(), batch=2)
    for publisher in (first, second):
        for number in range(6):
            publisher.emit({"number": number})
        await publisher.close()
    ids = [batch_id for publisher in (first, second) for batch_id, _ in publisher.sink.batches]
    assert len(set(ids)) == 6
    prefixes = {batch_id.rpartition("-")[0] for batch_id in ids}
    assert len(prefixes) == 2
    assert [batch_id.rpartition("-")[2] for batch_id in ids] == ["0", "1", "2"] * 2


async def test_a_full_batch_is_sent_without_lingering():
    """The queue wakes the flusher at the last event of a batch."""
    publisher = Publisher(MemorySink(), batch=10, linger=FOREVER)
    for number in range(10):
        publisher.emit({"number": number})
    await until(lambda: len(publisher.sink.events) == 10)
    for number in range(9):
        publisher.emit({"number": number})
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(publisher.sink.events) == 10
    await publisher.close()
    assert len(publisher.sink.events) == 19


async def test_a_batch_is_sent_when_it_has_batch_bytes():
    """Batches keep batch_bytes exactly: one that was estimated too small is split."""
    publisher = scripted(batch_bytes=1000, linger=FOREVER)
    publisher.emit(b"x" * 600)
    publisher.emit(b"x" * 600)
    await until(lambda: len(publisher.sink.events) == 1)
    for _ in range(10):
        publisher.emit({"text": "y" * 390})
    publisher.emit(b"z" * 2000)
    await publisher.close()
    sizes = [[len(event) for event in batch] for _, batch in publisher.sink.calls]
    assert all(sum(batch) <= 1000 or len(batch) == 1 for batch in sizes)
    assert functools.reduce(operator.iadd, sizes, []) == [600, 600] + [401] * 10 + [2000]


async def test_a_queue_smaller_than_a_batch_does_not_wait_for_the_linger_timer():
    """The flusher is woken before the queue refuses."""
    publisher = Publisher(MemorySink(), max_events=10, batch=500, linger=FOREVER)
    for _ in range(20):
        for number in range(5):
            assert publisher.emit({"number": number})
        await until(lambda: not publisher.stats()["queue_events"])
    await publisher.close()


async def test_one_event_is_sent_after_lingering():
    """A single event is sent after ``linger``, without a flush."""
    publisher = Publisher(MemorySink(), linger=0.005)
    publisher.emit({"number": 1})
    await until(lambda: publisher.sink.events)
    publisher.emit({"number": 2})
    await until(lambda: len(publisher.sink.events) == 2)
    await publisher.close()


async def test_events_of_other_threads_wake_the_loop():
    """The first event of a thread wakes a sleeping loop; the counters add up."""
    publisher = Publisher(MemorySink(), linger=0.001)
    await publisher.start()
    await asyncio.sleep(0)

    def produce(name):
        for number in range(2000):
            assert publisher.emit({"thread": name, "number": number})

    threads = [threading.Thread(target=produce, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    await until(lambda: len(publisher.sink.events) == 8000)
    for thread in threads:
        thread.join()
    for name in range(4):
        own = [event for event in map(msgspec.json.decode, publisher.sink.events) if event["thread"] == name]
        assert [event["number"] for event in own] == list(range(2000))
    report = await publisher.close()
    assert report["status"] == "flushed"
    assert_counters_add_up(publisher.stats())


async def test_events_do_not_wake_the_loop_one_by_one(monkeypatch):
    """A thousand events of another thread cost a few calls into the loop."""
    publisher = Publisher(MemorySink(), batch=500, linger=FOREVER)
    await publisher.start()
    await asyncio.sleep(0)
    calls = 0
    notify = publisher._flusher.notify

    def count():
        nonlocal calls
        calls += 1
        notify()

    monkeypatch.setattr(publisher._flusher, "notify", count)
    await asyncio.to_thread(lambda: [publisher.emit({"number": number}) for number in range(1000)])
    await until(lambda: len(publisher.sink.events) == 1000)
    assert 1 <= calls <= 6
    await publisher.close()


def test_one_publisher_serves_loops_one_after_another(loop_kind):
    """Each asyncio.run empties the queue before it ends, without a close."""
    publisher = scripted(linger=FOREVER)

    async def main(number):
        assert publisher.emit({"number": number})

    for number in range(3):
        with asyncio.Runner(debug=True, loop_factory=LOOPS[loop_kind]) as runner:
            runner.run(main(number))
        assert len(publisher.sink.events) == number + 1
    assert publisher.sink.opened == publisher.sink.closed == 3
    assert publisher.stats()["delivered"] == 3


def test_a_batch_interrupted_by_the_end_of_its_loop_is_written_again(loop_kind):
    """A batch in flight is written on the next loop, with the same bytes and id."""

    async def hang(batch, batch_id):
        await asyncio.sleep(FOREVER)

    publisher = scripted([hang, hang])

    async def first():
        publisher.emit(b"one")
        await until(lambda: publisher.sink.calls)

    async def second():
        publisher.emit(b"two")
        return await publisher.close()

    with asyncio.Runner(loop_factory=LOOPS[loop_kind]) as runner:
        runner.run(first())
    assert_counters_add_up(publisher.stats())
    assert publisher.stats()["queue_events"] == 1
    with asyncio.Runner(loop_factory=LOOPS[loop_kind]) as runner:
        report = runner.run(second())
    assert report["status"] == "flushed"
    assert publisher.sink.events == [b"one", b"two"]
    assert publisher.sink.calls[0] == publisher.sink.calls[1] == publisher.sink.calls[2]


@pytest.mark.parametrize("delay", [0, 0.01], ids=["lingering", "busy"])
def test_the_flusher_leaves_a_closed_loop(loop_kind, delay):
    """If a loop is closed without cancelling the flusher, an event that fills a batch starts it on the next loop."""
    publisher = scripted(batch=2)
    loop = LOOPS[loop_kind]()

    async def begin():
        publisher.emit(b"one")
        # The event has lingered before the flusher takes its first step.
        time.sleep(delay)

    loop.run_until_complete(begin())
    task = publisher._flusher._task
    loop.close()

    async def main():
        publisher.emit(b"two")
        publisher.emit(b"three")
        await until(lambda: len(publisher.sink.events) == 3)
        await publisher.close()

    with asyncio.Runner(loop_factory=LOOPS[loop_kind]) as runner:
        runner.run(main())
    assert publisher.sink.events == [b"one", b"two", b"three"]
    assert not task.done()
    # Its loop is closed, so the test must end it.
    task._log_destroy_pending = False
    task.get_coro().close()


def test_events_emitted_before_any_loop_runs_wait_for_one():
    """Events emitted without a running loop, at module level for example, are sent by the next loop."""
    publisher = scripted()
    assert publisher.emit(b"early")
    assert publisher.emit(b"also early")

    async def main():
        publisher.emit(b"late")
        await until(lambda: len(publisher.sink.events) == 3)
        return await publisher.close()

    assert asyncio.run(main())["status"] == "flushed"
    assert publisher.sink.events == [b"early", b"also early", b"late"]


def test_events_without_a_loop_do_not_notify_one_by_one(monkeypatch):
    """The thread for programs without a loop looks by itself; the first event after it has ended wakes it again."""
    publisher = Publisher(MemorySink(), linger=0.001)
    flusher, calls = publisher._flusher, []
    notify = flusher._notify

    def counting_notify():
        calls.append(len(publisher._queue))
        notify()

    monkeypatch.setattr(flusher, "_notify", counting_notify)
    monkeypatch.setattr("bgtasks.events._flusher.IDLE_IN_THREAD", 0.05)
    for count in (1, 2):
        with monkeypatch.context() as patch:
            # So that the thread does not come in between.
            patch.setattr(loop_thread, "call_later", lambda delay, function: None)
            calls.clear()
            for number in range(1000):
                assert publisher.emit({"n": number})
            assert len(calls) == 1
        loop_thread.call_later(0, flusher._look)
        asyncio.run(until(lambda: not publisher.stats()["queue_events"]))
        assert publisher.stats()["delivered"] == 1000 * count
        asyncio.run(until(lambda: flusher.loop is None))
    asyncio.run(publisher.close())


async def test_a_flusher_that_began_meanwhile_is_notified(monkeypatch):
    """Another thread, which found no flusher, is late to have the queue call where a loop runs; a new flusher waits."""
    publisher = Publisher(MemorySink(), linger=0.001)
    reached, may_go_on = threading.Event(), threading.Event()

    def wait():
        reached.set()
        may_go_on.wait(20)

    monkeypatch.setattr(publisher._flusher, "_await_loop", wait)
    emitting = asyncio.create_task(asyncio.to_thread(publisher._queue.emit, {"n": 0}))
    await until(reached.is_set)
    await publisher.flush(20)
    await asyncio.sleep(0.05)
    may_go_on.set()
    await emitting
    await asyncio.to_thread(publisher._queue.emit, {"n": 1})
    await until(lambda: publisher.stats()["delivered"] == 2)
    await publisher.close()


async def test_a_flusher_cancelled_from_outside_starts_again():
    """A flusher that is cancelled from outside starts again."""
    publisher = scripted()
    publisher.emit(b"one")
    publisher._flusher._task.cancel()
    await until(lambda: publisher._flusher._task.done())
    publisher.emit(b"two")
    await until(lambda: len(publisher.sink.events) == 2)
    publisher._flusher._task.cancel()
    await until(lambda: publisher._flusher._task.done())
    assert publisher.emit(b"three")
    await publisher.close()
    assert publisher.sink.events == [b"one", b"two", b"three"]


async def test_an_event_emitted_while_the_flusher_ends_is_sent():
    """The queue was not armed then, but the event is sent without a further one."""
    publisher = scripted()
    publisher.emit(b"one")
    publisher._flusher._task.cancel()
    asyncio.get_running_loop().call_soon(publisher.emit, b"two")
    await until(lambda: publisher.sink.events == [b"one", b"two"])
    await publisher.close()


async def test_block_waits_for_capacity():
    """With overflow="block", publish waits, emit refuses, and every accepted event arrives."""
    gate = asyncio.Event()

    async def wait(batch, batch_id):
        await gate.wait()

    publisher = scripted([wait], overflow="block", max_events=4, batch=2)
    producing = asyncio.create_task(produce(publisher, 50))
    await until(lambda: publisher.stats()["queue_events"] >= 4 and publisher._pending.capacity)
    for _ in range(20):
        await asyncio.sleep(0)
        assert publisher.stats()["queue_events"] <= 6
    assert not publisher.emit(b"no capacity")
    gate.set()
    assert await producing == 50
    report = await publisher.close()
    assert report["status"] == "flushed"
    assert publisher.sink.events == [b"%d" % number for number in range(50)]
    assert publisher.stats()["refused"] == {"full": 1}


async def produce(publisher, count):
    """Publish, and count the accepted events."""
    return sum([await publisher.publish(b"%d" % number) for number in range(count)])


async def test_close_wakes_publishers_that_wait_for_capacity():
    """close() wakes publishers that wait for capacity, and publish returns False."""
    never = asyncio.Event()

    async def wait(batch, batch_id):
        await never.wait()

    publisher = scripted([wait] * 9, overflow="block", max_events=1)
    producing = asyncio.create_task(produce(publisher, 9))
    await until(lambda: publisher._pending.capacity)
    report = await publisher.close(0.05)
    assert report["status"] == "timeout"
    accepted = await producing
    stats = publisher.stats()
    assert accepted == stats["accepted"] == stats["dropped"]["timeout"]
    assert_counters_add_up(stats)


async def test_a_waiting_producer_can_be_cancelled():
    """The event of a cancelled publish is not accepted."""

    async def wait(batch, batch_id):
        await asyncio.sleep(FOREVER)

    publisher = scripted([wait] * 9, overflow="block", max_events=1)
    producing = asyncio.create_task(produce(publisher, 9))
    await until(lambda: publisher._pending.capacity)
    accepted = publisher.stats()["accepted"]
    producing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await producing
    assert publisher.stats()["accepted"] == accepted
    assert not publisher._pending.capacity
    await publisher.close(0)


async def test_close_returns_in_time_though_the_sink_hangs():
    """Also if a write swallows its cancellation; the counters add up, and a late answer does not change them."""
    gate = asyncio.Event()

    async def stubborn(batch, batch_id):
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                continue

    publisher = scripted([stubborn])
    for number in range(3):
        publisher.emit({"number": number})
    await until(lambda: publisher.sink.calls)
    publisher.emit({"number": 3})
    begun = time.monotonic()
    report = await publisher.close(0.3)
    assert time.monotonic() - begun < 2
    assert report["status"] == "timeout"
    assert report["dropped"] == 4
    stats = publisher.stats()
    assert stats["dropped"] == {"timeout": 4}
    assert_counters_add_up(stats)
    task = publisher._flusher._task
    gate.set()
    await asyncio.wait((task,))
    assert publisher.stats()["dropped"] == {"timeout": 4}
    assert publisher.stats()["delivered"] == 0


async def test_close_closes_once_and_later_events_are_refused(caplog):
    """A second close returns the first report; later events are refused, counted and logged."""
    publisher = scripted()
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
    """A publisher without events closes without opening its sink."""
    publisher = scripted()
    assert (await publisher.close())["status"] == "flushed"
    assert (await publisher.flush())["status"] == "flushed"
    assert publisher.sink.opened == publisher.sink.closed == 0


async def test_flush_sends_lingering_events_and_reports_the_rest():
    """Flush sends lingering events; after its timeout, the report counts those that are left."""
    gate = asyncio.Event()

    async def wait(batch, batch_id):
        await gate.wait()

    publisher = scripted([None, wait], linger=FOREVER)
    publisher.emit({"number": 1})
    report = await publisher.flush(30)
    assert report["status"] == "flushed"
    assert report["delivered"] == 1
    publisher.emit({"number": 2})
    report = await publisher.flush(0.05)
    assert report["status"] == "timeout"
    assert report["queued"] == 1
    gate.set()
    await publisher.close()
    assert len(publisher.sink.events) == 2


async def test_flush_and_close_from_another_loop():
    """Flush and close work from another thread with its own loop."""
    publisher = scripted(linger=FOREVER)
    publisher.emit({"number": 1})
    await asyncio.sleep(0)

    async def end():
        flushed = await publisher.flush(20)
        publisher.emit({"number": 2})
        return flushed, await publisher.close(20)

    flushed, closed = await asyncio.to_thread(asyncio.run, end())
    assert flushed["status"] == closed["status"] == "flushed"
    assert len(publisher.sink.events) == 2
    assert publisher.sink.closed == 1


async def test_durable_waits_until_the_event_is_out_of_memory():
    """Without a spool, durable waits for the delivery; it returns False if an event was dropped meanwhile."""
    publisher = scripted()
    assert await publisher.publish({"number": 1}, durable=True)
    assert publisher.sink.events == [b'{"number":1}']
    assert not await publisher.publish(object(), durable=True)
    assert publisher.stats()["refused"] == {"encode": 1}
    await publisher.close()


@dataclasses.dataclass
class Point:
    """A dataclass to encode."""

    x: int


class Struct(msgspec.Struct):
    """A Struct to encode."""

    x: int


async def test_supported_types_are_encoded():
    """Structs, dataclasses, mappings, bytes and pydantic models are encoded, also nested."""
    import pydantic

    class Model(pydantic.BaseModel):
        x: int

    publisher = Publisher(MemorySink())
    for event in (Struct(1), Point(1), {"x": 1}, b'{"x":1}', bytearray(b'{"x":1}'), Model(x=1)):
        assert publisher.emit(event)
    publisher.emit({"inner": [Model(x=1), Point(2)]})
    await publisher.close()
    assert publisher.sink.events == [b'{"x":1}'] * 6 + [b'{"inner":[{"x":1},{"x":2}]}']


async def test_only_events_that_cannot_be_encoded_are_dropped(caplog, tmp_path):
    """The other events of the batch arrive, and the error names the type."""
    publisher = Publisher(MemorySink(), dead_letters=tmp_path / "dead.jsonl")
    for number in range(100):
        publisher.emit({"number": number} if number != 50 else {"inner": threading.Lock()})
    report = await publisher.close()
    assert report["delivered"] == 99
    assert len(publisher.sink.events) == 99
    stats = publisher.stats()
    assert stats["dropped"] == {"encode": 1}
    assert_counters_add_up(stats)
    assert "event of type dict" in caplog.text
    assert "_thread.lock" in caplog.text
    (letter,) = map(msgspec.json.decode, (tmp_path / "dead.jsonl").read_bytes().splitlines())
    assert letter["reason"] == "encode"
    assert "lock" in letter["object"]


async def test_flush_does_not_wait_for_events_that_cannot_be_encoded():
    """Flush returns although no event of a batch could be encoded."""
    publisher = Publisher(MemorySink())
    publisher.emit(object())
    begun = time.monotonic()
    assert (await publisher.flush(30))["dropped"] == 1
    assert time.monotonic() - begun < 15
    await publisher.close()


async def test_encode_now_encodes_in_emit():
    """With encode="now", events may be changed after emit, which refuses those that cannot be encoded."""
    publisher = Publisher(MemorySink(), encode="now")
    event = {"number": 1}
    assert publisher.emit(event)
    event["number"] = 2
    assert publisher.emit(event)
    assert not publisher.emit(object())
    assert "type object" in publisher.stats()["last_error"]
    await publisher.close()
    assert publisher.sink.events == [b'{"number":1}', b'{"number":2}']
    assert publisher.stats()["refused"] == {"encode": 1}


async def test_only_an_event_that_is_too_large_is_dropped():
    """An event that is too large is refused by emit if its size is known, and dropped after encoding otherwise."""
    publisher = Publisher(MemorySink(), max_event_bytes=100)
    assert not publisher.emit(b"x" * 101)
    assert publisher.emit({"text": "x" * 200})
    assert publisher.emit({"text": "x"})
    await publisher.close()
    stats = publisher.stats()
    assert stats["refused"] == {"too_large": 1}
    assert stats["dropped"] == {"too_large": 1}
    assert stats["delivered"] == 1
    assert_counters_add_up(stats)


async def test_losses_are_logged_once_in_an_interval_with_totals(caplog, monkeypatch):
    """Lost events are logged once per interval, with totals."""
    monkeypatch.setattr("bgtasks.events._losses.WARNING_INTERVAL", 0.05)
    publisher = Publisher(MemorySink(), max_events=1)
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
    """Emits every log record as an event, as an OpenTelemetry handler would."""

    def __init__(self, publisher):
        super().__init__()
        self.publisher = publisher

    def emit(self, record):
        self.publisher.emit({"log": record.getMessage()})


async def test_a_publisher_does_not_publish_its_own_log_records():
    """A logging handler that emits log records does not cause endless events."""

    async def log(batch, batch_id):
        logging.getLogger("client").warning("written")
        raise OSError("down")

    publisher = scripted([log, log], max_events=2)
    handler = EmittingHandler(publisher)
    logging.getLogger().addHandler(handler)
    try:
        for number in range(10):
            publisher.emit(number)
        await publisher.flush(20)
        await publisher.close()
    finally:
        logging.getLogger().removeHandler(handler)
    assert publisher.sink.events == [b"0", b"1"]
    assert publisher.stats()["refused"]["feedback"] >= 3


async def test_a_flusher_does_not_keep_the_context_of_the_first_emit():
    """The context of the request that emits first is freed."""
    from contextvars import ContextVar

    class Request:
        pass

    variable = ContextVar("variable")

    async def emit_in_request():
        variable.set(Request())
        publisher.emit({"number": 1})
        return weakref.ref(variable.get())

    publisher = Publisher(MemorySink(), linger=FOREVER)
    request = await asyncio.create_task(emit_in_request())
    await until(lambda: gc.collect() >= 0 and request() is None)
    await publisher.close()


async def test_the_sink_is_opened_once():
    """The sink is opened once although the flusher and start need it at the same time."""

    class Slow(ScriptedSink):
        async def open(self):
            await super().open()
            await asyncio.sleep(0.01)

    publisher = scripted(sink=Slow, connect=True, linger=0)
    publisher.emit({"number": 1})
    await asyncio.gather(publisher.start(), publisher.start())
    await publisher.close()
    assert publisher.sink.opened == publisher.sink.closed == 1
    assert publisher.sink.events == [b'{"number":1}']


async def test_connect_raises_the_errors_of_open():
    """With ``connect``, start raises the error of the sink's open, a wrong password for example."""

    class Broken(ScriptedSink):
        async def open(self):
            raise PermissionError("wrong password")

    publisher = scripted(sink=Broken, connect=True)
    with pytest.raises(PermissionError):
        await publisher.start()
    await publisher.close()
    publisher = scripted(sink=Broken, retry_for=0)
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
def test_bad_options_are_refused_by_name(options):
    """The error for a bad option names it and its allowed values."""
    with pytest.raises(InvalidOptionError, match=next(iter(options))):
        Publisher(MemorySink(), **options)


def test_a_sink_must_define_write():
    """A Sink without ``write`` cannot be made."""
    with pytest.raises(TypeError, match="write"):
        Sink()


async def test_the_repr_shows_name_state_and_events():
    """The repr shows name, state and number of events."""
    publisher = Publisher(MemorySink(), name="audit")
    publisher.emit(1)
    assert repr(publisher) == "<Publisher 'audit' ok, 1 events>"
    assert publisher.stats()["name"] == "audit"
    await publisher.close()


async def test_stats_have_the_age_of_the_oldest_event():
    """stats() has an upper bound of the age of the oldest event."""
    gate = asyncio.Event()

    async def wait(batch, batch_id):
        await gate.wait()

    publisher = scripted([wait])
    assert publisher.stats()["oldest_age_seconds"] == 0
    publisher.emit({"number": 1})
    await until(lambda: publisher.sink.calls and publisher.stats()["oldest_age_seconds"] > 0.01)
    gate.set()
    await publisher.close()
    assert publisher.stats()["oldest_age_seconds"] == 0


async def test_the_lag_of_delivered_events_is_measured():
    """Each delivered event counts with the age of the oldest one of its batch; a rejected event does not."""

    async def wait(batch, batch_id):
        await asyncio.sleep(0.05)

    async def reject(batch, batch_id):
        raise Reject([0])

    publisher = scripted([wait, reject], batch=3)
    for number in range(6):
        publisher.emit({"number": number})
    await publisher.flush()
    lag = publisher.stats()["lag"]
    assert lag["count"] == publisher.stats()["delivered"] == 5
    # The clock of uvloop counts milliseconds.
    assert lag["max_seconds"] >= 0.045
    assert lag["sum_seconds"] >= 5 * 0.045
    await publisher.close()


async def test_events_emitted_during_a_flush_do_not_change_its_status():
    """The status is that of the events accepted before the call."""
    gate = asyncio.Event()

    async def wait(batch, batch_id):
        await gate.wait()

    async def hang(batch, batch_id):
        await asyncio.sleep(FOREVER)

    publisher = scripted([wait, hang])
    publisher.emit(b"before")
    flushing = asyncio.create_task(publisher.flush(20))
    await until(lambda: publisher.sink.calls)
    publisher.emit(b"later")
    gate.set()
    report = await flushing
    assert report["status"] == "flushed"
    assert report["queued"] == 1
    assert (await publisher.close(0.1))["status"] == "timeout"


@dataclasses.dataclass
class TableSink(Sink):
    """A sink as an author may write it: it has no hash, and equals others."""

    table: str
    rows: list = dataclasses.field(default_factory=list, compare=False)

    async def write(self, batch, batch_id):
        self.rows.extend(batch)


@dataclasses.dataclass(frozen=True)
class FrozenSink(Sink):
    """A sink whose attributes cannot be set."""

    rows: list = dataclasses.field(default_factory=list, compare=False)

    async def write(self, batch, batch_id):
        self.rows.extend(batch)


@pytest.mark.parametrize("make", [lambda: TableSink("orders"), FrozenSink], ids=["mutable", "frozen"])
async def test_a_sink_may_be_a_dataclass(make):
    """Sinks that are equal are still two sinks; one sink has one publisher."""
    sinks = [make(), make()]
    publishers = [Publisher(sink) for sink in sinks]
    assert all(sink.retry_window == 120 for sink in sinks)
    with pytest.raises(InvalidOptionError, match="make a sink for each publisher"):
        Publisher(sinks[0])
    for publisher in publishers:
        publisher.emit(b"1")
        await publisher.close()
    assert [sink.rows for sink in sinks] == [[b"1"], [b"1"]]
    # A closed publisher gives its sink back.
    await Publisher(sinks[0]).close()


async def test_a_closed_publisher_with_events_left_warns_once_and_is_released(caplog):
    """The loss is one warning; nothing in the process refers to the publisher's flusher or queue any more."""

    async def hang(batch, batch_id):
        await asyncio.sleep(FOREVER)

    async def use():
        publisher = scripted([hang] * 10)
        publisher.emit(b"1")
        await until(lambda: publisher.sink.calls)
        assert (await publisher.close(0.1))["dropped"] == 1
        return weakref.ref(publisher._flusher)

    flusher = await use()
    # A second warning would come in the next iteration of the loop.
    await asyncio.sleep(0)
    await until(lambda: gc.collect() >= 0 and flusher() is None)
    assert caplog.text.count("loses events") == 1


async def test_the_loss_warning_names_the_error_that_the_statistics_name(caplog):
    """One error, in one wording, that says once what it is."""
    publisher = Publisher(MemorySink(), encode="now")
    await publisher.start()
    assert not publisher.emit({"event": object()})
    async with asyncio.timeout(10):
        while "loses events" not in caplog.text:
            await asyncio.sleep(0)
    last_error = publisher.stats()["last_error"]
    assert f"(last error: {last_error})" in caplog.text
    assert last_error.startswith("EncodeError: an event of type dict cannot be encoded: it holds object, <object ")
    assert last_error.count("EncodeError") == 1
    await publisher.close()


@pytest.mark.parametrize("overflow", ["drop_newest", "block"])
async def test_publishing_in_one_go_gives_the_loop_its_turn(overflow):
    """A coroutine that publishes and awaits nothing else holds the loop for a few hundred events at most."""
    publisher = Publisher(MemorySink(), overflow=overflow)
    published, since_turn = 0, 0
    longest = 0

    def beat():
        nonlocal since_turn, longest
        longest, since_turn = max(longest, since_turn), 0
        if published < 5_000:
            loop.call_soon(beat)

    loop = asyncio.get_running_loop()
    loop.call_soon(beat)
    for number in range(5_000):
        assert await publisher.publish({"number": number})
        published, since_turn = published + 1, since_turn + 1
    assert 0 < longest < 1000
    await publisher.close()
    assert [msgspec.json.decode(event)["number"] for event in publisher.sink.events] == list(range(5_000))


async def test_a_publish_cancelled_in_its_turn_queues_nothing():
    """The call gives the loop its turn before it queues the event: a cancelled call has not published."""
    publisher = Publisher(MemorySink())

    async def publishing():
        for number in range(10_000):
            await publisher.publish({"number": number})
            counted.append(number)

    counted = []
    task = asyncio.ensure_future(publishing())
    await asyncio.sleep(0)
    assert counted
    task.cancel()
    await asyncio.wait([task])
    await publisher.close()
    assert len(publisher.sink.events) == len(counted) < 10_000
