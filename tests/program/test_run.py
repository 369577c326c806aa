"""run: a program with a manager, on the fastest loop, whose background tasks are shut down cleanly."""

import asyncio
import logging
import re
import signal
import sys
import threading

import pytest
from child import child
from loops import LOOPS
from requirements import need
from work import failing, value

import bgtasks
from bgtasks import InvalidOptionError, InvalidProgramError, RunningLoopError

signals = pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself or others these signals")


@pytest.fixture(params=list(LOOPS))
def loop_name(request):
    """Give the name of a loop for a child."""
    return request.param


def test_gives_main_a_manager_and_returns_its_result():
    """run() returns the result of main after the tasks that main left have ended."""
    seen = []

    async def work():
        await asyncio.sleep(0.001)
        seen.append("work")

    async def main(manager):
        seen.append(manager)
        manager.create_task(work())
        return "result"

    assert bgtasks.run(main) == "result"
    assert isinstance(seen[0], bgtasks.BackgroundTaskManager)
    assert seen[1:] == ["work"]
    assert seen[0].stats()["completed"] == 1


def test_runs_on_uvloop_where_that_is_installed():
    """The default is uvloop; loop_factory chooses another loop."""
    uvloop = need("uvloop")

    async def main(manager):
        return type(asyncio.get_running_loop()), asyncio.get_running_loop().get_debug()

    assert bgtasks.run(main, debug=True) == (uvloop.Loop, True)
    assert bgtasks.run(main, loop_factory=asyncio.SelectorEventLoop, debug=False) == (asyncio.SelectorEventLoop, False)


def test_runs_on_asyncio_where_uvloop_is_not_installed(monkeypatch):
    """Without uvloop the loop is asyncio's."""
    monkeypatch.setitem(sys.modules, "uvloop", None)

    async def main(manager):
        return type(asyncio.get_running_loop()).__module__

    assert bgtasks.run(main).startswith("asyncio.")


def test_options_are_those_of_the_manager():
    """Options are passed to the manager; the default timeouts fit into 30 seconds."""

    async def main(manager):
        return manager._drain_timeout, manager._default_shutdown_timeout, manager._max_pending_tasks

    assert bgtasks.run(main) == (20.0, 5.0, None)
    assert bgtasks.run(main, drain_timeout=1.0, max_pending_tasks=7) == (1.0, 5.0, 7)


@pytest.mark.parametrize("error", [ValueError("main"), SystemExit(3), KeyboardInterrupt()])
def test_an_exception_of_main_cancels_the_tasks_and_is_raised(error):
    """After an exception tasks are cancelled without draining."""
    cleaned = []

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append("work")

    async def main(manager):
        manager.create_task(work())
        await asyncio.sleep(0)
        raise error

    with pytest.raises(type(error)) as caught:
        bgtasks.run(main)
    assert caught.value is error
    assert cleaned == ["work"]


def test_a_failing_task_does_not_end_the_program(caplog):
    """The failure is logged; main continues."""

    async def main(manager):
        manager.create_task(failing(ValueError("task")))
        await manager.wait_for_all(return_exceptions=True)
        return "went on"

    assert bgtasks.run(main) == "went on"
    assert [record.levelname for record in caplog.records if record.name == "bgtasks"] == ["ERROR"]


async def endless(manager):
    """Never return."""
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("main", "text"),
    [
        (value(), r"run\(main\), not run\(main\(\)\)"),
        (None, "needs a coroutine function"),
        (lambda manager: 5, "returned 5"),
    ],
    ids=["coroutine", "none", "function"],
)
def test_refuses_anything_but_a_coroutine_function(main, text):
    """The error says what is needed; a coroutine that was passed is closed."""
    with pytest.raises(InvalidProgramError, match=text):
        bgtasks.run(main)


def test_refuses_options_outside_their_values():
    """The error comes before main is called."""
    with pytest.raises(InvalidOptionError):
        bgtasks.run(endless, drain_timeout=-1)


async def test_refuses_to_run_inside_a_loop():
    """A second loop in one thread is refused; the error says what to do instead."""
    with pytest.raises(RunningLoopError, match="drain_on_signals"):
        bgtasks.run(endless)


def test_off_the_main_thread_it_runs_without_signals(caplog):
    """In another thread main runs, and a warning says that signals are not handled."""
    results = []

    async def main(manager):
        await manager.create_task(value())
        return 42

    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=lambda: results.append(bgtasks.run(main)))
        thread.start()
        thread.join()
    assert results == [42]
    assert "in the main thread only" in caplog.text


PROGRAM = """
import atexit, contextlib

@contextlib.asynccontextmanager
async def pool():
    opened = {"open": True}
    try:
        yield opened
    finally:
        opened["open"] = False
        say("pool closes")

async def work(opened):
    await gate.wait()
    assert opened["open"]

async def main(manager):
    global gate
    gate = asyncio.Event()
    async with pool() as opened:
        for _ in range(1000):
            manager.create_task(work(opened), name="work")
        say("ready")
        await told()
        gate.set()
        await manager.wait_for_all()
        say("tasks ended:", manager.stats()["completed"])
        await asyncio.Event().wait()

atexit.register(say, "atexit")
try:
    bgtasks.run(main, loop_factory=loop_factory, OPTIONS)
finally:
    say("after run")
"""


