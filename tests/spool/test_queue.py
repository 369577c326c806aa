"""The queue on the disk: order, quota, age, damage, and files that other processes hold or left behind."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from bgtasks.errors import BgtasksError, InvalidOptionError
from bgtasks.events.spool import Spool, SpoolError, SpoolFullError, SpoolLockedError, _clock, _file, _spool

EVENT = b"x" * 226
BATCH = [EVENT] * 500
MEBIBYTE = 1 << 20


@pytest.fixture
def stem(tmp_path):
    """Give the stem of a spool in a directory of its own."""
    return tmp_path / "events"


@pytest.fixture
def make_spool(stem):
    """Give a function that opens a spool there; all are closed at the end."""
    made = []

    def make(**options):
        spool = Spool(stem, **options)
        made.append(spool)
        return spool

    yield make
    for spool in made:
        spool.close()


def files_of(stem, ending="spool"):
    """Return the files of a stem."""
    return sorted(stem.parent.glob(f"{stem.name}.*.{ending}"))


def numbered(first, count):
    """Return batches of two events with their numbers."""
    return [(f"p-{number}", [b"%d" % number, b"event %d" % number]) for number in range(first, first + count)]


def fill(spool, batches):
    """Append batches."""
    for batch_id, batch in batches:
        spool.append(batch, batch_id)


def drain(spool, count=3):
    """Remove all batches and return them."""
    removed = []
    while batches := spool.oldest(count):
        removed += batches
        for batch_id, _ in batches:
            spool.done(batch_id)
    return removed


def size_of(spool):
    """Return the number of events that a spool holds, and their bytes."""
    stats = spool.stats()
    return stats["events"], stats["bytes"]


def run_child(program, *arguments, check=True):
    """Run a program in its own process and return its output."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", textwrap.dedent(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stderr
        assert not done.stderr
    return done.stdout


# -- the queue --------------------------------------------------------------------------------------------------------


def test_batches_are_returned_in_the_order_in_which_they_were_appended(make_spool):
    """The batch that was appended first is the oldest; each is whole and has its id."""
    spool = make_spool()
    batches = numbered(0, 10)
    fill(spool, batches)
    assert spool.oldest(4) == batches[:4]
    assert drain(spool) == batches
    assert spool.oldest(4) == []


@pytest.mark.parametrize("batch", [[b""], [b"", b"a", b""], [b"\n\0\xff" * 50_000], [b"e"] * 10_000])
def test_a_batch_comes_back_byte_for_byte(make_spool, batch):
    """Empty events, large events and many events are kept as they are."""
    spool = make_spool()
    spool.append(batch, "id")
    assert spool.oldest(1) == [("id", batch)]


def test_oldest_returns_the_same_until_it_is_done(make_spool):
    """``oldest`` removes nothing; ``done`` removes the batch it names, in any order."""
    spool = make_spool()
    batches = numbered(0, 4)
    fill(spool, batches)
    assert spool.oldest(2) == spool.oldest(2) == batches[:2]
    spool.done("p-1")
    assert spool.oldest(2) == [batches[0], batches[2]]
    spool.done("p-0")
    assert spool.oldest(9) == batches[2:]


def test_a_batch_that_was_not_read_yet_can_be_done(make_spool):
    """A batch that was sent from memory while it waited on the disk is deleted by its id."""
    spool = make_spool()
    batches = numbered(0, 3)
    fill(spool, batches)
    spool.done("p-0")
    assert spool.oldest(9) == batches[1:]


def test_done_ignores_an_unknown_id(make_spool):
    """A second ``done``, or one for an id that never existed, changes nothing."""
    spool = make_spool()
    fill(spool, numbered(0, 1))
    spool.done("unknown")
    assert size_of(spool) == (2, 8)
    drain(spool)
    spool.done("p-0")
    assert size_of(spool) == (0, 0)


def test_stats_count_events_and_their_bytes(make_spool):
    """The overhead of the file is not counted."""
    spool = make_spool()
    assert size_of(spool) == (0, 0)
    spool.append(BATCH, "a")
    spool.append([b"12345"], "b")
    assert size_of(spool) == (501, 500 * 226 + 5)
    spool.oldest(1)
    spool.done("a")
    assert size_of(spool) == (1, 5)
    assert repr(spool) == f"<Spool {spool._folder.stem}, 1 events>"


def test_any_thread_may_use_a_spool(make_spool):
    """A spool is not bound to the thread that opened it."""
    spool = make_spool()
    fill(spool, numbered(0, 1))
    thread = threading.Thread(target=fill, args=(spool, numbered(1, 1)))
    thread.start()
    thread.join()
    assert drain(spool) == numbered(0, 2)


# -- restart ----------------------------------------------------------------------------------------------------------


def test_batches_and_ids_survive_a_restart(make_spool, stem):
    """A spool that was closed with batches in it continues with them; new batches follow them, in another file."""
    first = make_spool()
    fill(first, numbered(0, 5))
    first.oldest(2)
    first.done("p-0")
    first.close()
    (path,) = files_of(stem)
    assert size_of(first) == (8, 32)
    second = make_spool()
    second.open()
    assert second.stats()["recovered"] == 8
    fill(second, numbered(5, 2))
    assert files_of(stem)[0] == path
    assert len(files_of(stem)) == 2
    assert drain(second) == numbered(1, 6)
    assert path not in files_of(stem)


def test_several_files_survive_a_restart_in_order(make_spool, stem):
    """A spool that wrote several files leaves all of them, and the next one sends them in their order."""
    batches = [(f"p-{number}", [b"%d" % number, *BATCH]) for number in range(7)]
    for restart in range(3):
        spool = make_spool(max_bytes=MEBIBYTE, overflow="raise")
        if not restart:
            fill(spool, batches)
        assert len(files_of(stem)) >= 6
        assert spool.oldest(2) == batches[:2]
        spool.close()
    assert drain(make_spool()) == batches


def test_an_empty_spool_leaves_nothing_behind(make_spool, stem):
    """A spool that is empty when it is closed deletes its file and the log."""
    spool = make_spool()
    fill(spool, numbered(0, 5))
    drain(spool)
    spool.close()
    spool.close()
    assert os.listdir(stem.parent) == []


def test_a_spool_that_was_never_used_makes_no_file(make_spool, stem):
    """The first use makes the file."""
    make_spool().close()
    assert os.listdir(stem.parent) == []


def test_the_name_of_the_file_has_the_pid(make_spool, stem):
    """A person who lists the directory sees which process a file belongs to."""
    make_spool().open()
    (path,) = files_of(stem)
    assert path.name.startswith(f"events.{os.getpid()}-")


# -- other processes --------------------------------------------------------------------------------------------------

OWNER = """
    import os, sys
    from bgtasks.events.spool import Spool
    spool = Spool(sys.argv[1])
    for number in map(int, sys.argv[2:]):
        spool.append([b"%d" % number, b"event %d" % number], f"p-{number}")
    print("ready", flush=True)
    sys.stdin.readline()
    os._exit(0)
"""


@pytest.fixture
def start_owner(stem):
    """Give a function that starts a process with batches in a spool of the stem; it dies without closing the spool."""
    started = []

    def start(*numbers):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(OWNER), str(stem), *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_file_of_a_living_process_is_left_alone(make_spool, start_owner, stem):
    """A locked file belongs to another process; this process makes its own."""
    owner = start_owner(0, 1)
    spool = make_spool()
    fill(spool, numbered(7, 1))
    assert len(files_of(stem)) == 2
    assert drain(spool) == numbered(7, 1)
    spool.close()
    owner.communicate(b"\n")
    assert drain(make_spool()) == numbered(0, 2)


def test_the_file_of_a_dead_process_is_taken_up(make_spool, start_owner, stem):
    """The next process continues an orphaned file, so no new event overtakes the old ones."""
    owner = start_owner(0, 1, 2)
    owner.communicate(b"\n")
    spool = make_spool()
    fill(spool, numbered(3, 2))
    assert spool.stats()["recovered"] == 6
    assert drain(spool) == numbered(0, 5)
    spool.close()
    assert os.listdir(stem.parent) == []


def test_a_log_without_its_file_is_deleted(make_spool, start_owner, stem):
    """A process was killed between the two deletions; the log of a file in use or set aside stays."""
    owner = start_owner(0)
    kept = [*files_of(stem, "spool-wal"), stem.with_name("events.1-a.spool-wal"), stem.with_name("other.1-a.spool-wal")]
    left = stem.with_name("events.1-b.spool-wal")
    for path in (*kept[1:], stem.with_name("events.1-a.corrupt"), left):
        path.write_bytes(b"log")
    # One that cannot be deleted harms nothing.
    stem.with_name("events.1-c.spool-wal").mkdir()
    spool = make_spool()
    fill(spool, numbered(1, 1))
    assert drain(spool) == numbered(1, 1)
    assert len(kept) == 3
    assert all(path.exists() for path in kept)
    assert not left.exists()
    owner.communicate(b"\n")


def test_all_orphans_are_taken_up(make_spool, start_owner, stem, caplog):
    """The oldest orphan comes first, then the next one; each keeps its order, and the log has a line on it."""
    caplog.set_level("INFO", "bgtasks.events")
    owners = [start_owner(0, 1), start_owner(2), start_owner(3)]
    for owner in owners:
        owner.communicate(b"\n")
    spool = make_spool()
    spool.open()
    assert spool.stats()["recovered"] == 8
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{stem} recovered 8 events in 4 batches from earlier processes: events." in line
    assert drain(spool) == numbered(0, 4)
    spool.close()
    assert os.listdir(stem.parent) == []


def test_a_single_orphan_is_named_in_the_singular(make_spool, start_owner, caplog):
    """The line in the log says "1 batch"."""
    caplog.set_level("INFO", "bgtasks.events")
    start_owner(0).communicate(b"\n")
    spool = make_spool()
    spool.open()
    assert " recovered 2 events in 1 batch from earlier processes: events." in caplog.text
    drain(spool)
    spool.close()


def test_several_processes_share_orphans_that_fill_the_quota(make_spool, start_owner, stem):
    """A process takes up what its quota holds, so that it need not drop any; the next process has the rest."""
    for number in range(2):
        run_child(
            """
            import os, sys
            from bgtasks.events.spool import Spool
            spool = Spool(sys.argv[1])
            number = sys.argv[2].encode()
            spool.append([number, b"event " + number], "p-" + sys.argv[2])
            spool.append([b"x" * (1 << 20)], "large")
            os._exit(0)
            """,
            stem,
            number,
        )
    spool = make_spool(max_bytes=MEBIBYTE)
    spool.oldest(1)
    other = run_child(
        """
        import sys
        from bgtasks.events.spool import Spool
        spool = Spool(sys.argv[1])
        for batch_id, _ in spool.oldest(9):
            print(batch_id)
            spool.done(batch_id)
        spool.close()
        """,
        stem,
    )
    assert other == "p-1\nlarge\n"
    assert drain(spool) == [*numbered(0, 1), ("large", [b"x" * MEBIBYTE])]


def test_a_death_is_noticed_when_the_spool_is_drained(make_spool, start_owner, monkeypatch):
    """A running process looks for files that were left behind since it started."""
    monkeypatch.setattr(_spool, "LOOK_INTERVAL", 0.0)
    owner = start_owner(0)
    spool = make_spool()
    fill(spool, numbered(1, 1))
    owner.communicate(b"\n")
    assert drain(spool) == [*numbered(1, 1), *numbered(0, 1)]


def test_other_files_of_the_directory_are_left_alone(make_spool, stem):
    """Only files with the name of a spool of this stem are opened."""
    others = [
        stem.with_name(name) for name in ("events.1-a.spool.bak", "events2.1-a.spool", "events.x-a.spool", "events")
    ]
    for other in others:
        other.write_text("mine")
    spool = make_spool()
    fill(spool, numbered(0, 1))
    drain(spool)
    spool.close()
    assert [other.read_text() for other in others] == ["mine"] * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")
@pytest.mark.parametrize("ending", ["sys.exit()", "os._exit(0)"])
def test_a_forked_child_has_a_spool_of_its_own(stem, ending):
    """It starts empty, with another file; however the child ends, the parent's file is not touched."""
    printed = run_child(
        f"""
        import os, sys
        from bgtasks.events.spool import Spool, _spool
        _spool.LOOK_INTERVAL = 0.0
        spool = Spool(sys.argv[1])
        for number in range(2000):
            spool.append([b"parent"] * 50, f"p-{{number}}")
        held = spool.oldest(2)
        child = os.fork()
        if not child:
            assert spool.stats()["events"] == spool.stats()["bytes"] == 0
            assert spool.oldest(2) == []
            spool.append([b"child"], "c-1")
            assert [id for id, _ in spool.oldest(9)] == ["c-1"]
            {ending}
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        spool.append([b"parent"] * 50, "p-2000")
        assert spool.oldest(2) == held
        count = 0
        while batches := spool.oldest(8):
            for batch_id, batch in batches:
                if batch_id != "c-1":
                    assert batch_id == f"p-{{count}}", (batch_id, count)
                    count += 1
                spool.done(batch_id)
        stats = spool.stats()
        print(count, stats["recovered"], stats["corrupt_files"], stats["dropped"])
        spool.close()
        """,
        stem,
    )
    assert printed == "2001 1 0 {}\n"
    assert os.listdir(stem.parent) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")
def test_a_fork_waits_for_a_commit_under_way(stem):
    """After a fork during another thread's commit the child can use SQLite, and the file is sound."""
    printed = run_child(
        """
        import os, sys, threading, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # this test forks a process with threads on purpose
        from bgtasks.events.spool import Spool
        spool = Spool(sys.argv[1])
        ended = threading.Event()
        def work():
            number = 0
            while not ended.is_set():
                spool.append([b"x" * 226] * 500, f"p-{number}")
                spool.oldest(1)
                spool.done(f"p-{number}")
                number += 1
        thread = threading.Thread(target=work)
        thread.start()
        for _ in range(20):
            child = os.fork()
            if not child:
                spool.append([b"child"], "c")
                spool.oldest(1)
                spool.done("c")
                spool.close()
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        ended.set()
        thread.join()
        stats = spool.stats()
        print(stats["events"], stats["bytes"], stats["corrupt_files"])
        spool.close()
        """,
        stem,
    )
    assert printed == "0 0 0\n"
    assert os.listdir(stem.parent) == []


# -- quota and age ----------------------------------------------------------------------------------------------------


def test_the_file_keeps_to_its_quota(make_spool, stem):
    """However much is appended, file and log stay within their limits, and every lost batch is counted."""
    spool = make_spool(max_bytes=MEBIBYTE)
    for number in range(60):
        spool.append(BATCH, f"p-{number}")
    assert sum(path.stat().st_size for path in files_of(stem)) <= MEBIBYTE
    assert sum(path.stat().st_size for path in files_of(stem, "spool-wal")) <= 16 * MEBIBYTE
    stats = spool.stats()
    assert stats["events"] + stats["dropped"]["spool_full"] == 60 * 500
    assert stats["batches"] >= 6
    assert [batch_id for batch_id, _ in drain(spool)] == [f"p-{n}" for n in range(60 - stats["batches"], 60)]


def test_a_batch_that_oldest_returned_is_not_dropped_to_make_room(make_spool):
    """A batch on its way to the sink is not dropped, so it is not counted twice."""
    spool = make_spool(max_bytes=MEBIBYTE)
    spool.append(BATCH, "held")
    assert [batch_id for batch_id, _ in spool.oldest(1)] == ["held"]
    for number in range(30):
        spool.append(BATCH, f"p-{number}")
    assert spool.oldest(2)[0] == ("held", BATCH)
    assert spool.oldest(2)[1][0] != "p-0"


def test_small_batches_make_room_for_a_large_one(make_spool):
    """As many batches are dropped as the large one needs, however small they are."""
    spool = make_spool(max_bytes=MEBIBYTE)
    for number in range(6000):
        spool.append([EVENT], f"s-{number}")
    before = spool.stats()
    spool.append(BATCH * 2, "large")
    after = spool.stats()
    assert after["events"] + after["dropped"]["spool_full"] - before["dropped"]["spool_full"] == before["events"] + 1000
    assert list(drain(spool, 100))[-1] == ("large", BATCH * 2)


def test_a_full_spool_can_raise(make_spool):
    """With overflow="raise" a batch that finds no room is an error that says so; no other batch is dropped."""
    spool = make_spool(max_bytes=MEBIBYTE, overflow="raise")
    accepted = [(f"p-{number}", BATCH) for number in range(8)]
    fill(spool, accepted)
    with pytest.raises(SpoolFullError, match=r"no room for a batch of 500 events, 113,000 bytes; .* raise max_bytes"):
        spool.append(BATCH, "too many")
    assert spool.stats()["dropped"] == {}
    spool.oldest(1)
    spool.done("p-0")
    spool.append(BATCH, "new")
    assert drain(spool) == [*accepted[1:], ("new", BATCH)]


def test_a_batch_larger_than_the_spool_is_refused(make_spool):
    """It would find no room even if all others were dropped, so none is dropped."""
    spool = make_spool(max_bytes=MEBIBYTE)
    fill(spool, numbered(0, 3))
    with pytest.raises(SpoolFullError):
        spool.append(BATCH * 12, "huge")
    assert drain(spool) == numbered(0, 3)


def test_a_drained_spool_frees_its_disk_space(make_spool, stem, monkeypatch):
    """A large spool is small again once it is empty."""
    monkeypatch.setattr(_spool, "LOOK_INTERVAL", 0.0)
    spool = make_spool()
    for number in range(100):
        spool.append(BATCH, f"p-{number}")
    assert len(files_of(stem)) == 1
    drain(spool)
    assert os.listdir(stem.parent) == []
    fill(spool, numbered(0, 1))
    assert drain(spool) == numbered(0, 1)


def test_a_batch_that_is_too_old_is_dropped_when_its_turn_comes(make_spool, monkeypatch):
    """Batches older than max_age are counted as expired; younger ones behind them are returned."""
    spool = make_spool(max_age=60.0)
    now = _clock.uptime()
    for module in (_clock, _file):
        monkeypatch.setattr(module, "uptime", lambda: now)
    fill(spool, numbered(0, 5))
    now += 30.0
    fill(spool, numbered(5, 1))
    assert len(spool.oldest(9)) == 6
    now += 30.5
    assert spool.oldest(2) == numbered(5, 1)
    assert spool.stats()["dropped"] == {"expired": 10}
    assert size_of(spool) == (2, 8)


YEAR = 365 * 86400.0


@pytest.mark.parametrize("jump", [-YEAR, YEAR])
@pytest.mark.parametrize("has_restarted", [False, True])
def test_a_clock_that_jumps_expires_nothing(make_spool, monkeypatch, jump, has_restarted):
    """While the machine runs, a batch ages by the time since its start, in the next process as well."""
    spool = make_spool(max_age=60.0)
    fill(spool, numbered(0, 1))
    now = time.time() + jump
    monkeypatch.setattr("time.time", lambda: now)
    fill(spool, numbered(1, 1))
    if has_restarted:
        spool.close()
        spool = make_spool(max_age=60.0)
    assert spool.oldest(9) == numbered(0, 2)
    started = _clock.uptime()
    for module in (_clock, _file):
        monkeypatch.setattr(module, "uptime", lambda: started + 61.0)
    assert spool.oldest(9) == []
    assert spool.stats()["dropped"] == {"expired": 4}


@pytest.mark.parametrize("jump", [-YEAR, 0.0, YEAR])
def test_a_clock_that_jumps_in_a_restart_of_the_machine_counts_within_bounds(make_spool, monkeypatch, jump):
    """The time of the restart counts half of max_age at most; before and after it, no clock that is set counts."""
    spool = make_spool(max_age=60.0)
    started = _clock.uptime()
    now = started
    for module in (_clock, _file):
        monkeypatch.setattr(module, "uptime", lambda: now)
    fill(spool, numbered(0, 1))
    now += 20.0
    fill(spool, numbered(1, 1))
    spool.close()
    # The machine has started again, 5 s ago.
    wall = time.time() + jump
    monkeypatch.setattr("time.time", lambda: wall)
    monkeypatch.setattr(_clock, "BOOT", _clock.BOOT + 1)
    now = 5.0
    downtime = 30.0 if jump > 0 else 0.0
    spool = make_spool(max_age=60.0)
    assert spool.oldest(9) == numbered(0, 2)
    now += 60.0 - downtime - 20.0 - 2.0
    assert spool.oldest(9) == numbered(0, 2)
    now += 4.0
    assert spool.oldest(9) == numbered(1, 1)
    now += 20.0
    assert spool.oldest(9) == []


def test_without_max_age_nothing_expires(make_spool, monkeypatch):
    """The default is no limit."""
    spool = make_spool()
    fill(spool, numbered(0, 1))
    monkeypatch.setattr("time.time", lambda: 1e12)
    assert spool.oldest(1) == numbered(0, 1)


# -- damage -----------------------------------------------------------------------------------------------------------


def damage(path, start=0, end=None):
    """Overwrite a part of a file."""
    with path.open("r+b") as file:
        size = path.stat().st_size
        file.seek(start)
        file.write(b"\xa5" * ((size if end is None else end) - start))


@pytest.mark.parametrize("start", [0, 100, _file.PAGE_SIZE])
def test_a_damaged_file_left_behind_is_set_aside(make_spool, stem, start):
    """Whether header, schema or pages are damaged, the file is renamed and counted, and a new one is used."""
    spool = make_spool()
    fill(spool, numbered(0, 50))
    spool.append(BATCH, "large")
    spool.close()
    (path,) = files_of(stem)
    damage(path, start)
    spool = make_spool()
    fill(spool, numbered(100, 3))
    assert drain(spool)[-3:] == numbered(100, 3)
    assert spool.stats()["corrupt_files"] == 1
    assert files_of(stem, "corrupt") == [path.with_suffix(".corrupt")]
    assert path not in files_of(stem)


def test_a_truncated_file_is_set_aside(make_spool, stem):
    """A file that ends too early is renamed, and a new one is used."""
    spool = make_spool()
    for number in range(10):
        spool.append(BATCH, f"p-{number}")
    spool.close()
    (path,) = files_of(stem)
    os.truncate(path, 3 * _file.PAGE_SIZE + 100)
    spool = make_spool()
    spool.append(BATCH, "new")
    assert drain(spool)[-1] == ("new", BATCH)
    assert spool.stats()["corrupt_files"] == 1


@pytest.mark.parametrize("kind", ["database", "text"])
def test_a_file_of_another_kind_is_set_aside_unharmed(make_spool, stem, kind):
    """A file of another program under the name of a spool is renamed, not written to."""
    path = stem.with_name("events.1-1.spool")
    if kind == "database":
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE mine (value)")
        connection.commit()
        connection.close()
    else:
        path.write_text("a letter\n" * 1000)
    spool = make_spool()
    fill(spool, numbered(0, 1))
    assert drain(spool) == numbered(0, 1)
    aside = path.with_suffix(".corrupt")
    if kind == "database":
        connection = sqlite3.connect(aside)
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("mine",)]
        connection.close()
    else:
        assert aside.read_text() == "a letter\n" * 1000


