"""Retries, rejected events, dead letters, and the flusher's use of a spool; on both twins and all loops."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import msgspec
import pytest
from event_tools import ScriptedSink, assert_counters_add_up, scripted, until

from bgtasks.errors import InvalidOptionError
from bgtasks.events import Publisher, Reject, Retry, _routes
from bgtasks.events import _delivery as delivery_module

pytestmark = pytest.mark.usefixtures("queue_of_twin", "_quick_retries")


@pytest.fixture
def _quick_retries(monkeypatch):
    """Shorten the delays of the back-off."""
    monkeypatch.setattr(delivery_module, "FIRST_DELAY", 0.0005)
    monkeypatch.setattr(delivery_module, "LONGEST_DELAY", 0.002)


@pytest.mark.parametrize("error", [Retry(), OSError("down"), ValueError("a bug")], ids=repr)
async def test_a_failed_batch_is_written_again_with_the_same_bytes_and_id(error, caplog):
    """A failed batch is retried after any error but Reject; order is kept, and the failure is logged once."""
    publisher = scripted([error] * 5, batch=2)
    for number in range(6):
        publisher.emit({"number": number})
    report = await publisher.close()
    assert report["status"] == "flushed"
    assert [msgspec.json.decode(event)["number"] for event in publisher.sink.events] == list(range(6))
    assert publisher.sink.calls[0] == publisher.sink.calls[1] == publisher.sink.calls[5]
    assert len({batch_id for batch_id, _ in publisher.sink.calls}) == 3
    stats = publisher.stats()
    assert stats["retried"] == 5
    assert stats["last_error"] is None
    # A loop in debug mode also warns of slow steps.
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [record.name for record in warnings if record.name != "asyncio"] == ["bgtasks.events"]


async def test_errors_other_than_retry_reopen_the_sink():
    """Errors other than Retry may have broken the connection, so the sink is closed and opened again."""
    publisher = scripted([Retry(), OSError("broken pipe"), None])
    publisher.emit({"number": 1})
    await publisher.flush(20)
    assert publisher.sink.opened == 2
    assert publisher.sink.closed == 1
    await publisher.close()
    assert publisher.sink.closed == 2


async def test_retry_after_sets_the_delay():
    """Retry(after=...) sets the delay."""
    publisher = scripted([Retry(after=0.15)])
    publisher.emit({"number": 1})
    begun = time.monotonic()
    await publisher.flush(20)
    assert time.monotonic() - begun >= 0.15
    await publisher.close()


class Unreachable(ScriptedSink):
    """Cannot be opened while ``is_down``."""

    is_down = True

    async def open(self):
        self.opened += 1
        if self.is_down:
            raise ConnectionError("no server at this address")


def bounds_of_delays(monkeypatch, publisher, tries, *, flushes=False):
    """Return the bounds of the delays after a number of failed tries, of which each is chosen at random."""
    bounds = []
    tried = asyncio.Event()

    def uniform(low, high):
        bounds.append((low, high))
        if len(bounds) == tries:
            publisher.sink.is_down = False
            tried.set()
        return 0.0

    monkeypatch.setattr(random, "uniform", uniform)

    async def main():
        publisher.emit({"number": 1})
        if flushes:
            await publisher.flush()
        await tried.wait()
        await publisher.close()

    asyncio.run(main())
    assert [low for low, _ in bounds] == [0] * tries
    return [high for _, high in bounds]


def test_delays_double_with_full_jitter_up_to_a_longest(monkeypatch):
    """Delays have the documented bounds: of a failed write, of a sink that cannot be opened, and during a flush."""
    monkeypatch.undo()
    bounds = bounds_of_delays(monkeypatch, scripted([Retry()] * 10), 10)
    assert bounds == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    bounds = bounds_of_delays(monkeypatch, scripted(sink=Unreachable), 8)
    assert bounds == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]
    bounds = bounds_of_delays(monkeypatch, scripted([Retry()] * 5), 5, flushes=True)
    assert bounds == [0.05, 0.1, 0.2, 0.3, 0.3]


def failing_writes(is_up):
    """Return a script by which each write fails until the event is set."""

    async def fail(batch, batch_id):
        if not is_up.is_set():
            raise Retry

    return [fail] * 100_000


@pytest.mark.parametrize("spool", [False, True], ids=["", "spool"])
@pytest.mark.parametrize("end", ["flush", "close"])
@pytest.mark.parametrize("fault", ["open", "write"])
async def test_flush_and_close_try_at_once(fault, end, spool, monkeypatch):
    """A flush or close does not sleep through a delay: the sink that is up again gets everything."""
    # Without a flush, the next try is an hour away.
    monkeypatch.setattr(random, "uniform", lambda low, high: high if delivery.is_urgent else 3600.0)
    is_up = asyncio.Event()
    options = {"batch": 2, "spool": ListSpool()} if spool else {"batch": 2}
    sink = Unreachable if fault == "open" else ScriptedSink
    publisher = scripted(failing_writes(is_up), sink=sink, **options)
    delivery = publisher._delivery
    for number in range(4):
        publisher.emit(b"%d" % number)
    await until(lambda: publisher.stats()["retried"] == 1)
    ending = asyncio.ensure_future(getattr(publisher, end)(20))
    # Still down when the flush begins, it keeps trying.
    await until(lambda: publisher.stats()["retried"] >= 4)
    is_up.set()
    publisher.sink.is_down = False
    assert (await ending)["status"] == "flushed"
    assert publisher.sink.events == [b"0", b"1", b"2", b"3"]
    await publisher.close()


async def test_a_flush_waits_for_the_time_that_the_sink_asked_for():
    """Retry(after=...) holds in a flush as well; the next flush does not shorten it."""
    publisher = scripted([Retry(after=0.2)])
    begun = time.monotonic()
    publisher.emit(b"1")
    await until(lambda: publisher.stats()["retried"] == 1)
    while publisher.stats()["queue_events"]:
        await publisher.flush(0.02)
    assert time.monotonic() - begun >= 0.15
    await publisher.close()


async def test_a_batch_is_given_up_after_retry_for_and_others_go_on(tmp_path):
    """After retry_for, the events go to the dead letters and the next batch is written."""
    publisher = scripted([OSError("down")] * 1000, retry_for=0.01, batch=2, dead_letters=tmp_path / "dead")
    publisher.emit({"number": 1})
    publisher.emit({"number": 2})
    await until(lambda: publisher.stats()["dropped"])
    publisher.sink.script.clear()
    publisher.emit({"number": 3})
    await publisher.close()
    stats = publisher.stats()
    assert stats["dropped"] == {"retries_exhausted": 2}
    assert stats["delivered"] == 1
    assert_counters_add_up(stats)
    letters = [msgspec.json.decode(line) for line in (tmp_path / "dead").read_bytes().splitlines()]
    assert [letter["event"] for letter in letters] == ['{"number":1}', '{"number":2}']
    assert letters[0]["reason"] == "retries_exhausted"
    assert letters[0]["error"] == "OSError: down"
    assert letters[0]["batch_id"] == publisher.sink.calls[0][0]


class PickySink(ScriptedSink):
    """Rejects some events, with their indexes or without."""

    def __init__(self, bad, tells):
        super().__init__()
        self.bad = bad
        self.tells = tells

    async def write(self, batch, batch_id):
        """Write all events but the bad ones."""
        self.calls.append((batch_id, list(batch)))
        refused = [index for index, event in enumerate(batch) if event in self.bad]
        if refused and not self.tells:
            raise Reject(reason="bad in here")
        self.events.extend(event for event in batch if event not in self.bad)
        if refused:
            raise Reject(refused, "bad")


def picky(bad, tells, **options):
    """Return a publisher with a ``PickySink``."""
    return Publisher(PickySink(bad, tells), **{"linger": 0.001, **options})


@pytest.mark.parametrize("tells", [True, False])
async def test_only_rejected_events_go_to_the_dead_letters(tells, tmp_path):
    """Bad events go to the dead letters; all others arrive once and in order."""
    events = [b"%d" % number for number in range(100)]
    bad = {b"0", b"31", b"32", b"77", b"99"}
    publisher = picky(bad, tells, batch=50, dead_letters=tmp_path / "dead.jsonl")
    for event in events:
        publisher.emit(event)
    report = await publisher.close()
    assert report["status"] == "flushed"
    assert publisher.sink.events == [event for event in events if event not in bad]
    stats = publisher.stats()
    assert stats["dropped"] == {"rejected": 5}
    assert_counters_add_up(stats)
    letters = [msgspec.json.decode(line) for line in (tmp_path / "dead.jsonl").read_bytes().splitlines()]
    assert sorted(letter["event"].encode() for letter in letters) == sorted(bad)
    assert all("Reject: bad" in letter["error"] for letter in letters)


async def test_halves_keep_their_ids_over_retries():
    """A retried half has the same events and the same id."""
    bad = {b"1"}

    class Flaky(PickySink):
        async def write(self, batch, batch_id):
            if Counter(call[0] for call in self.calls)[batch_id] == 0:
                self.calls.append((batch_id, list(batch)))
                raise Retry
            await super().write(batch, batch_id)

    publisher = Publisher(Flaky(bad, False), linger=0.001)
    for number in range(4):
        publisher.emit(b"%d" % number)
    await publisher.close()
    contents = {}
    for batch_id, batch in publisher.sink.calls:
        assert contents.setdefault(batch_id, batch) == batch
    assert publisher.sink.events == [b"0", b"2", b"3"]


async def test_a_reject_with_wrong_indexes_halves_the_batch():
    """A Reject with wrong indexes does not stop the delivery: the batch is halved."""

    class Wrong(ScriptedSink):
        async def write(self, batch, batch_id):
            raise Reject([99])

    publisher = scripted(sink=Wrong)
    publisher.emit(b"1")
    publisher.emit(b"2")
    await publisher.close()
    assert publisher.stats()["dropped"] == {"rejected": 2}
    assert_counters_add_up(publisher.stats())


async def test_dead_letters_that_cannot_be_written_do_not_stop_delivery(tmp_path, caplog):
    """If the file cannot be opened, delivery goes on."""
    publisher = picky({b"1"}, True, dead_letters=tmp_path / "missing" / "dead.jsonl")
    publisher.emit(b"1")
    publisher.emit(b"2")
    report = await publisher.close()
    assert report["status"] == "flushed"
    assert publisher.sink.events == [b"2"]
    assert "cannot write its dead letters" in caplog.text


async def test_dead_letters_that_are_no_text_are_kept_in_base64(tmp_path):
    """An event that is no UTF-8 is written in base64."""
    publisher = picky({b"\xff\n"}, True, dead_letters=tmp_path / "dead.jsonl")
    publisher.emit(b"\xff\n")
    await publisher.close()
    (letter,) = map(msgspec.json.decode, (tmp_path / "dead.jsonl").read_bytes().splitlines())
    assert letter["base64"] == "/wo="


async def test_the_state_changes_with_failures():
    """The state is ok, retrying during failures, and ok again."""
    gate = asyncio.Event()

    async def fail(batch, batch_id):
        if not gate.is_set():
            raise OSError("down")

    publisher = scripted([fail] * 100_000)
    assert publisher.stats()["state"] == "ok"
    publisher.emit(b"1")
    await until(lambda: publisher.stats()["state"] == "retrying")
    assert publisher.stats()["last_error"] == "OSError: down"
    gate.set()
    await until(lambda: publisher.sink.events)
    assert publisher.stats()["state"] == "ok"
    assert publisher.stats()["last_error"] is None
    await publisher.close()


async def test_a_client_that_cannot_be_closed_is_logged_and_released(caplog):
    """If close() of the sink raises, the error is logged and the sink is opened again."""

    class Stuck(ScriptedSink):
        async def close(self):
            raise OSError("no")

    publisher = scripted(sink=Stuck)
    publisher.emit(b"1")
    report = await publisher.close()
    assert report["status"] == "flushed"
    assert "could not close its sink" in caplog.text


class ListSpool:
    """A spool in memory that fails on demand."""

    def __init__(self, recovered=()):
        self.rows = dict(recovered)
        self.recovered = sum(map(len, self.rows.values()))
        self.dropped = Counter()
        self.broken = False
        self.appended = []
        self.closed = False

    def append(self, batch, batch_id):
        if self.broken:
            raise OSError("disk full")
        self.rows[batch_id] = list(batch)
        self.appended.append(batch_id)

    def oldest(self, count):
        return list(self.rows.items())[:count]

    def done(self, batch_id):
        self.rows.pop(batch_id, None)

    def stats(self):
        return {
            "events": sum(map(len, self.rows.values())),
            "recovered": self.recovered,
            "dropped": dict(self.dropped),
        }

    def close(self):
        self.closed = True


async def test_with_a_spool_every_batch_is_committed_before_it_is_sent():
    """Batches are committed first and sent then; events move from spooled to delivered."""
    spool = ListSpool()
    committed = []

    async def look(batch, batch_id):
        committed.append(batch_id in spool.rows)

    publisher = scripted([look] * 10, spool=spool, batch=2)
    for number in range(10):
        publisher.emit(b"%d" % number)
    report = await publisher.close()
    assert report["status"] == "flushed"
    assert committed == [True] * 5
    assert publisher.sink.events == [b"%d" % number for number in range(10)]
    assert spool.rows == {}
    assert spool.closed
    assert publisher.stats()["delivered"] == 10
    assert_counters_add_up(publisher.stats())


async def test_with_a_spool_a_batch_is_never_given_up():
    """With a spool, retry_for does not apply; close leaves the batches on the disk."""
    spool = ListSpool()
    publisher = scripted([OSError("down")] * 100_000, spool=spool, batch=2, retry_for=0)
    for number in range(6):
        publisher.emit(b"%d" % number)
    await until(lambda: publisher.stats()["spooled"] == 6 and publisher.stats()["retried"] > 5)
    assert publisher.stats()["state"] == "spooling"
    assert publisher.stats()["dropped"] == {}
    report = await publisher.close(0.2)
    assert report["status"] == "timeout"
    assert report["spooled"] == 6
    assert [event for batch in spool.rows.values() for event in batch] == [b"%d" % number for number in range(6)]
    assert_counters_add_up(publisher.stats())


async def test_recovered_batches_go_first_with_their_ids():
    """Recovered events are counted as accepted and spooled, and sent before new ones, with their ids."""
    spool = ListSpool({"old-1": [b"a", b"b"], "old-2": [b"c"]})
    publisher = scripted(spool=spool)
    publisher.emit(b"new")
    await until(lambda: len(publisher.sink.events) == 4)
    assert publisher.sink.events == [b"a", b"b", b"c", b"new"]
    assert [batch_id for batch_id, _ in publisher.sink.calls][:2] == ["old-1", "old-2"]
    await publisher.close()
    stats = publisher.stats()
    assert stats["recovered"] == 3
    assert stats["accepted"] == stats["delivered"] == 4
    assert_counters_add_up(stats)


async def test_a_failing_empty_spool_is_bypassed():
    """While the spool fails and holds nothing, batches go straight to the sink, in order."""
    spool = ListSpool()
    publisher = scripted(spool=spool, batch=2)
    publisher.emit(b"0")
    await until(lambda: publisher.sink.events)
    spool.broken = True
    for number in range(1, 6):
        publisher.emit(b"%d" % number)
    await until(lambda: len(publisher.sink.events) == 6)
    assert publisher.stats()["spool_errors"] >= 1
    assert "disk full" in publisher.stats()["last_error"]
    spool.broken = False
    publisher.emit(b"6")
    await until(lambda: len(publisher.sink.events) == 7)
    assert publisher.sink.events == [b"%d" % number for number in range(7)]
    await publisher.close()
    assert_counters_add_up(publisher.stats())


async def test_events_that_the_spool_drops_are_counted():
    """Drops of the spool for its quota or max_age appear in the publisher's counters."""
    spool = ListSpool()
    publisher = scripted([OSError("down")] * 100_000, spool=spool, batch=2)
    for number in range(12):
        publisher.emit(b"%d" % number)
    await until(lambda: publisher.stats()["spooled"] == 12)
    # Not a batch that was read already: a spool does not drop batches that it has returned.
    spool.rows.pop(spool.appended[5])
    spool.dropped["expired"] += 2
    publisher.emit(b"12")
    await until(lambda: publisher.stats()["dropped"] == {"expired": 2})
    publisher.sink.script.clear()
    await publisher.close()
    assert publisher.sink.events == [b"%d" % number for number in range(13) if number not in (10, 11)]
    assert_counters_add_up(publisher.stats())


