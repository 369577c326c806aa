"""The publishers that need no server: JSON lines, console, fan-out, workers."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import subprocess
import sys

import msgspec
import pytest
from event_tools import ScriptedPublisher, assert_books_close, until
from paths import PACKAGE

from bgtasks import InvalidOptionError
from bgtasks.events import _line_file
from bgtasks.events._line_file import LineFile
from bgtasks.events.sinks.console import ConsolePublisher
from bgtasks.events.sinks.fanout import FanoutPublisher
from bgtasks.events.sinks.jsonl import JsonlPublisher
from bgtasks.events.sinks.memory import MemoryPublisher
from bgtasks.events.workers import WorkerPublisher, worker_publisher_of

pytestmark = pytest.mark.usefixtures("ring_of_twin")


def numbers_in(*paths):
    """Return the numbers in files of JSON lines."""
    return [msgspec.json.decode(line)["n"] for path in paths for line in path.read_bytes().splitlines()]


async def test_json_lines_are_whole_and_in_order(tmp_path):
    """One event a line."""
    publisher = JsonlPublisher(tmp_path / "events.jsonl")
    for number in range(2000):
        publisher.emit({"n": number, "text": "line\nbreak"})
    report = await publisher.close()
    assert report["delivered"] == 2000
    assert numbers_in(publisher.path) == list(range(2000))


async def test_a_file_is_appended_to(tmp_path):
    """A second publisher goes on where the first one stopped."""
    for number in range(3):
        async with JsonlPublisher(tmp_path / "events.jsonl") as publisher:
            publisher.emit({"n": number})
    assert numbers_in(publisher.path) == [0, 1, 2]


@pytest.mark.parametrize("torn", [b'{"n": 7', b"x" * 200_000, b"\xff"])
async def test_a_torn_last_line_is_mended_at_open(tmp_path, torn):
    """What a crash left after the last line break goes; whole lines stay."""
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2}\n' + torn)
    async with JsonlPublisher(path) as publisher:
        publisher.emit({"n": 3})
    assert numbers_in(path) == [1, 2, 3]
    assert publisher.mended_bytes == len(torn)


async def test_a_file_of_half_a_line_is_emptied(tmp_path):
    """No line break at all."""
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"n": 1')
    async with JsonlPublisher(path) as publisher:
        publisher.emit({"n": 3})
    assert numbers_in(path) == [3]


async def test_files_rotate_by_size_and_old_ones_go(tmp_path):
    """No file grows beyond the bound; keep says how many stay."""
    path = tmp_path / "events.jsonl"
    publisher = JsonlPublisher(path, rotate_bytes=100, keep=2, batch=1)
    for number in range(100):
        publisher.emit({"n": number})
    await publisher.close()
    files = [tmp_path / "events.jsonl.2", tmp_path / "events.jsonl.1", path]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(file.stat().st_size <= 100 for file in files)
    numbers = numbers_in(*files)
    assert numbers == list(range(100 - len(numbers), 100))


async def test_files_rotate_by_age(tmp_path, monkeypatch):
    """Counted from opening, on the monotonic clock."""
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


async def test_keep_0_starts_over(tmp_path):
    """Nothing old stays."""
    file = LineFile(tmp_path / "lines", max_bytes=3, backups=0)
    for line in (b"1", b"2", b"3"):
        file.append([line])
    file.close()
    assert [path.name for path in tmp_path.iterdir()] == ["lines"]
    assert (tmp_path / "lines").read_bytes() == b"3\n"


async def test_short_writes_are_gone_on_with(tmp_path, monkeypatch):
    """A system call may take a part."""
    write = os.write
    monkeypatch.setattr(_line_file.os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    async with JsonlPublisher(tmp_path / "events.jsonl") as publisher:
        for number in range(50):
            publisher.emit({"n": number})
    assert numbers_in(publisher.path) == list(range(50))


async def test_a_full_disk_is_tried_again_and_leaves_no_half_batch(tmp_path, monkeypatch):
    """A short write, then ENOSPC; the half batch is cut off, so nothing is there twice."""
    write = os.write
    full = True

    def limited(descriptor, data):
        if not full:
            return write(descriptor, data)
        if len(data) > 30:
            return write(descriptor, data[:30])
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "events.jsonl"
    async with JsonlPublisher(path) as publisher:
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
    assert_books_close(publisher.stats())


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a file system of its own")
async def test_a_disk_that_is_really_full(tmp_path):
    """4 MB of tmpfs: what was delivered is there once, in order, and the pipe goes on when there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        (disk / "ballast").write_bytes(bytes(900_000))
        publisher = JsonlPublisher(disk / "events.jsonl")
        for number in range(5000):
            publisher.emit({"n": number, "text": "x" * 50})
        await until(lambda: publisher.stats()["retried"])
        assert "ENOSPC" in publisher.stats()["last_error"] or "No space" in publisher.stats()["last_error"]
        (disk / "ballast").unlink()
        report = await publisher.close(30)
        assert report["status"] == "flushed"
        assert numbers_in(disk / "events.jsonl") == list(range(5000))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