@signals
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_ends_tasks_then_main_then_the_process(tmp_path, twin, loop_name, number, status):
    """A thousand tasks end while the resources of main are open; then main ends, then the process, as usual."""
    with child(tmp_path, PROGRAM.replace("OPTIONS", ""), twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(number)
        program.wait_for("1000 background tasks are left")
        program.tell()
        assert program.end() == status
    printed = [line for line in program.lines if line.startswith(("tasks ended", "pool", "after", "atexit"))]
    assert printed == ["tasks ended: 1000", "pool closes", "after run", "atexit"]
    assert ("KeyboardInterrupt" in program.output) == (number == signal.SIGINT)


@signals
def test_a_second_signal_ends_the_program_at_once(tmp_path, twin, loop_name):
    """Tasks that never end do not delay the program after a second signal."""
    with child(tmp_path, PROGRAM.replace("OPTIONS", "drain_timeout=3600.0"), twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("SIGTERM: 1")
        program.process.send_signal(signal.SIGTERM)
        assert program.end() == 143
    assert "WARNING Shutdown cancelled 1000 of 1000 background tasks: work (1000)" in program.lines
    assert program.lines[-3:] == ["pool closes", "after run", "atexit"]


@signals
def test_a_task_that_swallows_its_cancellation_does_not_delay_the_end(tmp_path, twin, loop_name):
    """The task is named in the log; neither the manager nor the loop waits for it."""
    program_text = """
    async def stubborn():
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                pass

    async def main(manager):
        manager.create_task(stubborn(), name="stubborn")
        say("ready")
        await asyncio.Event().wait()

    bgtasks.run(main, loop_factory=loop_factory, drain_timeout=0.01, default_shutdown_timeout=0.01)
    """
    with child(tmp_path, program_text.replace("\n    ", "\n"), twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGTERM)
        assert program.end() == 143
    # Once at the signal, once as what remains, and not a third time when the loop is closed.
    about = [line for line in program.lines if "stubborn" in line]
    assert len(about) == 2, about
    assert about[0].startswith("WARNING SIGTERM: 1 background task is left, with at most ")
    assert re.search(r"'stubborn' still runs at the end of shutdown, at .* \(in asyncio\.Event\.wait\)$", about[1])
    assert "Task was destroyed" not in program.output
    assert "Traceback" not in program.output


@signals
def test_main_that_starts_work_while_it_drains_ends_by_the_signal(tmp_path, twin, loop_name):
    """A new task is refused while the manager drains; that ends main, with one line in the log."""
    program_text = """
    async def main(manager):
        say("ready")
        while True:
            manager.create_task(asyncio.sleep(0.001), name="work")
            await asyncio.sleep(0.001)

    bgtasks.run(main, loop_factory=loop_factory)
    """
    with child(tmp_path, program_text.replace("\n    ", "\n"), twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGTERM)
        assert program.end() == 143
    assert "WARNING The program tried to start a background task after the signal" in program.output
    assert "Traceback" not in program.output


@signals
def test_an_error_of_main_while_it_drains_is_not_lost(tmp_path, twin, loop_name):
    """An exception of main takes precedence over the signal."""
    program_text = """
    async def main(manager):
        manager.create_task(asyncio.Event().wait(), name="work")
        say("ready")
        await told()
        raise ValueError("lost?")

    bgtasks.run(main, loop_factory=loop_factory, drain_timeout=0.2)
    """
    with child(tmp_path, program_text.replace("\n    ", "\n"), twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("SIGTERM: 1")
        program.tell()
        assert program.end() == 1
    assert "ValueError: lost?" in program.output


@signals
def test_a_handler_of_the_program_is_called_instead_of_the_default(tmp_path, twin, loop_name):
    """A handler installed before run() is called when the tasks have ended, and main is not cancelled."""
    program_text = """
    stop = asyncio.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: (say("handler"), stop.set()))

    async def work():
        await told()
        say("task ends")

    async def main(manager):
        manager.create_task(work())
        say("ready")
        await stop.wait()
        return "main ends"

    say(bgtasks.run(main, loop_factory=loop_factory))
    """
    with child(tmp_path, program_text.replace("\n    ", "\n"), twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("SIGTERM: 1")
        program.tell()
        assert program.end() == 0
    assert program.lines[-3:] == ["task ends", "handler", "main ends"]


@signals
def test_a_signal_while_the_tasks_drain_after_main_has_its_effect_after_them(tmp_path, twin, loop_name):
    """When main has returned, a signal does not cancel the draining tasks, and it is not lost."""
    program_text = """
    async def work():
        await asyncio.sleep(0)
        say("draining")
        await told()
        say("task ends")

    async def main(manager):
        manager.create_task(work())

    bgtasks.run(main, loop_factory=loop_factory)
    """
    with child(tmp_path, program_text.replace("\n    ", "\n"), twin, loop_name) as program:
        program.wait_for("draining")
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("SIGTERM: 1")
        program.tell()
        assert program.end() == 143
    assert program.lines[-1] == "task ends"
