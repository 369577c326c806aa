"""A spool whose process is killed, a spool on a full disk, and a spool whose machine loses its power."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import textwrap
import time

import pytest
from disks import fill_disk, image_disk, small_disk

from bgtasks.events.errors import SpoolError, SpoolFullError
from bgtasks.events.spool import Spool, _spool

BATCH = [b"x" * 226] * 500
MEBIBYTE = 1 << 20

# Prints a line after each commit, until it is killed.
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
    """Run a writer until it has printed a number of lines, kill it, and return the last numbers that it printed."""
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(stem), sync, str(first)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        printed = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        printed += process.stdout.readlines()
    last = {"appended": first - 1, "done": None}
    for line in printed:
        verb, number = line.decode().split()
        last[verb] = int(number)
    return last


@pytest.mark.parametrize("sync", ["interval", "full"])
def test_committed_batches_survive_a_kill(tmp_path, sync):
    """A spool whose process is killed again and again while it writes loses no committed batch."""
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
        # One more is a commit that was made and not printed any more.
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert numbers[0] - done in (1, 2)
        assert numbers[-1] - last["appended"] in (0, 1)
        appended, done = numbers[-1], numbers[0] - 1
    assert len(list(tmp_path.iterdir())) <= 6


@pytest.fixture
def disk(tmp_path):
    """Give a disk of 12 MiB."""
    with small_disk(tmp_path / "disk", 12) as directory:
        yield directory


def append_all(spool, numbers):
    """Append batches; return the ids of those that were accepted."""
    accepted = []
    for number in numbers:
        try:
            spool.append(BATCH, f"p-{number}")
        except SpoolFullError:
            continue
        accepted.append(f"p-{number}")
    return accepted


def ids(spool, count=1000):
    """Return the ids of the batches that a spool holds."""
    return [batch_id for batch_id, _ in spool.oldest(count)]


@pytest.mark.parametrize("overflow", ["drop_oldest", "raise"])
def test_a_full_disk_loses_nothing_uncounted(disk, overflow):
    """Each batch is in the spool, dropped and counted, or refused with an error; the file stays sound."""
    spool = Spool(disk / "events", overflow=overflow)
    accepted = append_all(spool, range(200))
    stats = spool.stats()
    assert 0 < stats["batches"] < 200
    assert len(accepted) * 500 == stats["events"] + stats["dropped"].get("spool_full", 0)
    held = ids(spool)
    assert held == [batch_id for batch_id in accepted if batch_id in set(held)]
    spool.close()
    spool = Spool(disk / "events")
    assert ids(spool) == held
    assert all(batch == BATCH for _, batch in spool.oldest(1000))
    spool.close()


def test_a_full_disk_is_named_in_the_error(disk):
    """The text blames the disk, not the quota."""
    spool = Spool(disk / "events", overflow="raise")
    fill_disk(disk, leave=MEBIBYTE)
    append_all(spool, range(100))
    with pytest.raises(SpoolFullError, match="disk is full"):
        spool.append(BATCH, "one more")
    spool.close()


def test_a_batch_that_is_done_on_a_full_disk_is_not_returned_again(disk):
    """If the disk does not take the deletion either, the batch is deleted when there is room."""
    spool = Spool(disk / "events", overflow="raise")
    append_all(spool, range(30))
    filler = fill_disk(disk)
    append_all(spool, range(30, 200))
    before = ids(spool)
    for batch_id in before[:10]:
        spool.done(batch_id)
    assert ids(spool) == before[10:]
    assert spool.stats()["events"] == (len(before) - 10) * 500
    filler.unlink()
    spool.append([b"new"], "new")
    spool.close()
    spool = Spool(disk / "events")
    assert ids(spool) == [*before[10:], "new"]
    spool.close()


def test_a_batch_that_is_done_on_a_full_disk_is_deleted_where_the_log_leaves_room(disk):
    """The deletion would make the log longer; written back into the file, the log is short enough for it."""
    spool = Spool(disk / "events", overflow="raise")
    for name in "abc":
        spool.append([b"event"], name)
    fill_disk(disk)
    assert ids(spool) == ["a", "b", "c"]
    spool.done("a")
    spool.close()
    spool = Spool(disk / "events")
    assert ids(spool) == ["b", "c"]
    spool.close()


def test_a_full_disk_is_drained_to_its_end(disk):
    """A spool on a full disk can be emptied though no batch can be appended."""
    spool = Spool(disk / "events", overflow="raise")
    fill_disk(disk, leave=6 * MEBIBYTE)
    accepted = append_all(spool, range(200))
    drained = []
    while batches := spool.oldest(3):
        for batch_id, batch in batches:
            assert batch == BATCH
            drained.append(batch_id)
            spool.done(batch_id)
    assert drained == accepted
    assert spool.stats()["events"] == spool.stats()["bytes"] == 0
    spool.close()


def test_a_spool_works_once_there_is_room_for_its_file(disk):
    """A disk without room for the file is an error that says so; the next call tries again."""
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
    """A spool whose quota is smaller than the disk never fills it."""
    spool = Spool(disk / "events", max_bytes=2 * MEBIBYTE)
    assert len(append_all(spool, range(300))) == 300
    free = os.statvfs(disk)
    assert free.f_bavail * free.f_frsize > MEBIBYTE
    spool.close()


@pytest.mark.parametrize("overflow", ["drop_oldest", "raise"])
def test_a_disk_that_the_spool_filled_is_empty_again_once_all_is_sent(disk, overflow):
    """A full disk refuses every deletion in a file, but not that of the file: nothing is left for the next process."""
    spool = Spool(disk / "events", overflow=overflow)
    while append_all(spool, [spool.stats()["batches"]]) and not spool.stats()["dropped"]:
        continue
    drained = 0
    while batches := spool.oldest(4):
        drained += len(batches)
        for batch_id, _ in batches:
            spool.done(batch_id)
    assert drained > 50
    free = os.statvfs(disk)
    assert free.f_bavail > 0.9 * free.f_blocks
    spool.append(BATCH, "next")
    spool.done("next")
    spool.close()
    assert list(disk.iterdir()) == []


def test_most_of_a_full_disk_is_not_sent_again(disk):
    """A process that is killed while it empties a full disk leaves no more than one file to be sent again."""
    spool = Spool(disk / "events", overflow="raise")
    append_all(spool, range(200))
    fill_disk(disk)
    before = ids(spool)
    for batch_id in before[: len(before) // 2]:
        spool.done(batch_id)
    left = len({path.name for path in disk.glob("*.spool")})
    # As after a kill.
    for file in spool._files:
        file.close()
    _spool._claims.clear()
    spool = Spool(disk / "events")
    after = ids(spool)
    spool.close()
    again = [batch_id for batch_id in after if batch_id in before[: len(before) // 2]]
    assert len(again) <= 2 * len(before) / left
    assert after == [*again, *before[len(before) // 2 :]]


def test_a_full_disk_drops_the_oldest(disk):
    """As with the quota, the newest batches are kept, and every dropped one is counted."""
    spool = Spool(disk / "events")
    fill_disk(disk, leave=4 * MEBIBYTE)
    assert len(append_all(spool, range(200))) == 200
    held = ids(spool)
    assert held == [f"p-{number}" for number in range(200 - len(held), 200)]
    assert 10 < len(held) < 40
    assert spool.stats()["dropped"] == {"spool_full": (200 - len(held)) * 500}
    spool.close()


# -- power cuts -------------------------------------------------------------------------------------------------------

# Appends batches and prints the number of each, at a pace, until it is killed.
SLOW_WRITER = """
    import os, sys, time
    from bgtasks.events.spool import Spool
    spool = Spool(sys.argv[1], sync=sys.argv[2])
    number = 0
    while True:
        spool.append([b"%d" % number] * 20, f"p-{number}")
        os.write(1, b"%d %f\\n" % (number, time.monotonic()))
        number += 1
        time.sleep(0.005)