def test_damage_while_the_file_is_open_loses_only_batches_not_yet_read(make_spool, stem):
    """Batches that were read are written to the new file, the rest are counted as lost, new ones are accepted."""
    spool = make_spool()
    for number in range(200):
        spool.append(BATCH, f"p-{number}")
    held = spool.oldest(2)
    spool._files[0].write_back()
    (path,) = files_of(stem)
    damage(path, _file.PAGE_SIZE)
    # SQLite keeps pages that it has read; only a connection that has read none meets the damage at once.
    spool._files[0]._connection.execute("PRAGMA shrink_memory")
    spool.append(BATCH, "new")
    removed = drain(spool)
    assert removed[:2] == held
    assert removed[-1] == ("new", BATCH)
    stats = spool.stats()
    assert stats["corrupt_files"] == 1
    assert len(removed) * 500 + stats["dropped"]["corrupt"] == 201 * 500
    assert size_of(spool) == (0, 0)


def test_a_damaged_batch_is_dropped_alone(make_spool, stem):
    """The checksum finds damage that SQLite does not see; the batches around it are returned."""
    spool = make_spool()
    fill(spool, numbered(0, 3))
    spool.close()
    (path,) = files_of(stem)
    connection = sqlite3.connect(path)
    connection.execute(
        "UPDATE batches SET body = CAST(replace(body, 'event 1', 'event 9') AS BLOB) WHERE batch_id = 'p-1'"
    )
    connection.commit()
    connection.close()
    spool = make_spool()
    assert drain(spool) == [*numbered(0, 1), *numbered(2, 1)]
    assert spool.stats()["dropped"] == {"corrupt": 2}
    assert spool.stats()["corrupt_files"] == 0


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"max_bytes": MEBIBYTE - 1},
        {"max_bytes": 1e9},
        {"max_bytes": True},
        {"overflow": "drop_newest"},
        {"sync": "off"},
        {"max_age": 0},
        {"max_age": "1"},
        {"max_age": float("nan")},
    ],
    ids=str,
)
def test_an_option_outside_its_values_is_refused(stem, options):
    """The error names the option, its valid values and the value given."""
    (name,) = options
    with pytest.raises(InvalidOptionError, match=rf"^{name} must be .* got "):
        Spool(stem, **options)


