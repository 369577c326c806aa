"""The socket of a watched process, and the commands that ask it, on a real process."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from bgtasks import InvalidOptionError, WatchError
from bgtasks.watch import _listener, listen, stop
from bgtasks.watch._folder import folder, sockets

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs Unix sockets")

PROGRAM = """
import asyncio, os, sys, time
import bgtasks

async def load_rows(count):
    bgtasks.progress(1, 2, "rows")
    await asyncio.sleep(60)

async def main(manager):
    for number in range(3):
        manager.create_task(load_rows(number), name="load", timeout=100, context={"password": "secret"})
    manager.create_task(asyncio.sleep(60), name="evil\\x1b[31m<script>")
    await asyncio.sleep(0)
    FORK
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    BLOCK
    print(manager.stats()["names"]["load"]["cancelled"], flush=True)
    manager.cancel("load")
    await manager.cancel_all()

bgtasks.run(main)
"""


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """Give a folder for sockets."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("BGTASKS_WATCH", raising=False)
    yield tmp_path
    stop()


@pytest.fixture
def start(runtime):
    """Give a function that starts a watched program."""
    started = []

    def start(program=PROGRAM, watch="1", **parts):
        for key in ("FORK", "BLOCK"):
            program = program.replace(key, parts.get(key, "pass"))
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "BGTASKS_WATCH": watch},
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def command(*arguments, given=""):
    """Run the command, and return its status, its output and its errors."""
    done = subprocess.run(
        [sys.executable, "-m", "bgtasks", *map(str, arguments)], input=given, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def ask_json(*arguments):
    """Run the command with --json, and return the object."""
    status, out, err = command(*arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def test_ps_shows_the_tasks_of_all_processes(start):
    """Rows of two processes, with ids of their own; filters, order and limit are those of the process."""
    pids = [start().pid, start().pid]
    shown = ask_json("ps")
    assert shown["version"] == 1
    assert [each["pid"] for each in shown["processes"]] == sorted(pids)
    tasks = shown["processes"][0]["tasks"]
    assert [task["name"] for task in tasks].count("load") == 3
    (first, *_) = [task for task in tasks if task["name"] == "load"]
    assert first["id"].startswith(f"{min(pids)}.")
    assert first["coroutine"] == "load_rows"
    assert first["progress"] == {"done": 1, "total": 2, "text": "rows"}
    assert first["context_keys"] == ["password"]
    assert "secret" not in json.dumps(shown)
    filters = ("--name", "load", "--state", "running", "--sort", "time_left", "--limit", 2)
    only = ask_json("ps", "--pid", pids[0], *filters)
    (process,) = only["processes"]
    assert (len(process["tasks"]), process["matching"], process["total"]) == (2, 3, 4)
    assert ask_json("ps", "--older-than", "1000")["processes"][0]["tasks"] == []


def test_the_table_shows_no_control_characters(start):
    """A name cannot write into the terminal."""
    start()
    status, out, _ = command("ps", "--sort", "name")
    assert status == 0
    assert out.splitlines()[0].split() == ["ID", "STATE", "AGE", "LEFT", "NAME", "COROUTINE", "PROGRESS"]
    assert "\x1b" not in out
    assert "evil\\x1b[31m<script>" in out
    assert "1/2 rows" in out


def test_names_and_stack(start):
    """The by-name table, and where a task stands."""
    pid = start().pid
    status, out, _ = command("names", "--pid", pid)
    assert status == 0
    assert [line.split()[1:4] for line in out.splitlines() if " load " in line] == [["load", "3", "3"]]
    (manager,) = ask_json("names")["processes"][0]["managers"]
    assert manager["running"] == 4
    assert [loop["thread"] for loop in manager["loops"]] == ["MainThread"]
    task = ask_json("ps", "--name", "load")["processes"][0]["tasks"][0]["id"]
    status, out, _ = command("stack", task)
    lines = out.splitlines()
    assert status == 0
    assert lines[1].endswith("in load_rows")
    assert lines[2].endswith("in sleep")
    assert "waits for" in lines[-1]


def test_cancel_says_how_many_and_asks_first(start):
    """Without a terminal and without --yes nothing is cancelled; the tasks that match are, and no others."""
    process = start()
    status, _, err = command("cancel", "--name", "load")
    assert (status, "3 tasks in 1 process match" in err, "pass --yes" in err) == (1, True, True)
    assert ask_json("ps", "--name", "load")["processes"][0]["matching"] == 3
    task = ask_json("ps", "--name", "load")["processes"][0]["tasks"][0]["id"]
    status, out, _ = command("cancel", task, "--yes")
    assert (status, out) == (0, "1 task was asked to end\n")
    status, _, err = command("cancel", "--name", "nothing", "--yes")
    assert (status, err) == (1, "0 tasks in 0 processes match\n")
    out, _ = process.communicate("\n")
    assert out == "1\n"


def test_it_answers_while_the_loop_is_blocked(start):
    """The thread of the socket does not need the loop."""
    process = start(BLOCK="print('blocks', flush=True); time.sleep(20)")
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "blocks\n"
    begun = time.monotonic()
    assert ask_json("ps")["processes"][0]["total"] == 4
    assert time.monotonic() - begun < 15
    (manager,) = ask_json("names")["processes"][0]["managers"]
    assert manager["loops"][0]["last_block"]["seconds"] is None


def test_a_fork_listens_on_its_own(start):
    """Parent and child have a socket each."""
    process = start(FORK="pid = os.fork(); pid or time.sleep(60)")
    deadline = time.monotonic() + 20
    while len(found := sockets()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.pid in found
    (child,) = found.keys() - {process.pid}
    try:
        assert {each["pid"] for each in ask_json("names")["processes"]} == {process.pid, child}
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_socket_of_a_killed_process_is_removed(start, runtime):
    """It is not shown, and its file is gone."""
    process = start()
    process.kill()
    process.wait()
    assert (runtime / "bgtasks" / f"{process.pid}.sock").exists()
    status, _, err = command("ps")
    assert (status, "no process of yours is watched" in err) == (1, True)
    assert list((runtime / "bgtasks").iterdir()) == []


def test_the_socket_is_removed_although_another_process_has_the_number(start, runtime):
    """A viewer that is refused removes it, and says so once."""
    start()
    left = runtime / "bgtasks" / f"{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(left))
    status, out, err = command("ps", "--json")
    assert (status, err) == (1, f"bgtasks: process {os.getpid()} is not watched any more\n")
    assert len(json.loads(out)["processes"]) == 1
    assert not left.exists()
    assert command("ps")[0] == 0


def test_a_process_that_ends_leaves_no_socket(start, runtime):
    """The socket is removed at exit."""
    process = start()
    process.communicate("\n")
    assert process.returncode == 0
    assert list((runtime / "bgtasks").iterdir()) == []


def test_only_the_user_may_enter(runtime):
    """Folder 0700, socket 0600."""
    listen()
    (path,) = sockets().values()
    assert stat.S_IMODE(folder().stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_another_uid_gets_no_answer(runtime, monkeypatch):
    """The uid of the peer is read from the socket."""
    listen()
    (path,) = sockets().values()
    monkeypatch.setattr(_listener.os, "getuid", lambda: os.geteuid() + 1)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        try:
            connection.sendall(b'{"version": 1, "do": "tasks"}\n')
            answer = connection.recv(100)
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
    monkeypatch.undo()
    assert answer == b""
    stop()


@pytest.mark.parametrize("kind", ["open", "link", "file"])
def test_an_unsafe_folder_is_refused(runtime, kind):
    """A folder that others may enter, a link or a file is an error that says what to do."""
    path = runtime / "bgtasks"
    if kind == "open":
        path.mkdir()
        path.chmod(0o755)
    elif kind == "link":
        (runtime / "other").mkdir(mode=0o700)
        path.symlink_to(runtime / "other")
    else:
        path.write_text("")
    with pytest.raises(WatchError, match="XDG_RUNTIME_DIR"):
        listen()


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (b"nonsense\n", "Expecting value"),
        (b"[]\n", "a request is a JSON object"),
        (b'{"version": 2, "do": "tasks"}\n', "speaks version 1"),
        (b'{"version": 1, "do": "format"}\n', "unknown request 'format'; there are: tasks"),
        (b'{"version": 1, "do": "tasks", "limit": 1000000}\n', "from 1 to 10000"),
        (b'{"version": 1, "do": "tasks", "sort": "size"}\n', "unknown order 'size'; there are: age"),
        (b'{"version": 1, "do": "stack", "id": "1.1.1"}\n', "has ended, or there was none"),
    ],
)
def test_requests_that_are_not_understood_are_refused(start, request_, text):
    """The answer says why."""
    start()
    (path,) = sockets().values()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(request_)
        answer = json.loads(connection.makefile().readline())
    assert text in answer["error"]


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["ps", "--pid", "1"], 1, "process 1 is not watched: start it with BGTASKS_WATCH=1"),
        (["stack", "12"], 1, "ids of the form PID.MANAGER.TASK"),
        (["cancel"], 2, "required"),
        (["fly"], 2, "invalid choice: 'fly'"),
    ],
)
def test_wrong_arguments_are_named(runtime, arguments, status, text):
    """Status 2 for wrong arguments, 1 for what cannot be done."""
    got, _, err = command(*arguments)
    assert (got, text in err) == (status, True), err


