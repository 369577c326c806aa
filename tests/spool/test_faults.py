"""What the spool keeps when its process is killed, and what it does on a disk that is full."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap

import pytest
from disks import fill_disk, small_disk

from bgtasks.events.errors import SpoolError, SpoolFullError
from bgtasks.events.spool import Spool

BATCH = [b"x" * 226] * 500
MEBIBYTE = 1 << 20

# Says each commit after it was made, and goes on until it is killed.
WRITER = """
    import os, sys
    from bgtasks.events.spool import Spool
    spool = Spool(sys.argv[1], sync=sys.argv[2])
    number = int(sys.argv[3])
    while True:
        spool.append([b"%d" % number] + [b"x" * 226] * 99, f"p-{number}")
        os.write(1, b"appended %d\\n" % number)
        number += 1
        if number % 3 == 0:
            [(batch_id, _)] = spool.oldest(1)
            spool.done(batch_id)
            os.write(1, b"done %s\\n" % batch_id[2:].encode())
"""


def run_and_kill(stem, sync, first, lines):
    """Run a writer until it has said so many lines, kill it, and return the last numbers that it said."""
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(stem), sync, str(first)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        said = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        said += process.stdout.readlines()
    last = {"appended": first - 1, "done": None}
    for line in said:
        verb, number = line.decode().split()
        last[verb] = int(number)
    return last


@pytest.mark.parametrize("sync", ["normal", "full"])
def test_what_is_committed_survives_a_kill(tmp_path, sync):
    """Killed again and again in the middle of its work, a spool has lost nothing that it said was committed."""
    stem = tmp_path / "events"
    chance = random.Random(5)
    appended, done = -1, -1
    for _ in range(6):
        last = run_and_kill(stem, sync, appended + 1, chance.randrange(20, 250))
        done = done if last["done"] is None else last["done"]
        spool = Spool(stem)
        batches = spool.oldest(10_000)
        spool.close()
        numbers = [int(batch[0]) for _, batch in batches]
        assert [batch_id for batch_id, _ in batches] == [f"p-{number}" for number in numbers]
        assert all(len(batch) == 100 for _, batch in batches)
        # The one step more is a commit that was made and not said any more.
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert numbers[0] - done in (1, 2)
        assert numbers[-1] - last["appended"] in (0, 1)
        appended, done = numbers[-1], numbers[0] - 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def disk(tmp_path):
    """Give a disk of 12 MiB."""
    with small_disk(tmp_path / "disk", 12) as directory:
        yield directory


def append_all(spool, numbers):
    """Append batches; return the ids of those that were taken."""
    taken = []
    for number in numbers:
        try:
            spool.append(BATCH, f"p-{number}")
        except SpoolFullError:
            continue
        taken.append(f"p-{number}")
    return taken


def ids(spool, count=1000):
    """Return the ids of what a spool holds."""
    return [batch_id for batch_id, _ in spool.oldest(count)]


@pytest.mark.parametrize("full", ["drop_oldest", "refuse"])
def test_a_full_disk_loses_nothing_uncounted(disk, full):
    """Each batch is in the spool, dropped and counted, or refused with an error; and the file stays sound."""
    spool = Spool(disk / "events", full=full)
    taken = append_all(spool, range(200))
    stats = spool.stats()
    assert 0 < stats.batches < 200
    assert len(taken) * 500 == stats.events + stats.dropped.get("spool_full", 0)
    held = ids(spool)
    assert held == [batch_id for batch_id in taken if batch_id in set(held)]
    spool.close()
    spool = Spool(disk / "events")
    assert ids(spool) == held
    assert all(batch == BATCH for _, batch in spool.oldest(1000))
    spool.close()


def test_a_full_disk_is_named_in_the_error(disk):
    """Not the quota is to blame, and the text says so."""
    spool = Spool(disk / "events", full="refuse")
    fill_disk(disk, leave=MEBIBYTE)
    append_all(spool, range(100))
    with pytest.raises(SpoolFullError, match="disk is full"):
        spool.append(BATCH, "one more")
    spool.close()


def test_what_is_done_on_a_full_disk_does_not_come_back(disk):
    """Where the disk takes no deletion either, the batch is left out all the same, and deleted when there is room."""
    spool = Spool(disk / "events", full="refuse")
    append_all(spool, range(30))
    filler = fill_disk(disk)
    append_all(spool, range(30, 200))
    before = ids(spool)
    for batch_id in before[:10]:
        spool.done(batch_id)
    assert spool._gone
    assert ids(spool) == before[10:]
    assert spool.size()[0] == (len(before) - 10) * 500
    filler.unlink()
    spool.append([b"new"], "new")
    spool.close()
    spool = Spool(disk / "events")
    assert ids(spool) == [*before[10:], "new"]
    spool.close()


def test_a_full_disk_is_drained_to_its_end(disk):
    """A sink that comes back empties the spool though nothing else can be written."""
    spool = Spool(disk / "events", full="refuse")
    fill_disk(disk, leave=6 * MEBIBYTE)
    taken = append_all(spool, range(200))
    drained = []
    while batches := spool.oldest(3):
        for batch_id, batch in batches:
            assert batch == BATCH
            drained.append(batch_id)
            spool.done(batch_id)
    assert drained == taken
    assert spool.size() == (0, 0)
    spool.close()


def test_no_room_for_a_file_is_an_error_that_passes(disk):
    """A spool that cannot even be made says so, and works once there is room."""
    filler = fill_disk(disk)
    spool = Spool(disk / "events")
    with pytest.raises(SpoolError, match="disk"):
        spool.append([b"event"], "id")
    assert [path.name for path in disk.iterdir()] == ["filler"]
    filler.unlink()
    spool.append([b"event"], "id")
    assert ids(spool) == ["id"]
    spool.close()


def test_the_quota_keeps_the_disk_free(disk):
    """A spool with less than the disk has never fills it."""
    spool = Spool(disk / "events", max_bytes=2 * MEBIBYTE)
    assert len(append_all(spool, range(300))) == 300
    free = os.statvfs(disk)
    assert free.f_bavail * free.f_frsize > MEBIBYTE
    spool.close()