async def test_fsync_is_asked_for_each_batch(tmp_path, monkeypatch):
    """fsync=True."""
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(_line_file.os, "fsync", lambda descriptor: synced.append(fsync(descriptor)))
    async with JsonlPublisher(tmp_path / "events.jsonl", fsync=True, batch=10) as publisher:
        for number in range(30):
            publisher.emit({"n": number})
    assert len(synced) == 3


async def test_ready_bytes_with_a_line_break_are_refused(tmp_path):
    """They would be two lines; the others arrive."""
    publisher = JsonlPublisher(tmp_path / "events.jsonl", dead_letters=tmp_path / "dead")
    publisher.emit(b'{"n": 1}')
    publisher.emit(b'{\n"n": 2}')
    publisher.emit(b'{"n": 3}')
    await publisher.close()
    assert numbers_in(publisher.path) == [1, 3]
    assert publisher.stats()["dropped"] == {"rejected": 1}
    assert b"line break" in (tmp_path / "dead").read_bytes()


async def test_two_publishers_do_not_share_a_file(tmp_path):
    """The second is told what to do; {pid} is it."""
    first = JsonlPublisher(tmp_path / "events.jsonl", connect=True)
    await first.start()
    second = JsonlPublisher(tmp_path / "events.jsonl", connect=True)
    with pytest.raises(BlockingIOError, match=r"\{pid\}"):
        await second.start()
    await first.close()
    await second.close()
    async with JsonlPublisher(tmp_path / "events-{pid}.jsonl") as third:
        third.emit({"n": 1})
    assert numbers_in(tmp_path / f"events-{os.getpid()}.jsonl") == [1]


async def test_a_path_that_cannot_be_written_is_told_of(tmp_path):
    """No such folder."""
    publisher = JsonlPublisher(tmp_path / "missing" / "events.jsonl", retry_for=0)
    publisher.emit({"n": 1})
    report = await publisher.flush(20)
    assert "missing" in report["last_error"]
    assert publisher.stats()["dropped"] == {"retries_exhausted": 1}
    await publisher.close()


async def test_a_cancelled_write_is_not_there_twice(tmp_path):
    """The thread finishes what the flusher was cancelled in."""
    publisher = JsonlPublisher(tmp_path / "events.jsonl", linger=0)
    for number in range(300):
        publisher.emit({"n": number})
        if number % 20 == 0:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task = publisher._flusher._task
            task.cancel()
            await asyncio.wait((task,))
    await publisher.close()
    assert numbers_in(publisher.path) == list(range(300))


@pytest.mark.parametrize("options", [{"rotate_bytes": -1}, {"rotate_age": "1"}, {"keep": None}], ids=str)
def test_bad_options_of_json_lines_are_named(options, tmp_path):
    """As those of every publisher."""
    with pytest.raises(InvalidOptionError, match=next(iter(options))):
        JsonlPublisher(tmp_path / "events.jsonl", **options)