async def test_durable_returns_after_the_commit():
    """With a spool, publish(durable=True) returns after the commit, before the delivery."""
    spool = ListSpool()
    publisher = scripted([OSError("down")] * 100_000, spool=spool)
    assert await publisher.publish(b"1", durable=True)
    assert list(spool.rows.values()) == [[b"1"]]
    assert publisher.sink.events == []
    await publisher.close(0.1)


async def test_overflow_spool_uses_the_disk_only_when_the_sink_does_not_keep_up():
    """With overflow="spool", batches go to the sink while it works, and to the disk while it fails."""
    spool = ListSpool()
    gate = asyncio.Event()

    async def fail(batch, batch_id):
        if not gate.is_set():
            raise OSError("down")

    publisher = scripted([None] * 3 + [fail] * 100_000, spool=spool, overflow="spool", batch=2)
    await publisher.start()
    await until(lambda: publisher._store.is_empty)
    for number in range(6):
        publisher.emit(b"%d" % number)
    await until(lambda: len(publisher.sink.events) == 6)
    assert spool.appended == []
    for number in range(6, 12):
        publisher.emit(b"%d" % number)
    await until(lambda: len(spool.appended) == 3)
    gate.set()
    await until(lambda: len(publisher.sink.events) == 12)
    assert publisher.sink.events == [b"%d" % number for number in range(12)]
    await publisher.close()
    assert_counters_add_up(publisher.stats())


