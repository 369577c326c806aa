"""The socket of a watched process, and the commands that ask it, on a real process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
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
from bgtasks._observers import numbered_managers
from bgtasks.watch import _listener, _viewer, listen, stop
from bgtasks.watch._answers import answer
from bgtasks.watch._folder import folder, sockets
from bgtasks.watch._viewer import ask, ask_in_thread, progress_text

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


def test_ps_shows_tasks_between_two_attempts(start):
    """Their state, the number of the attempt that failed, and the time to the next one, in JSON and in the table."""
    start(
        """
        import asyncio, sys
        import bgtasks

        async def fails():
            raise ValueError

        async def main(manager):
            manager.submit(fails, name="fails", retry=bgtasks.Retry(on=ValueError, wait=600, max_wait=600, jitter=0))
            manager.create_task(asyncio.sleep(600), name="runs")
            while not manager.stats()["waiting"]:
                await asyncio.sleep(0)
            print("ready", flush=True)
            await asyncio.to_thread(sys.stdin.readline)

        bgtasks.run(main)
        """
    )
    (process,) = ask_json("ps", "--state", "waiting")["processes"]
    (task,) = process["tasks"]
    assert (task["name"], task["state"], task["attempt"]) == ("fails", "waiting", 1)
    assert 300 < task["next_attempt_seconds"] <= 600
    table = command("ps", "--sort", "state")[1].splitlines()
    assert table[0].split()[:4] == ["ID", "STATE", "ATTEMPT", "NEXT"]
    assert table[1].split()[1:3] == ["waiting", "1"]


def test_the_table_shows_no_control_characters(start):
    """A name cannot write into the terminal."""
    start()
    status, out, _ = command("ps", "--sort", "name")
    assert status == 0
    assert out.splitlines()[0].split() == [
        "ID",
        "STATE",
        "ATTEMPT",
        "NEXT",
        "AGE",
        "LEFT",
        "NAME",
        "COROUTINE",
        "PROGRESS",
    ]
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


def asking_process(start):
    """Return a process that asks on a terminal whether to cancel tasks, and the other end of the terminal."""
    start()
    ours, its = pty.openpty()
    options = {"stdin": its, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-m", "bgtasks", "cancel", "--name", "load"], **options)
    os.close(its)
    assert process.stderr.readline() == "3 tasks in 1 process match\n"
    assert process.stdout.read(6) == "Cancel"
    return process, ours


@pytest.mark.parametrize(("key", "status"), [("ctrl-c", 130), ("ctrl-d", 1), ("no", 1), ("yes", 0)])
def test_the_question_can_be_left(start, key, status):
    """Only a yes cancels; no key has a traceback for an answer."""
    process, terminal = asking_process(start)
    with process:
        if key == "ctrl-c":
            # Python looks for signals when a system call is interrupted: one that comes just before it is too early.
            while process.poll() is None:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
        else:
            os.write(terminal, b"\x04" if key == "ctrl-d" else f"{key}\n".encode())
        out, err = process.communicate(timeout=30)
    os.close(terminal)
    assert (process.returncode, err.strip()) == (status, "")
    assert ("3 tasks were asked to end" in out) is (key == "yes")


def test_a_reader_that_wants_no_more_is_no_error(start):
    """As in ``bgtasks ps | head -1``."""
    start()
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-m", "bgtasks", "ps"], **options)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=30)) == ("", 1)
    process.stderr.close()


def test_a_stack_shows_what_the_task_waits_for(start):
    """The future, not an iterator of it; and no control characters."""
    start(
        """
        import asyncio
        import bgtasks

        class Odd:
            def __await__(self):
                return self
            def __iter__(self):
                return self
            def __next__(self):
                return None
            def __repr__(self):
                return "red \\x1b[31m"

        async def odd():
            await Odd()

        async def waits(task):
            await asyncio.wait([task])

        async def main(manager):
            manager.create_task(odd(), name="odd")
            manager.create_task(asyncio.sleep(60), name="nap")
            await asyncio.sleep(0)
            print("ready", flush=True)
            await asyncio.sleep(60)

        bgtasks.run(main)
        """
    )
    tasks = {task["name"]: task["id"] for task in ask_json("ps")["processes"][0]["tasks"]}
    assert command("stack", tasks["nap"])[1].splitlines()[-1].startswith("  waits for <Future pending")
    assert command("stack", tasks["odd"])[1].splitlines()[-1] == "  waits for red \\x1b[31m"


def test_viewers_wait_while_there_is_no_file_descriptor(start):
    """The thread of the socket outlives it, and says so once."""
    process = start(
        """
        import asyncio, logging, resource, sys
        import bgtasks

        warnings = []
        logging.getLogger("bgtasks.watch").addFilter(lambda record: warnings.append(record.getMessage()))

        async def main(manager):
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            # Not 0, with which poll() fails.
            resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
            print("ready", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            print(*warnings, flush=True)
            await asyncio.to_thread(sys.stdin.readline)

        bgtasks.run(main)
        """
    )
    (path,) = sockets().values()
    # The process had a descriptor ready for the first viewer.
    assert ask(path, "names")["pid"] == process.pid
    asked = ask_in_thread(path, "names", {})
    # Longer than a pause between two tries of the process.
    time.sleep(2 * _listener.PAUSE)
    assert not asked.done()
    process.stdin.write("\n")
    process.stdin.flush()
    (warning,) = process.stdout.readline().splitlines()
    assert warning.count("Viewers have to wait") == 1
    assert asked.result(timeout=30)["pid"] == process.pid


def test_a_descriptor_that_the_program_closed_is_let_go_of(runtime, caplog):
    """The thread ends, and closes nothing that has its number by then."""
    listen()
    listener = _listener._listener
    number = listener.socket.fileno()
    os.close(number)
    # If the thread waits already, it does so until its next viewer.
    with contextlib.suppress(WatchError):
        ask(listener.path, "names")
    listener.thread.join(20)
    assert not listener.thread.is_alive()
    assert "cannot be looked at any more" in caplog.text
    with open(os.devnull) as other:
        assert other.fileno() == number
        stop()
        assert os.fstat(number)


async def test_an_answer_that_cannot_be_sent_is_an_error(make_manager, runtime, caplog):
    """The next viewer gets an answer."""

    class Bad:
        def __repr__(self):
            raise RuntimeError("no repr")

    class Odd:
        def stats(self):
            return {"name": "odd", "bad": Bad()}

        def emit(self, event):
            """Do nothing."""

        def attached(self, manager):
            """Do nothing."""

        async def flush(self, timeout):
            """Do nothing."""

        close = flush

    async with make_manager(watch=True) as manager:
        manager.attach(Odd())
        (path,) = sockets().values()
        for _ in range(2):
            asked = ask_in_thread(path, "names", {})
            with pytest.raises(WatchError, match="the watched process failed: RuntimeError: no repr"):
                await asyncio.wrap_future(asked)
        assert (await asyncio.wrap_future(ask_in_thread(path, "tasks", {})))["total"] == 0
    assert [record.getMessage() for record in caplog.records] == ["The request of a viewer failed"] * 2
    caplog.clear()


def test_processes_are_asked_at_once(monkeypatch, runtime):
    """One that hangs does not hold up the others."""
    together = threading.Barrier(2)

    def ask(path, do, **request):
        together.wait(20)
        return {"pid": int(path.stem)}

    monkeypatch.setattr(_viewer, "ask", ask)
    monkeypatch.setattr(_viewer, "sockets", lambda: {1: Path("1.sock"), 2: Path("2.sock")})
    assert _viewer.ask_all(None, "names") == ([{"pid": 1}, {"pid": 2}], [])


def test_errors_of_processes_are_said_although_nothing_matches(start):
    """One that does not answer may have the task; it is said once."""
    start()
    left = folder() / f"{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(left))
    status, _, err = command("cancel", "--name", "nothing", "--yes")
    gone = f"bgtasks: process {os.getpid()} is not watched any more\n"
    assert (status, err) == (1, f"0 tasks in 0 processes match\n{gone}")


def test_progress_is_written_with_all_its_digits():
    """Fractions as far as they mean something."""
    texts = [
        progress_text({"done": done, "total": total, "text": text})
        for done, total, text in ((1234567, 5_000_000, "rows"), (0.1 + 0.2, None, None), (1234567.5, 2e6, ""))
    ]
    assert texts == ["1234567/5000000 rows", "0.3", "1234567.5/2000000"]


def test_a_viewer_looks_while_managers_are_made(make_manager):
    """It sees none before it is whole; numbers stay."""
    first = make_manager()
    done = threading.Event()
    errors = []

    def look():
        while not done.is_set():
            try:
                numbers = [number for number, manager in numbered_managers() if manager is first]
                answer({"version": 1, "do": "names"})
                answer({"version": 1, "do": "tasks"})
                assert len(numbers) == 1
            except Exception as error:
                errors.append(error)
                return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(1000):
            make_manager()
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert errors == []


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
        time.sleep(0.02)
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
        (["cancel", "", "--yes"], 1, "'' is not the id of a task"),
        (["ps", "--older-than", "nan"], 2, "it must be a number of seconds, 0 or more; got 'nan'"),
        (["ps", "--older-than", "soon"], 2, "it must be a number of seconds, 0 or more; got 'soon'"),
        (["web", "--port", "99999"], 1, "cannot listen on port 99999: bind(): port must be 0-65535"),
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
