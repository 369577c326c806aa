"""JSON lines: whole lines in order, repair, rotation, full disks, and processes that are killed."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys

import msgspec
import pytest
from disks import fill_disk, small_disk
from event_tools import assert_counters_add_up, until
from paths import PACKAGE

from bgtasks import InvalidOptionError
from bgtasks.events import Publisher, Reject, _line_file
from bgtasks.events._line_file import LineFile
from bgtasks.events.sinks.jsonl import JsonlSink

with_each_queue = pytest.mark.usefixtures("queue_of_twin")


@pytest.fixture
def path(tmp_path):
    """Give the path of a file that does not exist yet."""
    return tmp_path / "events.jsonl"


def numbers_in(*paths):
    """Return the numbers in files of JSON lines."""
    return [msgspec.json.decode(line)["n"] for path in paths for line in path.read_bytes().splitlines()]


def numbered(*numbers):
    """Return encoded events with their numbers."""
    return [b'{"n":%d}' % number for number in numbers]


# -- the sink alone ---------------------------------------------------------------------------------------------------


async def test_each_event_of_a_batch_is_a_line(path):
    """The events are written as they are, one per line, in their order."""
    async with JsonlSink(path) as sink:
        await sink.write(numbered(1, 2), "id-1")
        await sink.write(numbered(3), "id-2")
        assert path.read_bytes() == b'{"n":1}\n{"n":2}\n{"n":3}\n'
    assert sink.path == path
    assert sink.repaired_bytes == 0


async def test_the_last_batch_is_not_written_again(path):
    """A second write of the same id does nothing: the first one had succeeded after its caller was cancelled."""
    async with JsonlSink(path) as sink:
        for _ in range(2):
            await sink.write(numbered(1, 2), "id-1")
    assert numbers_in(path) == [1, 2]


async def test_a_file_is_appended_to(path):
    """A second sink continues the file of the first."""
    for number in range(3):
        async with JsonlSink(path) as sink:
            await sink.write(numbered(number), f"id-{number}")
    assert numbers_in(path) == [0, 1, 2]


async def test_a_sink_can_be_opened_again(path):
    """After ``close`` the file is free and complete; ``open`` continues it."""
    sink = JsonlSink(path)
    for number in range(3):
        await sink.open()
        await sink.write(numbered(number), f"id-{number}")
        await sink.close()
    assert numbers_in(path) == [0, 1, 2]


@pytest.mark.parametrize("torn", [b'{"n": 7', b"x" * 200_000, b"\xff"])
async def test_open_repairs_a_torn_last_line(path, torn):
    """Bytes that a crash left after the last line break are cut off; whole lines stay."""
    path.write_bytes(b'{"n": 1}\n{"n": 2}\n' + torn)
    async with JsonlSink(path) as sink:
        assert sink.repaired_bytes == len(torn)
        await sink.write(numbered(3), "id")
    assert numbers_in(path) == [1, 2, 3]
    assert sink.repaired_bytes == len(torn)


async def test_open_empties_a_file_of_half_a_line(path):
    """A file without any line break is empty after the repair."""
    path.write_bytes(b'{"n": 1')
    async with JsonlSink(path) as sink:
        assert path.read_bytes() == b""
        await sink.write(numbered(3), "id")
    assert numbers_in(path) == [3]


async def test_files_rotate_by_size_and_old_ones_are_deleted(tmp_path, path):
    """No file grows beyond rotate_bytes; keep is the number of old files."""
    async with JsonlSink(path, rotate_bytes=100, keep=2) as sink:
        for number in range(100):
            await sink.write(numbered(number), f"id-{number}")
    last = max(int(file.suffix[1:]) for file in tmp_path.iterdir() if file != path)
    files = [tmp_path / f"events.jsonl.{last - 1}", tmp_path / f"events.jsonl.{last}", path]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(file.stat().st_size <= 100 for file in files)
    numbers = numbers_in(*files)
    assert numbers == list(range(100 - len(numbers), 100))


async def test_rotation_continues_the_numbers_of_earlier_files(tmp_path, path):
    """No file of an earlier process is overwritten; those that are too many are deleted, other files are not."""
    for name in ("1", "7", "8", "9", "old", "007x"):
        (tmp_path / f"events.jsonl.{name}").write_text('{"n":0}\n')
    async with JsonlSink(path, rotate_bytes=8, keep=3) as sink:
        for number in range(1, 4):
            await sink.write(numbered(number), f"id-{number}")
    found = {file.name.removeprefix("events.jsonl") for file in tmp_path.iterdir()}
    assert found == {"", ".9", ".10", ".11", ".old", ".007x"}
    assert numbers_in(tmp_path / "events.jsonl.10", tmp_path / "events.jsonl.11", path) == [1, 2, 3]


async def test_rotation_renames_one_file_only(tmp_path, path, monkeypatch):
    """The work of a rotation does not grow with the number of files."""
    moves = []
    replace = os.replace
    monkeypatch.setattr(_line_file.os, "replace", lambda old, new: moves.append(replace(old, new)))
    async with JsonlSink(path, rotate_bytes=8, keep=1000) as sink:
        for number in range(50):
            await sink.write(numbered(number % 10), f"id-{number}")
    assert len(moves) == 49
    assert len(list(tmp_path.iterdir())) == 50


@pytest.mark.parametrize("change", ["renamed", "removed", "truncated", "replaced"])
async def test_changes_by_other_programs_are_noticed(tmp_path, path, change):
    """Logrotate renames the file, or copies and truncates it: no event is lost, and none goes where nobody looks."""
    moved = tmp_path / "moved"
    async with JsonlSink(path, rotate_bytes=200) as sink:
        await sink.write(numbered(1, 2), "id-1")
        if change == "renamed":
            path.rename(moved)
        elif change == "removed":
            path.unlink()
        elif change == "truncated":
            moved.write_bytes(path.read_bytes())
            os.truncate(path, 0)
        else:
            path.rename(moved)
            path.write_bytes(b'{"n":9}\n{"half')
        await sink.write(numbered(3), "id-2")
        await sink.write(numbered(4), "id-3")
    assert numbers_in(path) == ([9, 3, 4] if change == "replaced" else [3, 4])
    if change != "removed":
        assert numbers_in(moved) == [1, 2]
    assert not list(tmp_path.glob("events.jsonl.*"))


async def test_a_failed_write_to_a_truncated_file_leaves_no_gap(path, monkeypatch):
    """What is undone is cut off at the present end of the file, not at the one before the truncation."""
    async with JsonlSink(path) as sink:
        await sink.write(numbered(*range(50)), "id-1")
        os.truncate(path, 0)
        with monkeypatch.context() as patched:
            patched.setattr(_line_file.os, "write", lambda descriptor, data: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await sink.write(numbered(1), "id-2")
        await sink.write(numbered(1), "id-2")
    assert path.read_bytes() == b'{"n":1}\n'


def test_files_rotate_by_age(tmp_path, monkeypatch):
    """The age counts from opening, on the monotonic clock."""
    now = 1000.0
    monkeypatch.setattr(_line_file.time, "monotonic", lambda: now)
    file = LineFile(tmp_path / "lines", max_age=60, backups=1)
    file.append([b"1"])
    now += 59
    file.append([b"2"])
    now += 1
    file.append([b"3"])
    file.close()
    assert (tmp_path / "lines.1").read_bytes() == b"1\n2\n"
    assert (tmp_path / "lines").read_bytes() == b"3\n"


def test_keep_0_keeps_no_old_file(tmp_path):
    """A file that is full is deleted."""
    file = LineFile(tmp_path / "lines", max_bytes=3, backups=0)
    for line in (b"1", b"2", b"3"):
        file.append([line])
    file.close()
    assert [path.name for path in tmp_path.iterdir()] == ["lines"]
    assert (tmp_path / "lines").read_bytes() == b"3\n"


async def test_short_writes_are_continued(path, monkeypatch):
    """A system call may write a part of a batch; the rest follows."""
    write = os.write
    monkeypatch.setattr(_line_file.os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    async with JsonlSink(path) as sink:
        await sink.write(numbered(*range(50)), "id")
    assert numbers_in(path) == list(range(50))


async def test_fsync_is_called_for_each_batch(path, monkeypatch):
    """With fsync=True a batch is on the disk before ``write`` returns."""
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(_line_file.os, "fsync", lambda descriptor: synced.append(fsync(descriptor)))
    async with JsonlSink(path, fsync=True) as sink:
        for number in range(3):
            await sink.write(numbered(number), f"id-{number}")
            assert len(synced) == number + 1


async def test_an_event_with_a_line_break_is_rejected_alone(path):
    """It would be two lines; the other events of its batch are written."""
    async with JsonlSink(path) as sink:
        with pytest.raises(Reject, match="line break") as caught:
            await sink.write([b'{"n": 1}', b'{\n"n": 2}', b'{"n": 3}'], "id")
    assert caught.value.indexes == (1,)
    assert numbers_in(path) == [1, 3]


async def test_two_sinks_cannot_share_a_file(tmp_path, path):
    """The error recommends {pid} in the path, which stands for the id of the process."""
    async with JsonlSink(path):
        second = JsonlSink(path)
        with pytest.raises(BlockingIOError, match=r"\{pid\}"):
            await second.open()
        await second.close()
    async with JsonlSink(tmp_path / "events-{pid}.jsonl") as third:
        await third.write(numbered(1), "id")
    assert numbers_in(tmp_path / f"events-{os.getpid()}.jsonl") == [1]


@pytest.mark.parametrize("options", [{"rotate_bytes": -1}, {"rotate_age": "1"}, {"keep": None}], ids=str)
def test_an_option_outside_its_values_is_refused(options, path):
    """The error names the option."""
    (name,) = options
    with pytest.raises(InvalidOptionError, match=f"^{name} must be"):
        JsonlSink(path, **options)


# -- with a publisher -------------------------------------------------------------------------------------------------


@with_each_queue
async def test_json_lines_are_whole_and_in_order(path):
    """Each emitted event is a line."""
    publisher = Publisher(JsonlSink(path))
    for number in range(2000):
        publisher.emit({"n": number, "text": "line\nbreak"})
    report = await publisher.close()
    assert report["delivered"] == 2000
    assert numbers_in(path) == list(range(2000))


@with_each_queue
async def test_a_full_disk_is_tried_again_and_leaves_no_half_batch(path, monkeypatch):
    """After a short write and ENOSPC the half batch is cut off, so no event is doubled."""
    write = os.write
    full = True

    def limited(descriptor, data):
        if not full:
            return write(descriptor, data)
        if len(data) > 30:
            return write(descriptor, data[:30])
        raise OSError(errno.ENOSPC, "No space left on device")

    async with Publisher(JsonlSink(path)) as publisher:
        publisher.emit({"n": -1})
        await publisher.flush(20)
        monkeypatch.setattr(_line_file.os, "write", limited)
        for number in range(50):
            publisher.emit({"n": number})
        await until(lambda: publisher.stats()["retried"] > 1)
        assert numbers_in(path) == [-1]
        assert "No space left" in publisher.stats()["last_error"]
        full = False
    assert numbers_in(path) == [-1, *range(50)]
    assert_counters_add_up(publisher.stats())


@with_each_queue
async def test_events_wait_for_space_on_a_disk_that_is_full(tmp_path):
    """On a file system of 1 MiB every event is in the file once, in order, when there is space again."""
    with small_disk(tmp_path / "disk", 1) as disk:
        filler = fill_disk(disk, leave=100_000)
        publisher = Publisher(JsonlSink(disk / "events.jsonl"))
        for number in range(5000):
            publisher.emit({"n": number, "text": "x" * 50})
        await until(lambda: publisher.stats()["retried"])
        assert "ENOSPC" in publisher.stats()["last_error"] or "No space" in publisher.stats()["last_error"]
        filler.unlink()
        report = await publisher.close(30)
        assert report["status"] == "flushed"
        assert numbers_in(disk / "events.jsonl") == list(range(5000))


@with_each_queue
async def test_encoded_events_with_a_line_break_are_dead_letters(tmp_path, path):
    """They are counted as rejected; the other events of the batch are in the file."""
    publisher = Publisher(JsonlSink(path), dead_letters=tmp_path / "dead")
    publisher.emit(b'{"n": 1}')
    publisher.emit(b'{\n"n": 2}')
    publisher.emit(b'{"n": 3}')
    await publisher.close()
    assert numbers_in(path) == [1, 3]
    assert publisher.stats()["dropped"] == {"rejected": 1}
    assert b"line break" in (tmp_path / "dead").read_bytes()


@with_each_queue
async def test_start_raises_for_a_file_that_is_in_use(path):
    """With connect=True the second publisher of a file fails at once, and says why."""
    first = Publisher(JsonlSink(path), connect=True)
    await first.start()
    second = Publisher(JsonlSink(path), connect=True)
    with pytest.raises(BlockingIOError, match=r"\{pid\}"):
        await second.start()
    await first.close()
    await second.close()


@with_each_queue
async def test_a_path_that_cannot_be_opened_is_reported(tmp_path):
    """The report names the missing folder."""
    publisher = Publisher(JsonlSink(tmp_path / "missing" / "events.jsonl"), retry_for=0)
    publisher.emit({"n": 1})
    report = await publisher.flush(20)
    assert "missing" in report["last_error"]
    assert publisher.stats()["dropped"] == {"retries_exhausted": 1}
    await publisher.close()


@with_each_queue
async def test_a_batch_whose_write_was_cancelled_is_written_once(path):
    """The thread finishes the write in which the flusher was cancelled."""
    publisher = Publisher(JsonlSink(path), linger=0)
    for number in range(300):
        publisher.emit({"n": number})
        if number % 20 == 0:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task = publisher._flusher._task
            task.cancel()
            await asyncio.wait((task,))
    await publisher.close()
    assert numbers_in(path) == list(range(300))


def test_delivered_events_survive_a_kill(path):
    """After SIGKILL no delivered event is missing; the torn line is repaired, and no whole line is damaged."""
    program = f"""
import asyncio, sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
from bgtasks.events import Publisher
from bgtasks.events.sinks.jsonl import JsonlSink
async def main():
    publisher = Publisher(JsonlSink({str(path)!r}))
    number = 0
    while True:
        for _ in range(500):
            publisher.emit({{"n": number}})
            number += 1
        await publisher.flush()
        print(publisher.stats()["delivered"], flush=True)
asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    delivered = 0
    for _ in range(20):
        delivered = int(process.stdout.readline())
    process.kill()
    rest = process.stdout.read().split()
    process.wait()
    process.stdout.close()
    delivered = int(rest[-1]) if rest else delivered
    file = LineFile(path)
    file.open()
    file.close()
    numbers = numbers_in(path)
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= delivered
