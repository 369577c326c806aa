"""Damaged files: whatever is overwritten, cut off or deleted, intact batches arrive once, and the rest is counted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import shutil
import sqlite3
import subprocess
import sys

import pytest
from event_tools import assert_counters_add_up, until

from bgtasks.events import Publisher
from bgtasks.events.sinks.memory import MemorySink
from bgtasks.events.spool import Spool, _file, _row

PAGE = _file.PAGE_SIZE
COLUMNS = _row.Row._fields


def batches_of(seed, count=40):
    """Return batches of very different sizes."""
    chance = random.Random(seed)
    batches = []
    for number in range(count):
        size = chance.choice([5, 50, 500, 20_000])
        batches.append(
            (f"b-{number}", [b"%d " % number + chance.randbytes(size) for _ in range(chance.choice([1, 3]))])
        )
    return batches


@pytest.fixture
def leave(tmp_path):
    """Give a function that leaves batches as a killed process does, and returns them, the stem and the file."""

    def leave_files(seed=0, count=40, written_back=True):
        batches = batches_of(seed, count)
        spool = Spool(tmp_path / "alive" / "events")
        (tmp_path / "alive").mkdir()
        for batch_id, batch in batches:
            spool.append(batch, batch_id)
        if written_back:
            spool._files[0].write_back()
        shutil.copytree(tmp_path / "alive", tmp_path / "left")
        for batch_id, _ in batches:
            spool.done(batch_id)
        spool.close()
        (path,) = (tmp_path / "left").glob("*.spool")
        return batches, tmp_path / "left" / "events", path

    return leave_files


def change(path, *statements):
    """Change a file by SQL, without its constraints."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA writable_schema = on")
    connection.execute("UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '')")
    connection.close()
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(*statement)
    connection.close()


def drained(stem):
    """Return all batches that a new spool hands out beside a new one, and its last statistics."""
    spool = Spool(stem)
    spool.append([b"new"], "new")
    found = []
    for _ in range(1000):
        batches = spool.oldest(4)
        if not batches:
            break
        found += batches
        for batch_id, _ in batches:
            spool.done(batch_id)
    else:
        raise AssertionError("it never ends")
    stats = spool.stats()
    spool.close()
    return found, stats


def assert_salvaged(stem, batches, most_lost, caplog, is_file=True):
    """Check that a spool hands out its batches but for a number of lost ones, unchanged, in order, once; counted."""
    caplog.set_level(logging.INFO, "bgtasks.events")
    found, stats = drained(stem)
    assert found.pop() == ("new", [b"new"])
    assert len(found) >= len(batches) - most_lost
    ids = [batch_id for batch_id, _ in found]
    assert ids == [batch_id for batch_id, _ in batches if batch_id in set(ids)]
    originals = dict(batches)
    assert all(batch == originals[batch_id] for batch_id, batch in found)
    assert stats["events"] == stats["bytes"] == stats["batches"] == 0
    events = sum(len(batch) for _, batch in found)
    assert stats["recovered"] == events + stats["dropped"].get("corrupt", 0)
    if len(found) < len(batches) and batches[-1][0] in ids and batches[0][0] in ids:
        # The missing batches are among those that are there, so their events are known.
        assert stats["recovered"] == sum(len(batch) for _, batch in batches)
    if is_file:
        assert stats["corrupt_files"] == len(list(stem.parent.glob("*.corrupt"))) == 1
        assert "damaged" in caplog.text
    assert list(stem.parent.glob("*.spool*")) == []
    return stats


@pytest.mark.parametrize("written_back", [True, False], ids=["in the file", "in the log"])
@pytest.mark.parametrize("number", [0, 20, 39])
def test_a_damaged_body_is_counted_wherever_it_is(leave, caplog, number, written_back):
    """Also that of the first and of the last batch: the columns before it tell how many events it had."""
    batches, stem, path = leave(written_back=written_back)
    start = batches[number][1][0][:7]
    hits = 0
    for file in (path, _file.log_of(path)):
        content = file.read_bytes() if file.exists() else b""
        hits += content.count(start)
        file.write_bytes(content.replace(start, bytes(byte ^ 0xFF for byte in start)))
    assert hits
    # A row that is read from the file is dropped alone; a damaged log is salvaged.
    stats = assert_salvaged(stem, batches, 1, caplog, is_file=not written_back)
    assert stats["dropped"]["corrupt"] == len(batches[number][1])
    assert stats["recovered"] == sum(len(batch) for _, batch in batches)


# -- rows -------------------------------------------------------------------------------------------------------------

