"""Applications in real servers that are stopped by SIGTERM while a thousand tasks run; and missing frameworks."""

import signal
import subprocess
import sys
import urllib.request

import pytest
from child import child, environment
from loops import LOOPS
from requirements import need

signals = pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself or others these signals")

COMMON = """
import contextlib, socket
resource = {"open": False, "missed": 0}
gate = asyncio.Event()

async def work():
    await gate.wait()
    await asyncio.sleep(0)
    resource["missed"] += not resource["open"]

async def open_gate():
    await told()
    gate.set()

def start_work(manager):
    for _ in range(1000):
        manager.create_task(work(), name="work")
    manager.create_task(open_gate(), name="open_gate")
    say("started")

def opened():
    resource["open"] = True

def closed(manager):
    resource["open"] = False
    stats = manager.stats()["names"]["work"]
    say("closed:", stats["completed"], "completed", stats["cancelled"], "cancelled", resource["missed"], "missed")

@contextlib.asynccontextmanager
async def inner(app):
    opened()
    yield
    closed(app.state.task_manager)

listening = socket.create_server(("127.0.0.1", 0))
"""
STARLETTE = """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from bgtasks.integrations.starlette import lifespan, task_manager

async def start(request):
    start_work(task_manager(request))
    return PlainTextResponse("started")

app = Starlette(routes=[Route("/start", start)], lifespan=lifespan(inner, OPTIONS))
"""
FASTAPI = """
from fastapi import FastAPI
from bgtasks.integrations.fastapi import TaskManagerDep, lifespan

app = FastAPI(lifespan=lifespan(inner, OPTIONS))

@app.get("/start")
async def start(tasks: TaskManagerDep):
    start_work(tasks)
"""
LITESTAR = """
from litestar import Litestar, get
from litestar.di import NamedDependency, Provide
from bgtasks.integrations.litestar import lifespan, task_manager

@get("/start")
async def start(tasks: NamedDependency[BackgroundTaskManager]) -> None:
    start_work(tasks)

app = Litestar([start], lifespan=[inner, lifespan(OPTIONS)],
               dependencies={"tasks": Provide(task_manager, sync_to_thread=False)}, logging_config=None)
"""
UVICORN = """
import uvicorn

async def main():
    say("port", listening.getsockname()[1])
    config = uvicorn.Config(app, log_config=None, ws="none", lifespan="on", timeout_graceful_shutdown=5)
    await uvicorn.Server(config).serve([listening])

with asyncio.Runner(loop_factory=loop_factory) as runner:
    runner.run(main())
"""
AIOHTTP = """
from aiohttp import web
from bgtasks.integrations.aiohttp import TASK_MANAGER, cleanup_context, task_manager

async def resources(app):
    opened()
    yield
    closed(app[TASK_MANAGER])

async def start(request):
    start_work(task_manager(request))
    return web.Response()

app = web.Application()
app.router.add_get("/start", start)
app.cleanup_ctx.extend([resources, cleanup_context(OPTIONS)])
say("port", listening.getsockname()[1])
web.run_app(app, sock=listening, print=None, loop=loop_factory())
say("Waiting for application shutdown.")
"""
SERVERS = {
    "starlette": ("uvicorn", STARLETTE + UVICORN),
    "fastapi": ("uvicorn", FASTAPI + UVICORN),
    "litestar": ("uvicorn", LITESTAR + UVICORN),
    "aiohttp": ("aiohttp", AIOHTTP),
}


def get(port, path):
    """Request a page from the server."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as response:
        return response.read().decode()


@signals
@pytest.mark.parametrize("drains", [True, False], ids=["finish", "named"])
@pytest.mark.parametrize("loop_name", list(LOOPS))
@pytest.mark.parametrize("framework", list(SERVERS))
def test_sigterm_while_a_thousand_tasks_run(tmp_path, twin, framework, loop_name, drains):
    """Tasks finish within the drain timeout with their resource open; the others are cancelled and named."""
    server, program_text = SERVERS[framework]
    need(framework)
    need(server)
    options = "drain_timeout=60.0" if drains else "drain_timeout=0.01"
    with child(tmp_path, COMMON + program_text.replace("OPTIONS", options), twin, loop_name) as program:
        port = program.wait_for("port").split()[-1]
        get(port, "/start")
        program.wait_for("started")
        program.process.send_signal(signal.SIGTERM)
        if drains:
            program.tell()
        program.wait_for("closed:")
        assert program.end() in (0, -signal.SIGTERM)
    assert "Traceback" not in program.output
    if drains:
        assert "closed: 1000 completed 0 cancelled 0 missed" in program.lines
    else:
        assert "closed: 0 completed 1000 cancelled 0 missed" in program.lines
        text = "Shutdown cancelled 1001 of 1001 background tasks: open_gate (1), work (1000)"
        assert text in program.output


@pytest.mark.parametrize("framework", ["starlette", "fastapi", "aiohttp", "litestar", "dishka"])
def test_a_missing_framework_is_named_with_its_install_command(framework, twin):
    """Importing an integration without its framework says how to install it; importing bgtasks needs none."""
    code = f"import sys; sys.modules['{framework}'] = None; import bgtasks; import bgtasks.integrations.{framework}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=environment(twin)
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("bgtasks.errors.MissingExtraError: ")
    assert last.endswith(f'pip install "bgtasks-registry[{framework}]"')