async def test_a_cancelled_flusher_neither_loses_nor_repeats_spooled_batches():
    """Batches that are partly accounted for, or sent and not deleted, are continued by the next flusher."""
    spool = ListSpool()
    publisher = scripted(spool=spool, batch=2)
    for number in range(200):
        publisher.emit(b"%d" % number)
        if number % 20 == 0:
            await asyncio.sleep(0.001)
            publisher._flusher._task.cancel()
            await until(lambda: publisher._flusher._task.done())
    await publisher.close()
    stats = publisher.stats()
    assert_counters_add_up(stats)
    assert stats["delivered"] == 200
    first = list(dict.fromkeys(publisher.sink.events))
    assert first == [b"%d" % number for number in range(200)]
    assert spool.rows == {}


async def test_overflow_spool_goes_to_the_disk_when_the_queue_is_half_full():
    """A healthy sink that is too slow costs no event: those that it cannot take in time wait on the disk, in order."""
    spool = ListSpool()

    async def take_long(batch, batch_id):
        await asyncio.sleep(0.02)

    publisher = scripted([take_long] * 100_000, spool=spool, overflow="spool", batch=10, max_events=1000)
    await publisher.start()
    await until(lambda: publisher._store.is_empty)
    # Five times as many as the sink takes.
    for first in range(0, 4000, 25):
        for number in range(first, first + 25):
            assert publisher.emit(b"%d" % number)
        await asyncio.sleep(0.005)
    assert spool.appended
    assert publisher.stats()["refused"] == {}
    publisher.sink.script.clear()
    assert (await publisher.close(20))["status"] == "flushed"
    assert publisher.sink.events == [b"%d" % number for number in range(4000)]
    assert_counters_add_up(publisher.stats())


