"""The page in real servers: mounted in each framework, with a viewer while SIGTERM comes; and ``bgtasks web``."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from child import child, environment
from requirements import need

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send others these signals")

TOKEN = "a token for the tests of the page"
BEARER = {"Authorization": f"Bearer {TOKEN}"}

COMMON = """
import contextlib, socket
import bgtasks.watch

async def load(manager):
    while True:
        manager.create_task(asyncio.sleep(0.01), name="quick")
        await asyncio.sleep(0.001)

async def nap():
    await asyncio.sleep(600)

def begin(manager):
    manager.create_task(load(manager), name="load")
    manager.create_task(nap(), name="nap")

OPTIONS = {"drain_timeout": 0.1}
page = bgtasks.watch.app(token="a token for the tests of the page", allow_cancel=True)

@contextlib.asynccontextmanager
async def inner(app):
    begin(app.state.task_manager)
    yield
    say("closed")

listening = socket.create_server(("127.0.0.1", 0))
"""
STARLETTE = """
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.routing import Mount
from bgtasks.integrations.starlette import lifespan

async def through(request, call_next):
    return await call_next(request)

app = Starlette(
    routes=[Mount("/tasks", page)],
    lifespan=lifespan(inner, **OPTIONS),
    middleware=[Middleware(BaseHTTPMiddleware, dispatch=through)],
)
"""
FASTAPI = """
from fastapi import FastAPI
from bgtasks.integrations.fastapi import lifespan

app = FastAPI(lifespan=lifespan(inner, **OPTIONS))
app.mount("/tasks", page)
"""
LITESTAR = """
from litestar import Litestar, asgi
from bgtasks.integrations.litestar import lifespan

@contextlib.asynccontextmanager
async def began(app):
    begin(app.state.task_manager)
    yield
    say("closed")

mounted = asgi("/tasks", is_mount=True, copy_scope=True)(page)
app = Litestar([mounted], lifespan=[lifespan(**OPTIONS), began], logging_config=None)
"""
UVICORN = """
import uvicorn

async def main():
    say("port", listening.getsockname()[1])
    # Without timeout_graceful_shutdown it would wait for open streams for ever.
    await uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", lifespan="on")).serve([listening])

with asyncio.Runner(loop_factory=loop_factory) as runner:
    runner.run(main())
"""
AIOHTTP = """
from aiohttp import web
from bgtasks.integrations.aiohttp import TASK_MANAGER, add_page, cleanup_context

async def began(app):
    begin(app[TASK_MANAGER])
    yield
    say("closed")