VALUES = [None, -10, 10**12, 2.5, "text", b"\xff\xfe", b"", "99"]


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("column", [column for column in COLUMNS if column != "sequence"])
def test_any_wrong_column_costs_one_batch(leave, caplog, column, value):
    """A NULL, a wrong type, a wrong number or a text that is no UTF-8 is damage, and its count is not believed."""
    batches, stem, path = leave(7, 12)
    change(path, (f"UPDATE batches SET {column} = ? WHERE sequence = 5", (value,)))
    stats = assert_salvaged(stem, batches, 1, caplog, is_file=column != "body")
    if column == "body":
        assert stats["corrupt_files"] == 0
        assert "drops the batch b-5 " in caplog.text
    assert stats["dropped"] == {"corrupt": len(batches[5][1])}


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM batches WHERE sequence = 5",
        "UPDATE batches SET sequence = 1000 WHERE sequence = 5",
        "UPDATE batches SET sequence = -3 WHERE sequence = 5",
        "UPDATE batches SET batch_id = 'b-4' WHERE sequence = 5",
    ],
)
def test_a_row_that_is_missing_or_elsewhere_is_counted(leave, caplog, statement):
    """The numbers of the rows show a gap, and the positions how many events were in it."""
    batches, stem, path = leave(7, 12)
    change(path, (statement,))
    stats = assert_salvaged(stem, batches, 1, caplog)
    assert stats["dropped"] == {"corrupt": len(batches[5][1])}


def test_an_id_that_is_there_twice_is_sent_once(leave):
    """The second row of an id is ignored, whatever its checksums say; its events were accepted once."""
    batches, stem, path = leave(7, 12)
    batch = [b"twice"]
    row = _row.make_row(batch, "b-11", sequence=12, floor=0, position=0, created=0.0, uptime=0.0, boot=0)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (position,) = connection.execute("SELECT position + events FROM batches WHERE sequence = 11").fetchone()
    row = _row.renumbered(row, 12, position)
    change(path, (_file.INSERT, row))
    found, stats = drained(stem)
    assert found == [*batches, ("new", [b"new"])]
    assert stats["dropped"] == {}


def test_a_deletion_that_finds_no_row_is_noticed(tmp_path):
    """A row that SQLite reads and cannot delete is not returned for ever."""
    spool = Spool(tmp_path / "events")
    batches = batches_of(3, 20)
    for batch_id, batch in batches:
        spool.append(batch, batch_id)
    found = spool.oldest(4)
    spool._files[0]._connection.execute("DELETE FROM batches WHERE sequence = 1")
    for batch_id, _ in found:
        spool.done(batch_id)
    found += drain_all(spool)
    assert found == batches
    assert spool.stats()["events"] == 0
    # Noticed: the file is kept aside.
    assert spool.stats()["corrupt_files"] == 1
    spool.close()


def drain_all(spool):
    """Remove all batches of a spool and return them."""
    found = []
    while batches := spool.oldest(3):
        found += batches
        for batch_id, _ in batches:
            spool.done(batch_id)
    return found


# -- pages ------------------------------------------------------------------------------------------------------------


def overwrite(path, chance, start, end, content=None):
    """Overwrite a part of a file with random bytes or zeros."""
    with path.open("r+b") as file:
        file.seek(start)
        file.write(chance.randbytes(end - start) if content is None else content * (end - start))


@pytest.mark.parametrize("fill", [None, b"\0", b"\xff"], ids=["random", "zeros", "ones"])
@pytest.mark.parametrize("seed", range(12))
def test_a_bad_page_costs_what_is_in_it(leave, caplog, seed, fill):
    """Whichever page is overwritten, with the header, the schema, a leaf or the rest of a row, the others arrive."""
    batches, stem, path = leave(seed, 60)
    chance = random.Random(seed)
    pages = path.stat().st_size // PAGE
    page = chance.randrange(pages) if seed > 2 else seed
    overwrite(path, chance, page * PAGE, (page + 1) * PAGE, fill)
    # A leaf holds at most about twenty of these batches; one that holds none but a part of one costs that one.
    found, stats = drained(stem)
    check_subset(found, batches)
    assert len(found) - 1 >= len(batches) - 25
    if len(found) - 1 < len(batches):
        assert "damaged" in caplog.text
    assert list(stem.parent.glob("*.spool*")) == []
    assert stats["events"] == 0


def check_subset(found, batches):
    """Check that batches were returned unchanged, in order and once, and the new one last."""
    assert found[-1] == ("new", [b"new"])
    ids = [batch_id for batch_id, _ in found[:-1]]
    assert ids == [batch_id for batch_id, _ in batches if batch_id in set(ids)]
    originals = dict(batches)
    assert all(batch == originals[batch_id] for batch_id, batch in found[:-1])


@pytest.mark.parametrize("seed", range(12))
def test_the_root_of_the_table_may_be_lost(leave, caplog, seed):
    """Without header, schema and root, every batch in the other pages is found."""
    batches, stem, path = leave(seed, 120)
    overwrite(path, random.Random(seed), 0, 2 * PAGE)
    assert_salvaged(stem, batches, 25 if path.stat().st_size < 4 * PAGE else 0, caplog)