async def test_a_queue_that_fills_ends_the_wait_for_a_slow_write(monkeypatch):
    """While one write takes long, events go to the disk as soon as the queue is half full, not when patience ends."""
    monkeypatch.setattr(_routes, "PATIENCE", 3600.0)
    spool = ListSpool()
    gate = asyncio.Event()

    async def wait(batch, batch_id):
        await gate.wait()

    publisher = scripted([wait], spool=spool, overflow="spool", batch=10, max_events=200)
    await publisher.start()
    await until(lambda: publisher._store.is_empty)
    publisher.emit(b"0")
    await until(lambda: publisher.sink.calls)
    for number in range(1, 121):
        publisher.emit(b"%d" % number)
    await until(lambda: len(spool.appended) >= 12)
    gate.set()
    await publisher.close(20)
    assert sorted(publisher.sink.events, key=int) == publisher.sink.events == [b"%d" % number for number in range(121)]


class PoisonedSink(ScriptedSink):
    """Breaks the connection at each batch with a bad event; knows the ids of batches."""

    def __init__(self, script=()):
        super().__init__(script)
        self.ids = set()
        self.is_down = False

    async def open(self):
        if self.is_down:
            raise ConnectionError("no server")

    async def write(self, batch, batch_id):
        self.calls.append((batch_id, list(batch)))
        if b"bad" in batch:
            raise ConnectionResetError("connection reset by peer")
        assert batch_id not in self.ids
        self.ids.add(batch_id)
        self.events.extend(batch)


