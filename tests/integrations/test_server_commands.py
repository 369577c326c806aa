"""The servers of docs/web.md, started by the page's own commands, and stopped in the middle of background tasks."""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from paths import PACKAGE, ROOT
from requirements import need

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send others these signals")

PAGE = (ROOT / "docs" / "web.md").read_text()
(BLOCK,) = (block for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) if "app:app" in block)
COMMANDS = BLOCK.splitlines()
# This one's worker gets no signal, as the page says.
WITHOUT_A_SIGNAL = "hypercorn app:app"
APP = """
import asyncio, logging, os, sys
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from bgtasks.integrations.starlette import lifespan, task_manager

logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stdout)

async def start(request):
    manager = task_manager(request)
    manager.create_task(asyncio.sleep(0.2), name="mail")
    manager.create_task(asyncio.Event().wait(), name="export")
    manager.create_task(asyncio.Event().wait(), name="heartbeat", service=True)
    return PlainTextResponse("started")

async def hang(request):
    print("hangs", flush=True)
    await asyncio.Event().wait()

app = Starlette(
    routes=[Route("/start", start), Route("/hang", hang)],
    lifespan=lifespan(shutdown_deadline=float(os.environ["DEADLINE"])),
)
"""
# The mail may be out before the server has passed the signal on.
LEFT = re.compile(r"(?:2 background tasks are|1 background task is) left, with at most .*export \(1\)")
SUMMARY = re.compile(r"Shutdown cancelled 1 of (?:2 background tasks|1 background task): export \(1\)")


class Server:
    """A server that one of the commands started, and what it says."""

    def __init__(self, process, port):
        self.process = process
        self._port = port
        self.lines = []
        self._said = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            with self._said:
                self.lines.append(line.rstrip())
                self._said.notify_all()

    @property
    def output(self):
        """All that was said so far."""
        return "\n".join(self.lines)

    def wait_for(self, text):
        """Wait until something was said."""
        with self._said:
            assert self._said.wait_for(lambda: text in self.output, 40), self.output

    def wait_until_it_listens(self):
        """Wait until it accepts connections."""
        deadline = time.monotonic() + 40
        while True:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1):
                return
            time.sleep(0.05)

    def get(self, path):
        """Ask for a page."""
        return urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=60).read()

    def hang(self):
        """Begin a request that does not end."""

        def ask():
            with contextlib.suppress(OSError):
                self.get("/hang")

        threading.Thread(target=ask, daemon=True).start()
        self.wait_for("hangs")

    def signal(self, number):
        """Send its main process a signal."""
        self.process.send_signal(number)

    def end(self):
        """Wait for its end."""
        self.process.wait(timeout=40)
        self._reader.join(timeout=10)


@contextlib.contextmanager
def running(folder, command, deadline):
    """Run a command of the page on a free port, with all its processes in a group of their own."""
    program, *arguments = shlex.split(command)
    need(program)
    need("starlette")
    if "uvicorn_worker" in command:
        need("uvicorn_worker")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"gunicorn": ["--bind", f"127.0.0.1:{port}"], "hypercorn": ["--bind", f"127.0.0.1:{port}"]}
    (folder / "app.py").write_text(APP)
    process = subprocess.Popen(
        [sys.executable, "-m", program, *arguments, *place.get(program, ["--port", str(port)])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        start_new_session=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder), str(PACKAGE.parent)]),
            "DEADLINE": str(deadline),
        },
    )
    server = Server(process, port)
    try:
        server.wait_until_it_listens()
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        server._reader.join()
        process.stdout.close()


def test_the_page_has_commands():
    """They were found."""
    assert len(COMMANDS) >= 8
    assert WITHOUT_A_SIGNAL in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_sigterm_names_what_is_left_and_what_was_cancelled(tmp_path, command):
    """Tasks that finish in time finish, the others are named, and the server ends by itself."""
    with running(tmp_path, command, 2.0) as server:
        server.get("/start")
        server.signal(signal.SIGTERM)
        server.end()
        assert LEFT.search(server.output), server.output
        assert SUMMARY.search(server.output), server.output
        assert "heartbeat" not in server.output
        assert ("WARNING SIGTERM: " in server.output) == (command != WITHOUT_A_SIGNAL)


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if command != WITHOUT_A_SIGNAL and "--workers 2" not in command]
)
def test_the_manager_notices_the_signal_although_a_request_hangs(tmp_path, command):
    """The deadline counts from the signal: the tasks have ended by then, whatever the server waits for."""
    with running(tmp_path, command, 2.0) as server:
        server.get("/start")
        server.hang()
        server.signal(signal.SIGTERM)
        server.wait_for("WARNING SIGTERM: ")
        server.wait_for("WARNING Shutdown cancelled 1 of ")


def test_the_second_ctrl_c_cancels_the_tasks_of_a_server(tmp_path):
    """Nobody waits for the rest of the deadline."""
    with running(tmp_path, "uvicorn app:app", 600.0) as server:
        server.get("/start")
        server.signal(signal.SIGINT)
        server.wait_for("WARNING SIGINT: ")
        server.signal(signal.SIGINT)
        server.end()
        assert "WARNING SIGINT again: background tasks are cancelled" in server.output
        assert "Shutdown cancelled " in server.output


def test_one_ctrl_c_that_reaches_a_reloader_and_its_server_is_one(tmp_path):
    """The terminal signals both, and the reloader its server once more: no second signal."""
    with running(tmp_path, "uvicorn app:app --reload", 2.0) as server:
        server.get("/start")
        os.killpg(server.process.pid, signal.SIGINT)
        server.end()
        assert "again" not in server.output
        assert SUMMARY.search(server.output), server.output
