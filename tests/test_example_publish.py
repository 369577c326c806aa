"""The example that publishes a real stream of events: its exit status, its report, and what its sink really holds."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import tokenize
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "examples" / "publish_definitions.py"
TABLE = "CREATE TABLE events (id INTEGER PRIMARY KEY, kind TEXT, name TEXT, payload TEXT, published_at REAL)"


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request):
    """Give the name of a loop that is to be had here; on CI a missing uvloop is an error."""
    if request.param == "uvloop":
        if sys.platform == "win32":
            pytest.skip("uvloop does not run on Windows")
        if "CI" not in os.environ:
            pytest.importorskip("uvloop")
    return request.param


@pytest.fixture
def sink(tmp_path):
    """Give the path of a sink that does not exist yet."""
    return tmp_path / "events.db"


def run(*arguments, given=None):
    """Run the program to its end, with ``given`` on its standard input."""
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, input=given, capture_output=True, timeout=60, check=False)


def events_in(sink):
    """Return (id, kind, name, payload) of all events of a sink, in the order of their ids."""
    with contextlib.closing(sqlite3.connect(sink)) as connection:
        rows = connection.execute("SELECT id, kind, name, payload FROM events ORDER BY id").fetchall()
    return [(number, kind, name, json.loads(payload)) for number, kind, name, payload in rows]


def prepare(sink, *statements):
    """Make a sink that holds the table of events, and run some statements on it."""
    with contextlib.closing(sqlite3.connect(sink)) as connection:
        connection.executescript(";".join((TABLE, *statements)))


def test_definitions_arrive(loop, sink):
    """Each definition is in the sink once, under the number it was given, and stands where its record says."""
    ended = run("--limit", 2000, "--sink", sink, "--loop", loop)
    report = ended.stdout.decode()
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert f"ran on     {loop}, " in report
    assert "sink: 2,000 of 2,000 events found, none lost, none twice" in report
    events = events_in(sink)
    assert [number for number, *_ in events] == list(range(1, 2001))
    assert {kind for _, kind, *_ in events} == {"function", "async_function", "class"}
    sources = {}
    for _, kind, name, record in events:
        module = Path(sysconfig.get_path("stdlib"), record["module"])
        if module not in sources:
            with tokenize.open(module) as file:
                sources[module] = file.readlines()
        keyword = "class" if kind == "class" else "def"
        assert f"{keyword} {name.rpartition('.')[2]}" in sources[module][record["line"] - 1]
        assert (record["kind"], record["name"]) == (kind, name)
        assert 1 <= record["lines"] <= len(sources[module]) - record["line"] + 1


@pytest.mark.parametrize("is_piped", [False, True], ids=["file", "stdin"])
def test_lines_arrive(loop, sink, tmp_path, is_piped):
    """Every line arrives with all its bytes, empty ones and those that are no UTF-8 included."""
    lines = [b"first", b"", b"caf\xc3\xa9 \xff\xfe \x00", b"x" * 200_000, *(b"%d" % number for number in range(30_000))]
    content = b"\r\n".join(lines)
    path = tmp_path / "lines"
    path.write_bytes(content)
    ended = run("-" if is_piped else path, "--sink", sink, "--loop", loop, given=content)
    assert ended.returncode == 0, ended.stderr
    events = events_in(sink)
    assert [number for number, *_ in events] == list(range(1, len(lines) + 1))
    assert [record["text"].encode(errors="surrogateescape") for *_, record in events] == lines


def test_more_events_than_may_be_in_flight(sink, tmp_path):
    """With a cap below the number of events the publisher waits for room, and drops none."""
    path = tmp_path / "lines"
    path.write_bytes(b"line\n" * 500)
    ended = run(path, "--in-flight", 7, "--sink", sink)
    assert ended.returncode == 0, ended.stderr
    assert len(events_in(sink)) == 500


def test_empty_file(sink, tmp_path):
    """A file without lines is published in full: nothing is lost."""
    path = tmp_path / "empty"
    path.touch()
    ended = run(path, "--sink", sink)
    assert ended.returncode == 0, ended.stderr
    assert b"sink: 0 of 0 events found, none lost, none twice" in ended.stdout
    assert events_in(sink) == []


def test_sink_that_fails(loop, sink, tmp_path):
    """The tasks of a batch that was not committed fail and are logged, and the report names the missing events."""
    prepare(
        sink,
        "CREATE TRIGGER full BEFORE INSERT ON events WHEN NEW.id = 2345 BEGIN SELECT RAISE(ABORT, 'no room left'); END",
    )
    path = tmp_path / "lines"
    path.write_bytes(b"line\n" * 4000)
    ended = run(path, "--sink", sink, "--loop", loop)
    report = ended.stdout.decode()
    assert ended.returncode == 1
    assert b"SinkError: no room left" in ended.stderr
    assert b"Traceback" not in ended.stderr
    arrived = {number for number, *_ in events_in(sink)}
    (started,) = (int(line.split()[1].replace(",", "")) for line in report.splitlines() if line.startswith("source"))
    lost = set(range(1, started + 1)) - arrived
    assert 2345 in lost
    assert f"missing    {min(lost)}-{max(lost)}\n" in report
    assert f"{len(lost):,} failed, 0 timed out" in report
    assert f"sink: {len(arrived):,} of {started:,} events found, {len(lost):,} lost, none twice" in report


def test_sink_that_is_too_slow(sink, tmp_path):
    """A task whose commit outlasts its timeout is reported, and its event told apart from one that is lost."""
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 3000000) SELECT count(*) FROM n"
    prepare(sink, f"CREATE TRIGGER slow BEFORE INSERT ON events WHEN NEW.id = 1 BEGIN SELECT ({numbers}); END")
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntwo\n")
    ended = run(path, "--sink", sink, "--timeout", 0.01)
    assert ended.returncode == 1
    assert b"'publish_line' timed out after 0.01 seconds" in ended.stderr
    assert b"unheard    2 events arrived" in ended.stdout
    assert len(events_in(sink)) == 2


def _directory(tmp_path):
    return [tmp_path], "Is a directory"


def _missing_file(tmp_path):
    return [tmp_path / "nowhere"], "No such file"


def _sink_without_directory(tmp_path):
    return ["-", "--sink", tmp_path / "nowhere" / "events.db"], "unable to open database file"


def _sink_of_another_kind(tmp_path):
    (tmp_path / "text").write_text("This is no database, and it is long enough to be told from an empty one." * 20)
    return ["-", "--sink", tmp_path / "text"], "file is not a database"


def _sink_with_events(tmp_path):
    prepare(tmp_path / "used.db", "INSERT INTO events VALUES (1, 'line', 'line 1', '{}', 0)")
    return ["-", "--sink", tmp_path / "used.db"], "it holds events already (1)"


def _sink_with_another_table(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, text TEXT)")
    return ["-", "--sink", tmp_path / "other.db"], "no such column"


@pytest.mark.parametrize(
    "make",
    [
        _missing_file,
        pytest.param(_directory, marks=pytest.mark.skipif(sys.platform == "win32", reason="another error there")),
        _sink_without_directory,
        _sink_of_another_kind,
        _sink_with_events,
        _sink_with_another_table,
    ],
)
def test_bad_arguments(tmp_path, make):
    """What cannot be read or written is refused with one line and exit status 2, before anything is published."""
    arguments, text = make(tmp_path)
    ended = run(*arguments, given=b"line\n")
    (line,) = ended.stderr.decode().splitlines()
    assert (ended.returncode, ended.stdout) == (2, b"")
    assert line.startswith("publish_definitions: ")
    assert text in line


@pytest.mark.parametrize("option", [("--limit", "0"), ("--timeout", "nan"), ("--in-flight", "-1"), ("--loop", "trio")])
def test_bad_options(option):
    """An option outside its values is refused by name, with exit status 2."""
    ended = run(*option)
    assert ended.returncode == 2
    assert f"argument {option[0]}: " in ended.stderr.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="no signal can be sent to one process there")
def test_ctrl_c(loop, sink):
    """Ctrl-C ends a program that waits for its source, after a report on what was published so far."""
    command = [sys.executable, str(PROGRAM), "-", "--sink", str(sink), "--loop", loop]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b"one\ntwo\n")
        process.stdin.flush()
        assert process.stderr.readline().startswith(b"2 published")
        process.send_signal(signal.SIGINT)
        report = process.stdout.read()
        assert process.wait(timeout=60) == 130
    assert b"stopped    Ctrl-C" in report
    assert b"sink: 2 of 2 events found, none lost, none twice" in report
    assert [record["text"] for *_, record in events_in(sink)] == ["one", "two"]