@pytest.mark.parametrize("spool", [False, True], ids=["", "spool"])
async def test_a_poison_event_is_isolated(spool, tmp_path):
    """After max_attempts a batch is halved, until the bad event is alone; all others arrive once."""
    options = {"spool": ListSpool()} if spool else {}
    publisher = scripted(sink=PoisonedSink, max_attempts=2, batch=100, dead_letters=tmp_path / "dead", **options)
    events = [b"%d" % number for number in range(99)]
    for event in [*events[:40], b"bad", *events[40:]]:
        publisher.emit(event)
    publisher.emit(b"behind")
    report = await publisher.close(20)
    assert report["status"] == "flushed"
    assert publisher.sink.events == [*events, b"behind"]
    assert publisher.stats()["dropped"] == {"retries_exhausted": 1}
    assert_counters_add_up(publisher.stats())
    (letter,) = map(msgspec.json.decode, (tmp_path / "dead").read_bytes().splitlines())
    assert (letter["event"], letter["error"]) == ("bad", "ConnectionResetError: connection reset by peer")
    # Two tries of the batch and of each of its halves with the bad event.
    assert Counter(batch_id for batch_id, batch in publisher.sink.calls if b"bad" in batch).most_common()[-1][1] == 2


async def test_an_outage_does_not_count_as_poison():
    """Tries to open the sink, and Retry, are no attempts: nothing is halved or dropped."""
    publisher = scripted([], sink=PoisonedSink, max_attempts=1, batch=4)
    publisher.sink.is_down = True
    for number in range(4):
        publisher.emit(b"%d" % number)
    await until(lambda: publisher.stats()["retried"] >= 5)
    publisher.sink.is_down = False
    await publisher.close(20)
    assert [batch for _, batch in publisher.sink.calls] == [[b"0", b"1", b"2", b"3"]]

    publisher = scripted([Retry()] * 5, max_attempts=1, batch=4)
    for number in range(4):
        publisher.emit(b"%d" % number)
    await publisher.close(20)
    assert {len(batch) for _, batch in publisher.sink.calls} == {4}
    assert publisher.stats()["delivered"] == 4