"""


@pytest.mark.parametrize("sync", ["interval", "full"])
def test_a_power_cut_loses_no_more_than_the_interval(tmp_path, sync):
    """What the disk has at some moment, with nothing of the system's cache, is all but the last half second."""
    image = tmp_path / "image"
    with image_disk(image, tmp_path / "disk", 64) as directory:
        command = [sys.executable, "-c", textwrap.dedent(SLOW_WRITER), str(directory / "events"), sync]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            printed = [process.stdout.readline() for _ in range(300)]
            cut = time.monotonic()
            shutil.copy(image, tmp_path / "cut")
            process.kill()
            printed += process.stdout.readlines()
    times = {int(line.split()[0]): float(line.split()[1]) for line in printed}
    with image_disk(tmp_path / "cut", tmp_path / "after", None) as directory:
        spool = Spool(directory / "events")
        numbers = [int(batch[0]) for _, batch in spool.oldest(10_000)]
        spool.close()
    assert numbers == list(range(len(numbers)))
    lost = [number for number, at in times.items() if at < cut and number >= len(numbers)]
    # The interval, and the duration of a sync on a busy machine.
    oldest = cut - times[lost[0]] if lost else 0.0
    print(f"{sync}: {len(numbers)} kept, {len(lost)} lost, the oldest of them {oldest:.2f} s old")
    assert oldest < (3.0 if sync == "interval" else 0.2)