def test_a_directory_is_refused_as_a_stem(tmp_path):
    """The error shows what a path looks like."""
    with pytest.raises(InvalidOptionError, match=r"is a directory; .*/events"):
        Spool(tmp_path)


@pytest.mark.parametrize("method", ["open", "append", "oldest"])
def test_a_path_that_cannot_be_written_is_an_error_that_says_so(tmp_path, method):
    """The missing directory is named; the same call works once it exists."""
    arguments = {"open": (), "append": ([b"event"], "id"), "oldest": (1,)}[method]
    directory = tmp_path / "later"
    spool = Spool(directory / "events")
    with pytest.raises(SpoolError, match=r"spool .*later/events cannot be \w+: .* must exist") as caught:
        getattr(spool, method)(*arguments)
    assert isinstance(caught.value, BgtasksError)
    spool.done("id")
    assert not any(tmp_path.iterdir())
    directory.mkdir()
    getattr(spool, method)(*arguments)
    spool.close()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="takes root to become another user")
def test_a_directory_without_permission_is_an_error_that_says_so(tmp_path):
    """``open`` raises in a process that may not write to the directory."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == 0 and parent != parent.parent and parent.name != "tmp":
            parent.chmod(0o755)
    printed = run_child(
        """
        import os, sys
        import urllib.parse  # pathlib imports it late, when this user may no longer read it
        from bgtasks.events.spool import Spool, SpoolError
        os.setuid(65534)
        try:
            Spool(sys.argv[1]).open()
        except SpoolError as error:
            print(error)
        """,
        tmp_path / "events",
    )
    assert "cannot be opened: [Errno 13] Permission denied" in printed


def test_two_publishers_of_a_process_cannot_share_a_stem(make_spool):
    """The error tells the second to use another path; the stem is free once the first is closed."""
    first, second = make_spool(), make_spool()
    first.open()
    with pytest.raises(SpoolLockedError, match=r"another publisher of this process.* its own path"):
        second.append([b"event"], "id")
    first.close()
    second.append([b"event"], "id")
    with pytest.raises(SpoolLockedError):
        first.oldest(1)


def test_no_other_program_can_open_the_file(make_spool, stem):
    """The file is locked for any SQLite program, between two commits as well."""
    spool = make_spool()
    fill(spool, numbered(0, 1))
    (path,) = files_of(stem)
    printed = run_child(
        """
        import sqlite3, sys
        connection = sqlite3.connect(sys.argv[1], timeout=0)
        try:
            connection.execute("SELECT * FROM batches")
        except sqlite3.OperationalError as error:
            print(error)
        connection.close()
        """,
        path,
    )
    assert printed == "database is locked\n"


@pytest.mark.parametrize("sync", ["interval", "normal", "full"])
def test_sync_sets_what_a_commit_waits_for(make_spool, sync):
    """The option is passed on to SQLite."""
    spool = make_spool(sync=sync)
    spool.open()
    (level,) = spool._files[0]._connection.execute("PRAGMA synchronous").fetchone()
    assert level == {"interval": 1, "normal": 1, "full": 2}[sync]