class ConfirmingSink(ScriptedSink):
    """Takes all events but the last of each batch, then fails; says which it took."""

    hangs = False

    async def write(self, batch, batch_id):
        self.calls.append((batch_id, list(batch)))
        if self.hangs:
            await asyncio.Event().wait()
        raise OSError("no confirmation")

    def written(self, batch_id):
        (batch,) = [batch for each, batch in self.calls if each == batch_id][:1]
        return [0, 1, 99] if len(batch) == 3 else []


@pytest.mark.parametrize("end", ["given up", "closed", "cancelled"])
async def test_events_that_are_in_are_delivered_though_their_batch_is_given_up(end, tmp_path):
    """A sink that confirms single events says which are in: they are neither dropped nor dead letters."""
    retry_for = 0.0 if end == "given up" else 60.0
    publisher = scripted(sink=ConfirmingSink, retry_for=retry_for, batch=3, linger=0.05, dead_letters=tmp_path / "dead")
    publisher.sink.hangs = end == "cancelled"
    waiting = [asyncio.create_task(publisher.publish(b"%d" % number, durable=True)) for number in range(3)]
    await until(lambda: publisher.sink.calls)
    if end == "given up":
        await until(lambda: publisher.stats()["dropped"])
    # Long enough for the thread that writes the dead letters.
    await publisher.close(1.5)
    reason = "retries_exhausted" if end == "given up" else "timeout"
    assert publisher.stats()["dropped"] == {reason: 1}
    assert publisher.stats()["delivered"] == 2
    assert_counters_add_up(publisher.stats())
    assert await asyncio.gather(*waiting) == [True, True, False]
    letters = [msgspec.json.decode(line) for line in (tmp_path / "dead").read_bytes().splitlines()]
    assert [letter["event"] for letter in letters] == ["2"]


@pytest.mark.parametrize("method", ["open", "write"])
async def test_a_sink_that_hangs_is_shown(method, monkeypatch):
    """Before any timeout of the sink: the state, the call that hangs, and the age of the event in flight."""
    monkeypatch.setattr(delivery_module, "STALLED_AFTER", 0.05)
    gate = asyncio.Event()

    class Hanging(ScriptedSink):
        async def open(self):
            if method == "open":
                await gate.wait()

        async def write(self, batch, batch_id):
            await gate.wait()
            await super().write(batch, batch_id)

    publisher = scripted(sink=Hanging)
    publisher.emit(b"1")
    await until(lambda: publisher.stats()["state"] == "stalled")
    stats = publisher.stats()
    assert stats["last_error"].startswith(f"{method} of Hanging has not returned for ")
    assert stats["oldest_age_seconds"] >= 0.05
    report = await publisher.flush(0.01)
    assert "has not returned" in report["last_error"]
    gate.set()
    await publisher.close(20)
    assert publisher.stats()["last_error"] is None


def test_a_wrong_max_attempts_is_refused():
    """It is a whole number, or None."""
    with pytest.raises(InvalidOptionError, match="max_attempts"):
        scripted(max_attempts=0)