def test_without_watch_there_is_no_socket_and_no_thread(start, runtime):
    """Nothing of the package is even imported."""
    process = start(
        """
        import asyncio, sys, threading
        import bgtasks
        async def main(manager):
            await manager.create_task(asyncio.sleep(0))
            print("ready")
            print([name for name in sys.modules if name.startswith("bgtasks.watch")], threading.active_count())
        bgtasks.run(main)
        """,
        watch="0",
    )
    assert process.stdout.read() == "[] 1\n"
    assert not Path(runtime, "bgtasks").exists()


def test_the_variable_has_two_values(make_manager, monkeypatch):
    """Anything but 0 and 1 is an error."""
    monkeypatch.setenv("BGTASKS_WATCH", "yes")
    with pytest.raises(InvalidOptionError, match="BGTASKS_WATCH must be 0 or 1; got 'yes'"):
        make_manager()
    monkeypatch.setenv("BGTASKS_WATCH", "0")
    with pytest.raises(InvalidOptionError, match="watch must be True or False, or None; got 'yes'"):
        make_manager(watch="yes")


async def test_entering_a_watched_manager_watches_its_loop(make_manager, runtime):
    """watch=True is the socket and the heartbeat; the thread ends with stop()."""
    async with make_manager(watch=True) as manager:
        assert len(manager.loop_stats()) == 1
        assert "bgtasks-watch" in [thread.name for thread in threading.enumerate()]
    stop()
    assert "bgtasks-watch" not in [thread.name for thread in threading.enumerate()]
