"""The main job: its exit status, its report, and what its sink really holds."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import uuid
from pathlib import Path

import pytest
from arrivals import in_redis
from paths import EXAMPLES
from requirements import need

need("msgspec")

PROGRAM = EXAMPLES / "main_job.py"


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
    return tmp_path / "events.jsonl"


def run(*arguments, given=None):
    """Run the program to its end, with ``given`` on its standard input."""
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, input=given, capture_output=True, timeout=60, check=False)


def logged(ended):
    """Return what is on standard error of a program, but for the progress of a slow machine."""
    return [line for line in ended.stderr.splitlines() if b" in the queue" not in line]


def parsed(lines):
    """Return (number, kind, name, record) of events in their order."""
    events = map(json.loads, lines)
    return [(event["number"], event["kind"], event["name"], event["record"]) for event in events]


def events_in(sink):
    """Return (number, kind, name, record) of all events of a file in their order."""
    return parsed(sink.read_bytes().splitlines())


def test_lines_of_source_arrive(loop, sink):
    """Each line is in the sink once, under the number it was given, and stands where its record says."""
    ended = run("--limit", 25_000, "--sink", sink, "--loop", loop)
    report = ended.stdout.decode()
    assert ended.returncode == 0, ended.stderr
    assert not logged(ended)
    assert f"ran on   {loop}, " in report
    assert "tasks    25,000 with name, timeout and context: " in report
    assert "ended    24,970 completed, 25 failed, 5 timed out, 0 cancelled; " in report
    assert "sink: 25,000 of 25,000 events found, none lost, none twice, checksums equal" in report
    assert len(report.splitlines()) == 10
    check_lines_of_source(events_in(sink))


@pytest.mark.skipif(sys.platform == "win32", reason="no Redis there")
def test_lines_of_source_arrive_in_redis(redis_server):
    """With one flag they are in a stream; one that was named stays, any other is gone in the end."""
    need("redis")
    key = f"main-job:{uuid.uuid4().hex}"
    ended = run("--limit", 2000, "--redis", redis_server.url, "--key", key)
    assert ended.returncode == 0, ended.stderr
    assert not logged(ended)
    assert b"sink: 2,000 of 2,000 events found, none lost, none twice" in ended.stdout
    check_lines_of_source(parsed(in_redis(redis_server.url, key)))
    again = run("--limit", 1, "--redis", redis_server.url, "--key", key)
    assert again.returncode == 2
    assert b"it holds events already; give another --key" in again.stderr
    ended = run("--limit", 1, "--redis", redis_server.url)
    assert ended.returncode == 0, ended.stderr
    (line,) = (line for line in ended.stdout.decode().splitlines() if line.startswith("events"))
    assert "bgtasks:main-job:" in line
    assert in_redis(redis_server.url, line.split()[5]) == []


def check_lines_of_source(events):
    """Compare lines with the sources that they came from."""
    assert [number for number, *_ in events] == list(range(1, len(events) + 1))
    assert {"function", "class", "import", "comment", "statement"} < {kind for _, kind, *_ in events}
    sources = {}
    for _, kind, name, record in events:
        module = Path(sysconfig.get_path("stdlib"), record["module"])
        if module not in sources:
            sources[module] = module.read_bytes().decode(errors="surrogateescape").split("\n")
        assert record["text"] == sources[module][record["line"] - 1].strip()
        assert name == f"{record['module']}:{record['line']}"
        assert (kind == "function") == (record["text"].partition(" ")[0] == "def")


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


def test_more_events_than_the_queue_holds(sink, tmp_path):
    """With a queue shorter than the source the publisher waits for room, and drops none."""
    path = tmp_path / "lines"
    path.write_bytes(b"line\n" * 500)
    ended = run(path, "--queue", 7, "--sink", sink)
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


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on files there")
def test_sink_that_fails(loop, sink, tmp_path):
    """Events that a full sink does not take in time are given up and counted, and the report names those missing."""
    path = tmp_path / "lines"
    path.write_bytes(b"line\n" * 4000)
    command = [sys.executable, PROGRAM, path, "--sink", sink, "--loop", loop, "--retry-for", "0.2"]
    limited = f"ulimit -f 200; exec {' '.join(map(str, command))}"
    ended = subprocess.run(["bash", "-c", limited], capture_output=True, timeout=60, check=False)
    report = ended.stdout.decode()
    assert ended.returncode == 1, ended.stderr
    assert b"File too large" in ended.stderr
    assert b"Traceback" not in ended.stderr
    arrived = len(events_in(sink))
    assert [number for number, *_ in events_in(sink)] == list(range(1, arrived + 1))
    assert 0 < arrived < 4000
    assert "stopped  an event did not arrive: OSError: [Errno 27] File too large" in report
    (published,) = (int(line.split()[1].replace(",", "")) for line in report.splitlines() if line.startswith("source"))
    assert f"missing  {arrived + 1}-{published}\n" in report
    assert f"{published - arrived:,} retries_exhausted dropped" in report
    assert f"sink: {arrived:,} of {published:,} events found, {published - arrived:,} lost, none twice" in report


def _directory(tmp_path):
    return [tmp_path], "Is a directory"


def _missing_file(tmp_path):
    return [tmp_path / "nowhere"], "No such file"


def _sink_without_directory(tmp_path):
    return ["-", "--sink", tmp_path / "nowhere" / "events.jsonl"], "No such file"


def _sink_with_events(tmp_path):
    (tmp_path / "used.jsonl").write_text("{}\n")
    return ["-", "--sink", tmp_path / "used.jsonl"], "it holds something already"


def _redis_that_is_not_there(tmp_path):
    need("redis")
    return ["-", "--redis", "redis://127.0.0.1:1"], "refused"


def _url_of_another_kind(tmp_path):
    need("redis")
    return ["-", "--redis", "http://127.0.0.1"], "for example redis://localhost:6379/0"


@pytest.mark.parametrize(
    "make",
    [
        _missing_file,
        pytest.param(_directory, marks=pytest.mark.skipif(sys.platform == "win32", reason="another error there")),
        _sink_without_directory,
        _sink_with_events,
        _redis_that_is_not_there,
        _url_of_another_kind,
    ],
)
def test_bad_arguments(tmp_path, make):
    """What cannot be read or written is refused with one line and exit status 2, before anything is published."""
    arguments, text = make(tmp_path)
    ended = run(*arguments, given=b"line\n")
    (line,) = (line.decode() for line in logged(ended))
    assert (ended.returncode, ended.stdout) == (2, b"")
    assert line.startswith("main_job: ")
    assert text in line


@pytest.mark.parametrize("option", [("--limit", "0"), ("--retry-for", "nan"), ("--queue", "-1"), ("--loop", "trio")])
def test_bad_options(option):
    """An option outside its values is refused by name, with exit status 2."""
    ended = run(*option)
    assert ended.returncode == 2
    assert f"argument {option[0]}: " in ended.stderr.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="no signal can be sent to one process there")
@pytest.mark.parametrize(
    ("number", "status", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_a_signal_while_it_waits_for_its_source(loop, sink, number, status, name):
    """A signal ends a program that waits for its source, after a report on what was published so far."""
    command = [sys.executable, str(PROGRAM), "-", "--sink", str(sink), "--loop", loop]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b"one\ntwo\n")
        process.stdin.flush()
        assert b" 2 published" in process.stderr.readline()
        process.send_signal(number)
        report = process.stdout.read()
        assert process.wait(timeout=60) == status
    assert f"stopped  {name}".encode() in report
    assert b"sink: 2 of 2 events found, none lost, none twice" in report
    assert [record["text"] for *_, record in events_in(sink)] == ["one", "two"]


@pytest.mark.skipif(sys.platform == "win32", reason="no signal can be sent to one process there")
@pytest.mark.parametrize(
    ("number", "status", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_a_signal_in_the_middle(tmp_path, number, status, name):
    """A signal at full speed is followed by a report in which all adds up; no process and no temporary file is left."""
    command = [sys.executable, str(PROGRAM), "--limit", "100000000"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, start_new_session=True
    ) as process:
        assert b" published" in process.stderr.readline()
        process.send_signal(number)
        report, logged = process.communicate(timeout=60)
        assert process.returncode == status
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert b"Traceback" not in logged
    assert f"stopped  {name}".encode() in report
    assert b"none lost, none twice, checksums equal" in report
    assert b" 0 cancelled; " in report
    assert list(tmp_path.iterdir()) == []
