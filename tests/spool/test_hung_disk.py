"""A disk that hangs: forks and close do not wait for it, and nothing is counted twice when it goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from disks import image_disk
from event_tools import assert_counters_add_up, until

from bgtasks.events import Publisher, Retry, Sink
from bgtasks.events.spool import Spool

pytestmark = pytest.mark.skipif(shutil.which("fsfreeze") is None, reason="takes fsfreeze to make a disk hang")


@pytest.fixture
def disk(tmp_path):
    """Give a disk that can be frozen."""
    with image_disk(tmp_path / "image", tmp_path / "disk", 32) as directory:
        yield directory


@contextlib.contextmanager
def hanging(directory):
    """Have every write to a disk hang."""
    subprocess.run(["fsfreeze", "--freeze", str(directory)], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", str(directory)], check=True)


class Down(Sink):
    """A sink that is down while ``is_down``."""

    def __init__(self):
        self.is_down = True
        self.events = []

    async def write(self, batch, batch_id):
        """Keep a batch, once the sink is up."""
        if self.is_down:
            raise Retry(after=0.01, reason="it is down")
        self.events += batch


FORKING = """
    import os, subprocess, sys, threading, time, warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # this test forks a process with threads on purpose
    from bgtasks.events.spool import Spool
    directory, healthy = sys.argv[1:]
    spool = Spool(os.path.join(directory, "events"))
    spool.append([b"before"], "b-0")
    subprocess.run(["fsfreeze", "--freeze", directory], check=True)
    try:
        thread = threading.Thread(target=spool.append, args=([b"hangs"], "b-1"))
        thread.start()
        time.sleep(0.3)
        begun = time.monotonic()
        child = os.fork()
        if not child:
            other = Spool(os.path.join(healthy, "events"))
            other.append([b"child"], "c-0")
            other.done("c-0")
            other.close()
            os._exit(0 if spool.stats()["events"] == 0 else 1)
        waited = time.monotonic() - begun
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert thread.is_alive()
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", directory], check=True)
    thread.join()
    print([batch_id for batch_id, _ in spool.oldest(9)], round(waited, 2))
    for batch_id in ("b-0", "b-1"):
        spool.done(batch_id)
    spool.close()
    assert waited < 1.0, waited
"""


def test_a_fork_does_not_wait_for_a_hung_disk(disk, tmp_path):
    """The child has empty spools and can use a healthy disk; the commit of the parent ends when its disk goes on."""
    (tmp_path / "healthy").mkdir()
    # A process that waits for the disk after all cannot be killed.
    rescue = threading.Timer(15, subprocess.run, [["fsfreeze", "--unfreeze", str(disk)]], {"check": False})
    rescue.start()
    try:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(FORKING), str(disk), str(tmp_path / "healthy")],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        rescue.cancel()
        rescue.join()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['b-0', 'b-1'] ")
    assert [name for name in os.listdir(disk) if name != "lost+found"] == []


@pytest.mark.loops("asyncio", "uvloop")
@pytest.mark.parametrize("timeout", [0.5, 1.0, 3.0])
async def test_close_keeps_to_its_timeout_on_a_hung_disk(disk, timeout):
    """It neither waits for the disk nor counts an event twice."""
    publisher = Publisher(Down(), spool=disk / "events", linger=0.001)
    publisher.emit(b"before")
    await until(lambda: publisher.stats()["spooled"] == 1)
    with hanging(disk):
        for number in range(10):
            publisher.emit(b"%d" % number)
        await asyncio.sleep(0.2)
        begun = time.monotonic()
        report = await publisher.close(timeout)
        taken = time.monotonic() - begun
        assert_counters_add_up(publisher.stats())
    assert taken < timeout + 0.3
    assert report["status"] == "timeout"
    # The thread goes on when the disk does, and releases the file.
    await until(lambda: not publisher._store._spool._is_open)
    assert_counters_add_up(publisher.stats())
    for thread in threading.enumerate():
        if thread.name.startswith("spool of"):
            thread.join(5)


async def test_a_commit_that_outlasts_its_flusher_is_counted_once(disk):
    """A flusher that is cancelled while the disk hangs leaves a commit behind, which the next one finds."""
    sink = Down()
    publisher = Publisher(sink, spool=disk / "events", linger=0.001)
    publisher.emit(b"0")
    await until(lambda: publisher.stats()["spooled"] == 1)
    with hanging(disk):
        publisher.emit(b"1")
        await asyncio.sleep(0.2)
        task = publisher._flusher._task
        task.cancel()
        await asyncio.wait((task,))
        assert_counters_add_up(publisher.stats())
    publisher.emit(b"2")
    sink.is_down = False
    await publisher.close(30)
    assert sink.events == [b"0", b"1", b"2"]
    stats = publisher.stats()
    assert_counters_add_up(stats)
    assert (stats["accepted"], stats["delivered"]) == (3, 3)


def test_a_sync_that_hangs_does_not_stop_commits(disk, monkeypatch):
    """The interval's sync runs beside the commits."""
    entered = threading.Event()
    released = threading.Event()
    fsync = os.fsync

    def hang(descriptor):
        entered.set()
        assert released.wait(20)
        fsync(descriptor)

    spool = Spool(disk / "events")
    spool.append([b"0"], "b-0")
    monkeypatch.setattr(os, "fsync", hang)
    assert entered.wait(20)
    for number in range(1, 100):
        spool.append([b"%d" % number], f"b-{number}")
    assert len(spool.oldest(200)) == 100
    released.set()
    spool.close()