app = web.Application()
app.cleanup_ctx.extend([cleanup_context(**OPTIONS), began])
add_page(app, "/tasks", page)
say("port", listening.getsockname()[1])
web.run_app(app, sock=listening, print=None, loop=loop_factory())
"""
SERVERS = {
    "starlette": ("uvicorn", STARLETTE + UVICORN),
    "fastapi": ("uvicorn", FASTAPI + UVICORN),
    "litestar": ("uvicorn", LITESTAR + UVICORN),
    "aiohttp": ("aiohttp", AIOHTTP),
}


class Stream:
    """A viewer."""

    def __init__(self, port, path="/tasks/stream", headers=BEARER):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self.connection.request("GET", path, headers=headers)
        self.response = self.connection.getresponse()

    def frame(self):
        """Wait for the next frame."""
        for line in self.response:
            if line.startswith(b"data: {") and b"allow_cancel" not in line:
                return json.loads(line.removeprefix(b"data: "))
        raise AssertionError("the stream has ended")


def ask(port, method, path, *, value=None, headers=BEARER):
    """Send a request, and return the status, the headers and the text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = None if value is None else json.dumps(value)
    connection.request(method, path, body, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, response.headers, text


@pytest.mark.parametrize("framework", list(SERVERS))
def test_sigterm_is_not_held_up_by_a_viewer(tmp_path, twin, framework):
    """The page works where it is mounted; the stream ends when the server is asked to end, and then the server.

    Half of the frameworks run on the loop that the other half has with the other twin.
    """
    loop_name = ("asyncio", "uvloop")[(list(SERVERS).index(framework) + (twin == "cython")) % 2]
    server, text = SERVERS[framework]
    need(framework)
    need(server)
    with child(tmp_path, COMMON + text, twin, loop_name) as program:
        port = int(program.wait_for("port").split()[-1])
        assert ask(port, "GET", "/tasks/", headers={})[0] == 200
        assert ask(port, "GET", "/tasks/stream", headers={})[0] == 401
        assert ask(port, "GET", "/tasks/", headers={"Host": "evil.example"})[0] == 403
        status, headers, _ = ask(
            port, "POST", "/tasks/login", value={"token": TOKEN}, headers={"Sec-Fetch-Site": "same-origin"}
        )
        assert status == 200
        stream = Stream(port, headers={"Cookie": headers["set-cookie"].partition(";")[0]})
        assert {"load", "nap"} <= {row[2] for row in stream.frame()["tasks"]}
        while stream.frame()["totals"]["started"] <= 100:
            pass
        status, _, text = ask(port, "POST", "/tasks/cancel", value={"name": "nap", "confirmed": True})
        assert (status, json.loads(text)["cancelled"]) == (200, 1)
        begun = time.monotonic()
        program.process.send_signal(signal.SIGTERM)
        while stream.response.read(65536):
            pass
        assert program.end() in (0, -signal.SIGTERM)
        # Far below what any server waits for an open stream.
        assert time.monotonic() - begun < 10
        stream.connection.close()
    assert "closed" in program.lines
    assert "Traceback" not in program.output


@pytest.mark.parametrize("path", ["", "/", "tasks", "/{name}", 5])
def test_a_path_that_aiohttp_cannot_have_is_refused(path):
    """It begins with a slash, and is more than that."""
    need("aiohttp")
    from aiohttp import web

    from bgtasks import InvalidOptionError
    from bgtasks.integrations.aiohttp import add_page
    from bgtasks.watch import app

    with pytest.raises(InvalidOptionError, match="path must begin with a slash"):
        add_page(web.Application(), path, app(token=TOKEN))


# -- bgtasks web -------------------------------------------------------------------------------------------------------

WATCHED = """
import asyncio, sys
import bgtasks

async def main(manager):
    for _ in range(3):
        manager.create_task(asyncio.sleep(60), name="nap", context={"password": "secret"})
    await asyncio.sleep(0)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await manager.cancel_all()

bgtasks.run(main)
"""


@pytest.fixture
def start(tmp_path, monkeypatch, twin):
    """Give a function that starts a process, with sockets in a folder of its own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    started = []

    def start(*arguments, **variables):
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment(twin), "XDG_RUNTIME_DIR": str(tmp_path), **variables},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def open_web(start, *arguments):
    """Start ``bgtasks web``, and return the process, its port and the headers of a program with its token."""
    process = start("-m", "bgtasks", "web", *arguments)
    address, _, token = process.stdout.readline().strip().partition("/#token=")
    assert address.startswith("http://127.0.0.1:")
    assert len(token) >= 40
    return process, int(address.rpartition(":")[2]), {"Authorization": f"Bearer {token}"}


def test_web_shows_all_processes_of_the_user(start):
    """In one table; a task is cancelled in its own process; Ctrl-C ends it although somebody looks."""
    processes = [start("-c", WATCHED, BGTASKS_WATCH="1") for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    web, port, token = open_web(start, "--allow-cancel")
    for headers, status in (({}, 401), ({**token, "Host": f"evil.example:{port}"}, 403)):
        assert ask(port, "GET", "/stream", headers=headers)[0] == status
    assert "Content-Security-Policy" in {name.title() for name in ask(port, "GET", "/", headers={})[1]}
    stream = Stream(port, "/stream", token)
    frame = stream.frame()
    assert (frame["processes"], frame["total"], frame["errors"]) == (2, 6, [])
    assert "secret" not in json.dumps(frame)
    (first, *_) = (row[0] for row in frame["tasks"] if row[0].startswith(f"{processes[1].pid}."))
    assert json.loads(ask(port, "GET", f"/stack?id={first}", headers=token)[2])["name"] == "nap"
    cancelled = json.loads(ask(port, "POST", "/cancel", value={"id": first, "confirmed": True}, headers=token)[2])
    assert cancelled == {"cancelled": 1, "processes": 1, "errors": []}
    counted = json.loads(ask(port, "POST", "/cancel", value={"name": "nap"}, headers=token)[2])
    assert counted == {"matching": 5, "processes": 2, "errors": []}
    processes[0].kill()
    processes[0].wait()
    while stream.frame()["processes"] == 2:
        pass
    begun = time.monotonic()
    web.send_signal(signal.SIGINT)
    assert web.wait(timeout=30) == 0
    assert time.monotonic() - begun < 8
    assert web.stdout.read() == f"Cancelled by a viewer of the page: {{'id': '{first}'}}, tasks: 1\n"


def test_web_is_read_only_and_says_what_is_wrong(start):
    """Without --allow-cancel; a process that is not watched; a port that is taken; requests that are none."""
    _, port, token = open_web(start, "--pid", "1")
    assert Stream(port, "/stream", token).frame()["errors"] == ["process 1 is not watched"]
    assert ask(port, "POST", "/cancel", value={"name": "nap"}, headers=token)[0] == 403
    for junk in (b"\r\n\r\n", b"GET /\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"x" * 20000):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.connect()
        connection.sock.sendall(junk)
        assert connection.sock.recv(100) == b""
        connection.close()
    assert ask(port, "GET", "/", headers={})[0] == 200
    second = start("-m", "bgtasks", "web", "--port", str(port))
    assert second.wait(timeout=60) == 1
    assert f"cannot listen on port {port}" in second.stdout.read()
    assert os.listdir(os.environ["XDG_RUNTIME_DIR"]) == ["bgtasks"]