@pytest.mark.parametrize("seed", range(20))
def test_a_truncated_file_keeps_what_is_left(leave, caplog, seed):
    """A file that ends early, by one page or by most of them, gives the batches in front of its end."""
    batches, stem, path = leave(seed)
    size = path.stat().st_size
    pages = size // PAGE
    cut = 1 if seed % 2 else random.Random(seed).randrange(1, pages - 2)
    with path.open("r+b") as file:
        file.truncate((pages - cut) * PAGE - seed)
    found, stats = drained(stem)
    check_subset(found, batches)
    assert len(found) > 1 or cut > pages // 2
    assert stats["corrupt_files"] == 1
    if cut == 1:
        assert len(found) - 1 >= len(batches) - 20


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_never_stops_a_spool(leave, seed):
    """Bits flip and ranges are lost all over file and log: what comes out is right, and it ends."""
    batches, stem, path = leave(seed, 60, written_back=bool(seed % 2))
    chance = random.Random(seed)
    for target in (path, _file.log_of(path)):
        size = target.stat().st_size if target.exists() else 0
        for _ in range(chance.randrange(1, 8) if size else 0):
            start = chance.randrange(size)
            overwrite(target, chance, start, min(size, start + chance.choice([1, 1, 4, 100, 3 * PAGE])))
    found, stats = drained(stem)
    check_subset(found, batches)
    assert stats["events"] == stats["batches"] == 0
    assert stats["recovered"] - stats["dropped"].get("corrupt", 0) == sum(len(batch) for _, batch in found[:-1])


# -- the log ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_a_bad_frame_of_the_log_costs_what_is_in_it(leave, caplog, seed):
    """SQLite ignores what is behind the first bad frame; here the batches behind it arrive."""
    batches, stem, path = leave(seed, 60, written_back=False)
    log = _file.log_of(path)
    frame = PAGE + 24
    count = (log.stat().st_size - 32) // frame
    chance = random.Random(seed)
    at = 32 + frame * chance.randrange(count // 3)
    overwrite(log, chance, at + 500, at + 600)
    caplog.set_level(logging.INFO, "bgtasks.events")
    found, stats = drained(stem)
    check_subset(found, batches)
    assert len(found) - 1 >= len(batches) - 3
    assert stats["corrupt_files"] == 1
    assert "its log is damaged" in caplog.text


def test_a_lost_header_of_the_log_costs_nothing(leave, caplog):
    """The frames tell which of them belong together."""
    batches, stem, path = leave(1, 60, written_back=False)
    overwrite(_file.log_of(path), random.Random(1), 0, 32)
    assert_salvaged(stem, batches, 0, caplog)


def test_a_log_that_ends_in_the_middle_of_a_commit_is_no_damage(leave):
    """A process that is killed while it commits leaves such a log."""
    batches, stem, path = leave(1, 60, written_back=False)
    log = _file.log_of(path)
    with log.open("r+b") as file:
        file.truncate(log.stat().st_size - 100)
    found, stats = drained(stem)
    check_subset(found, batches)
    assert len(found) == len(batches)
    assert stats["corrupt_files"] == 0


# -- processes and publishers -----------------------------------------------------------------------------------------


def test_new_batches_are_not_lost_with_a_recovered_file(leave):
    """They are in a file of their own."""
    batches, stem, path = leave(2, 30)
    spool = Spool(stem)
    spool.append([b"mine"], "mine")
    assert spool.stats()["recovered"] == sum(len(batch) for _, batch in batches)
    before = path.stat().st_size
    shutil.copytree(stem.parent, stem.parent.parent / "again")
    again = stem.parent.parent / "again" / path.name
    assert again.stat().st_size == before
    overwrite(again, random.Random(1), 0, before)
    found = drain_all(Spool(stem.parent.parent / "again" / "events"))
    assert found == [("mine", [b"mine"])]
    spool.close()


KILLED = """
import os, sys
from bgtasks.events.spool import Spool, _folder
_folder.set_aside = lambda path: os._exit(7)
Spool(sys.argv[1]).open()
"""


def test_a_salvage_that_was_interrupted_is_completed(leave):
    """A process that is killed between the copy and the rename leaves no batch twice."""
    batches, stem, path = leave(2, 30)
    overwrite(path, random.Random(1), 0, PAGE)
    assert subprocess.run([sys.executable, "-c", KILLED, str(stem)], check=False, timeout=60).returncode == 7
    assert path.exists()
    found, stats = drained(stem)
    check_subset(found, batches)
    assert len(found) - 1 == len(batches)
    assert stats["corrupt_files"] == 1


async def test_a_publisher_on_a_damaged_spool_stays_in_balance(leave, queue_of_twin):
    """Salvaged events are delivered, lost ones counted, new ones accepted; nothing is sent again and again."""
    batches, stem, path = leave(5, 30)
    change(
        path,
        ("UPDATE batches SET events = 1000000000000 WHERE sequence = 3",),
        ("UPDATE batches SET batch_id = NULL WHERE sequence = 7",),
    )
    sink = MemorySink()
    publisher = Publisher(sink, spool=stem, linger=0.001)
    assert publisher.emit(b"mine")
    await until(lambda: publisher.stats()["delivered"] and not publisher.stats()["spooled"])
    await asyncio.sleep(0.05)
    stats = publisher.stats()
    assert_counters_add_up(stats)
    assert stats["dropped"] == {"corrupt": len(batches[3][1]) + len(batches[7][1])}
    expected = [event for number, (_, batch) in enumerate(batches) for event in batch if number not in (3, 7)]
    assert sink.events == [*expected, b"mine"]
    await publisher.close(30)