def test_what_a_killed_process_acknowledged_is_in_the_file(tmp_path):
    """After kill -9 in the middle: nothing delivered is lost, the torn line is mended, nothing whole is hurt."""
    path = tmp_path / "events.jsonl"
    program = f"""
import asyncio, os, sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
from bgtasks.events.sinks.jsonl import JsonlPublisher
async def main():
    publisher = JsonlPublisher({str(path)!r})
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
    acknowledged = 0
    for _ in range(20):
        acknowledged = int(process.stdout.readline())
    process.kill()
    rest = process.stdout.read().split()
    process.wait()
    process.stdout.close()
    acknowledged = int(rest[-1]) if rest else acknowledged
    file = LineFile(path)
    file.open()
    file.close()
    numbers = numbers_in(path)
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= acknowledged


async def test_the_console_shows_a_line_an_event(capsys):
    """On standard output as it is then, or on any stream."""
    async with ConsolePublisher() as publisher:
        publisher.emit({"n": 1})
        publisher.emit(b"\xff")
    assert capsys.readouterr().out == '{"n":1}\n\\xff\n'
    stream = io.StringIO()
    async with ConsolePublisher(stream) as publisher:
        publisher.emit({"n": 2})
    assert stream.getvalue() == '{"n":2}\n'


async def test_fan_out_gives_every_child_every_event():
    """Each in its own ring, in order; one close ends all."""
    children = [MemoryPublisher(batch=7), MemoryPublisher(linger=0)]
    publisher = FanoutPublisher(children)
    for number in range(100):
        publisher.emit({"n": number})
    report = await publisher.close()
    assert report["status"] == "flushed"
    assert report["delivered"] == 200
    for child in children:
        assert [msgspec.json.decode(event)["n"] for event in child.events] == list(range(100))
        assert child.stats()["state"] == "closed"


async def test_a_child_that_hangs_or_fails_holds_no_other_up():
    """A ring a child; the report tells."""
    gate = asyncio.Event()

    async def hang(batch, batch_id):
        await gate.wait()

    stuck = ScriptedPublisher([hang] * 100, name="stuck", max_events=10)
    well = MemoryPublisher()
    publisher = FanoutPublisher([stuck, well])
    for number in range(100):
        publisher.emit({"n": number})
    await until(lambda: len(well.events) == 100)
    assert publisher.child_stats()[0]["refused"] == {"full": 90}
    report = await publisher.close(0.3)
    assert report["status"] == "deadline"
    assert report["dropped"] == 10
    for child in (stuck, well):
        assert_books_close(child.stats())


async def test_a_child_that_blocks_is_waited_for():
    """overflow="block" reaches through."""
    child = MemoryPublisher(max_events=3, overflow="block")
    publisher = FanoutPublisher([child])
    for number in range(100):
        publisher.emit({"n": number})
    await publisher.close()
    assert len(child.events) == 100


async def test_fan_out_takes_publishers_of_bytes_only():
    """Named at once."""
    with pytest.raises(InvalidOptionError, match="child"):
        FanoutPublisher([object()])
    workers = WorkerPublisher(OneByOne())
    with pytest.raises(InvalidOptionError, match="child"):
        FanoutPublisher([workers])


class OneByOne:
    """A publisher of agentflow's kind."""

    def __init__(self, bad=()):
        self.events = []
        self.bad = bad
        self.running = self.most = 0

    async def publish(self, event):
        """Take one event."""
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        if event in self.bad:
            raise RuntimeError(f"cannot take {event}")
        self.events.append(event)


async def test_a_publisher_of_single_events_has_a_few_workers():
    """Not a task an event; it gets the objects themselves."""
    behind = OneByOne()
    publisher = WorkerPublisher(behind)
    for number in range(1000):
        publisher.emit((number,))
    report = await publisher.close()
    assert report["delivered"] == 1000
    assert sorted(behind.events) == [(number,) for number in range(1000)]
    assert behind.most == 8


async def test_one_worker_keeps_the_order():
    """workers=1."""
    behind = OneByOne()
    publisher = WorkerPublisher(behind, workers=1)
    for number in range(100):
        publisher.emit(number)
    await publisher.close()
    assert behind.events == list(range(100))


async def test_what_its_publish_refuses_is_dropped_alone_and_not_tried_again(tmp_path):
    """Counted, and among the dead letters."""
    behind = OneByOne(bad={7})
    publisher = WorkerPublisher(behind, dead_letters=tmp_path / "dead")
    for number in range(20):
        publisher.emit(number)
    await publisher.close()
    assert publisher.stats()["dropped"] == {"rejected": 1}
    assert sorted(behind.events) == [number for number in range(20) if number != 7]
    letter = msgspec.json.decode((tmp_path / "dead").read_bytes())
    assert letter["object"] == "7"
    assert "cannot take 7" in letter["error"]


async def test_a_publisher_gets_its_workers_once():
    """The same queue at every call."""
    behind = OneByOne()
    assert worker_publisher_of(behind) is worker_publisher_of(behind)
    with pytest.raises(InvalidOptionError, match="publish"):
        WorkerPublisher(object())
    with pytest.raises(InvalidOptionError, match="workers"):
        WorkerPublisher(behind, workers=0)
