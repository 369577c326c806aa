"""Retries, refused events, dead letters, the spool's side of the flusher; on both rings and all loops."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from types import SimpleNamespace

import msgspec
import pytest
from event_tools import ScriptedPublisher, assert_books_close, until

from bgtasks.events import Reject, Retry
from bgtasks.events import _delivery as delivery_module

pytestmark = pytest.mark.usefixtures("ring_of_twin", "_quick_retries")


@pytest.fixture
def _quick_retries(monkeypatch):
    """Keep the form of the back-off and shorten it."""
    monkeypatch.setattr(delivery_module, "FIRST_DELAY", 0.0005)
    monkeypatch.setattr(delivery_module, "LONGEST_DELAY", 0.002)


@pytest.mark.parametrize("error", [Retry(), OSError("down"), ValueError("a bug")], ids=repr)
async def test_a_failed_batch_is_written_again_with_the_same_bytes_and_id(error, caplog):
    """Any error that is no Reject; order holds, and the log says it once."""
    publisher = ScriptedPublisher([error] * 5, batch=2)
    for number in range(6):
        publisher.emit({"number": number})
    report = await publisher.close()
    assert report["status"] == "flushed"
    assert [msgspec.json.decode(event)["number"] for event in publisher.events] == list(range(6))
    assert publisher.calls[0] == publisher.calls[1] == publisher.calls[5]
    assert len({batch_id for batch_id, _ in publisher.calls}) == 3
    stats = publisher.stats()
    assert stats["retried"] == 5
    assert stats["last_error"] is None
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


async def test_other_errors_than_retry_have_the_sink_opened_again():
    """What broke may have broken the connection."""
    publisher = ScriptedPublisher([Retry(), OSError("broken pipe"), None])
    publisher.emit({"number": 1})
    await publisher.flush(20)
    assert publisher.opened == 2
    assert publisher.released == 1
    await publisher.close()
    assert publisher.released == 2


async def test_what_a_sink_asks_to_wait_is_waited():
    """Retry-After."""
    publisher = ScriptedPublisher([Retry(after=0.15)])
    publisher.emit({"number": 1})
    begun = time.monotonic()
    await publisher.flush(20)
    assert time.monotonic() - begun >= 0.15
    await publisher.close()


def test_delays_double_with_full_jitter_between_50_ms_and_30_s(monkeypatch):
    """The bounds as promised, whatever other tests shorten."""
    monkeypatch.setattr(delivery_module, "FIRST_DELAY", 0.05)
    monkeypatch.setattr(delivery_module, "LONGEST_DELAY", 30.0)
    asked = []
    monkeypatch.setattr(random, "uniform", lambda low, high: asked.append((low, high)) or 0.0)
    publisher = ScriptedPublisher([Retry()] * 14)

    async def main():
        publisher.emit({"number": 1})
        await publisher.close()

    asyncio.run(main())
    assert [low for low, _ in asked] == [0] * 14
    assert [high for _, high in asked][:4] == [0.05, 0.1, 0.2, 0.4]
    assert [high for _, high in asked][-2:] == [30.0, 30.0]


async def test_a_batch_is_given_up_after_its_time_and_the_pipe_goes_on(tmp_path):
    """retry_for; the events go to the dead letters."""
    publisher = ScriptedPublisher([OSError("down")] * 1000, retry_for=0.01, batch=2, dead_letters=tmp_path / "dead")
    publisher.emit({"number": 1})
    publisher.emit({"number": 2})
    await until(lambda: publisher.stats()["dropped"])
    publisher.script.clear()
    publisher.emit({"number": 3})
    await publisher.close()
    stats = publisher.stats()
    assert stats["dropped"] == {"retries_exhausted": 2}
    assert stats["delivered"] == 1
    assert_books_close(stats)
    letters = [msgspec.json.decode(line) for line in (tmp_path / "dead").read_bytes().splitlines()]
    assert [letter["event"] for letter in letters] == ['{"number":1}', '{"number":2}']
    assert letters[0]["reason"] == "retries_exhausted"
    assert letters[0]["error"] == "OSError: down"
    assert letters[0]["batch_id"] == publisher.calls[0][0]


class Picky(ScriptedPublisher):
    """Refuses some events; tells which, or leaves it to the flusher to find out."""

    def __init__(self, bad, tells, **options):
        super().__init__(**options)
        self.bad = bad
        self.tells = tells

    async def write(self, batch, batch_id):
        """Write all but what is bad."""
        self.calls.append((batch_id, list(batch)))
        refused = [index for index, event in enumerate(batch) if event in self.bad]
        if refused and not self.tells:
            raise Reject(reason="bad in here")
        self.events.extend(event for event in batch if event not in self.bad)
        if refused:
            raise Reject(refused, "bad")


@pytest.mark.parametrize("tells", [True, False])
async def test_refused_events_end_alone_among_the_dead_letters(tells, tmp_path):
    """One in many, several in one batch, first and last; all others arrive, in order, once."""
    events = [b"%d" % number for number in range(100)]
    bad = {b"0", b"31", b"32", b"77", b"99"}
    publisher = Picky(bad, tells, batch=50, dead_letters=tmp_path / "dead.jsonl")
    for event in events:
        publisher.emit(event)
    report = await publisher.close()
    assert report["status"] == "flushed"
    assert publisher.events == [event for event in events if event not in bad]
    stats = publisher.stats()
    assert stats["dropped"] == {"rejected": 5}
    assert_books_close(stats)
    letters = [msgspec.json.decode(line) for line in (tmp_path / "dead.jsonl").read_bytes().splitlines()]
    assert sorted(letter["event"].encode() for letter in letters) == sorted(bad)
    assert all("Reject: bad" in letter["error"] for letter in letters)


async def test_halves_keep_their_ids_over_retries():
    """A half that is tried again is the same half."""
    bad = {b"1"}

    class Flaky(Picky):
        async def write(self, batch, batch_id):
            if Counter(call[0] for call in self.calls)[batch_id] == 0:
                self.calls.append((batch_id, list(batch)))
                raise Retry
            await super().write(batch, batch_id)

    publisher = Flaky(bad, False)
    for number in range(4):
        publisher.emit(b"%d" % number)
    await publisher.close()
    contents = {}
    for batch_id, batch in publisher.calls:
        assert contents.setdefault(batch_id, batch) == batch
    assert publisher.events == [b"0", b"2", b"3"]


async def test_indexes_outside_the_batch_find_the_bad_event_all_the_same():
    """A sink that counts wrongly does not stop the pipe."""

    class Wrong(ScriptedPublisher):
        async def write(self, batch, batch_id):
            raise Reject([99])

    publisher = Wrong()
    publisher.emit(b"1")
    publisher.emit(b"2")
    await publisher.close()
    assert publisher.stats()["dropped"] == {"rejected": 2}
    assert_books_close(publisher.stats())


async def test_dead_letters_that_cannot_be_written_stop_nothing(tmp_path, caplog):
    """No such folder."""
    publisher = Picky({b"1"}, True, dead_letters=tmp_path / "missing" / "dead.jsonl")
    publisher.emit(b"1")
    publisher.emit(b"2")
    report = await publisher.close()
    assert report["status"] == "flushed"
    assert publisher.events == [b"2"]
    assert "cannot write its dead letters" in caplog.text


async def test_bytes_that_are_no_text_are_kept_in_base64(tmp_path):
    """Dead letters are JSON whatever the event was."""
    publisher = Picky({b"\xff\n"}, True, dead_letters=tmp_path / "dead.jsonl")
    publisher.emit(b"\xff\n")
    await publisher.close()
    (letter,) = map(msgspec.json.decode, (tmp_path / "dead.jsonl").read_bytes().splitlines())
    assert letter["base64"] == "/wo="


async def test_the_state_says_how_it_stands():
    """ok, retrying, ok."""
    gate = asyncio.Event()

    async def fail(batch, batch_id):
        if not gate.is_set():
            raise OSError("down")

    publisher = ScriptedPublisher([fail] * 100_000)
    assert publisher.stats()["state"] == "ok"
    publisher.emit(b"1")
    await until(lambda: publisher.stats()["state"] == "retrying")
    assert publisher.stats()["last_error"] == "OSError: down"
    gate.set()
    await until(lambda: publisher.events)
    assert publisher.stats()["state"] == "ok"
    assert publisher.stats()["last_error"] is None
    await publisher.close()


async def test_a_client_that_cannot_be_closed_is_told_of_and_let_go(caplog):
    """Release raises."""

    class Stuck(ScriptedPublisher):
        async def release(self):
            raise OSError("no")

    publisher = Stuck()
    publisher.emit(b"1")
    report = await publisher.close()
    assert report["status"] == "flushed"
    assert "could not close its client" in caplog.text


class ListSpool:
    """A spool in memory, that fails to order."""

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
        return SimpleNamespace(
            events=sum(map(len, self.rows.values())), recovered=self.recovered, dropped=dict(self.dropped)
        )

    def close(self):
        self.closed = True


async def test_with_a_spool_every_batch_is_committed_before_it_is_sent():
    """Write-ahead; the books move through spooled to delivered."""
    spool = ListSpool()
    committed = []

    async def look(batch, batch_id):
        committed.append(batch_id in spool.rows)

    publisher = ScriptedPublisher([look] * 10, spool=spool, batch=2)
    for number in range(10):
        publisher.emit(b"%d" % number)
    report = await publisher.close()
    assert report["status"] == "flushed"
    assert committed == [True] * 5
    assert publisher.events == [b"%d" % number for number in range(10)]
    assert spool.rows == {}
    assert spool.closed
    assert publisher.stats()["delivered"] == 10
    assert_books_close(publisher.stats())


async def test_with_a_spool_a_batch_is_never_given_up():
    """No elapsed-time drop; new batches queue behind, and close leaves them on the disk."""
    spool = ListSpool()
    publisher = ScriptedPublisher([OSError("down")] * 100_000, spool=spool, batch=2, retry_for=0)
    for number in range(6):
        publisher.emit(b"%d" % number)
    await until(lambda: publisher.stats()["spooled"] == 6 and publisher.stats()["retried"] > 5)
    assert publisher.stats()["state"] == "spooling"
    assert publisher.stats()["dropped"] == {}
    report = await publisher.close(0.2)
    assert report["status"] == "deadline"
    assert report["spooled"] == 6
    assert [event for batch in spool.rows.values() for event in batch] == [b"%d" % number for number in range(6)]
    assert_books_close(publisher.stats())


async def test_what_an_earlier_process_left_goes_first_with_its_ids():
    """Recovered events are accepted, spooled, delivered."""
    spool = ListSpool({"old-1": [b"a", b"b"], "old-2": [b"c"]})
    publisher = ScriptedPublisher(spool=spool)
    publisher.emit(b"new")
    await until(lambda: len(publisher.events) == 4)
    assert publisher.events == [b"a", b"b", b"c", b"new"]
    assert [batch_id for batch_id, _ in publisher.calls][:2] == ["old-1", "old-2"]
    await publisher.close()
    stats = publisher.stats()
    assert stats["recovered"] == 3
    assert stats["accepted"] == stats["delivered"] == 4
    assert_books_close(stats)


async def test_a_spool_that_fails_is_passed_by_when_there_is_nothing_to_overtake():
    """A full disk stops nothing else; order holds."""
    spool = ListSpool()
    publisher = ScriptedPublisher(spool=spool, batch=2)
    publisher.emit(b"0")
    await until(lambda: publisher.events)
    spool.broken = True
    for number in range(1, 6):
        publisher.emit(b"%d" % number)
    await until(lambda: len(publisher.events) == 6)
    assert publisher.stats()["spool_errors"] >= 1
    assert "disk full" in publisher.stats()["last_error"]
    spool.broken = False
    publisher.emit(b"6")
    await until(lambda: len(publisher.events) == 7)
    assert publisher.events == [b"%d" % number for number in range(7)]
    await publisher.close()
    assert_books_close(publisher.stats())


async def test_what_the_spool_drops_is_in_the_books():
    """Its own quota and age."""
    spool = ListSpool()
    publisher = ScriptedPublisher([OSError("down")] * 100_000, spool=spool, batch=2)
    for number in range(12):
        publisher.emit(b"%d" % number)
    await until(lambda: publisher.stats()["spooled"] == 12)
    # Not one of those that were read already: a spool does not drop what it has handed out.
    spool.rows.pop(spool.appended[5])
    spool.dropped["expired"] += 2
    publisher.emit(b"12")
    await until(lambda: publisher.stats()["dropped"] == {"expired": 2})
    publisher.script.clear()
    await publisher.close()
    assert publisher.events == [b"%d" % number for number in range(13) if number not in (10, 11)]
    assert_books_close(publisher.stats())


async def test_durable_returns_after_the_commit():
    """With a spool: on the disk, not in the sink."""
    spool = ListSpool()
    publisher = ScriptedPublisher([OSError("down")] * 100_000, spool=spool)
    assert await publisher.publish(b"1", durable=True)
    assert list(spool.rows.values()) == [[b"1"]]
    assert publisher.events == []
    await publisher.close(0.1)


async def test_overflow_spool_uses_the_disk_only_when_the_sink_does_not_keep_up():
    """Straight to the sink while that works; behind what is on the disk while that does not."""
    spool = ListSpool()
    gate = asyncio.Event()

    async def fail(batch, batch_id):
        if not gate.is_set():
            raise OSError("down")

    publisher = ScriptedPublisher([None] * 3 + [fail] * 100_000, spool=spool, overflow="spool", batch=2)
    await publisher.start()
    await until(lambda: publisher._flusher.store.is_empty)
    for number in range(6):
        publisher.emit(b"%d" % number)
    await until(lambda: len(publisher.events) == 6)
    assert spool.appended == []
    for number in range(6, 12):
        publisher.emit(b"%d" % number)
    await until(lambda: len(spool.appended) == 3)
    gate.set()
    await until(lambda: len(publisher.events) == 12)
    assert publisher.events == [b"%d" % number for number in range(12)]
    await publisher.close()
    assert_books_close(publisher.stats())


async def test_a_cancelled_flusher_neither_loses_nor_repeats_what_is_on_the_disk():
    """Half settled, sent and not deleted: each is found again."""
    spool = ListSpool()
    publisher = ScriptedPublisher(spool=spool, batch=2)
    for number in range(200):
        publisher.emit(b"%d" % number)
        if number % 20 == 0:
            await asyncio.sleep(0.001)
            publisher._flusher._task.cancel()
            await until(lambda: publisher._flusher._task.done())
    await publisher.close()
    stats = publisher.stats()
    assert_books_close(stats)
    assert stats["delivered"] == 200
    first = list(dict.fromkeys(publisher.events))
    assert first == [b"%d" % number for number in range(200)]
    assert spool.rows == {}
