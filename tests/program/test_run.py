"""run: a program with a manager, on the fastest loop, that ends its background tasks in good order."""

import asyncio
import logging
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
    """What main returns comes back, after the tasks that it left."""
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
    """Nobody has to ask for uvloop, and whoever wants another loop says so."""
    uvloop = need("uvloop")

    async def main(manager):
        return type(asyncio.get_running_loop()), asyncio.get_running_loop().get_debug()

    assert bgtasks.run(main, debug=True) == (uvloop.Loop, True)
    assert bgtasks.run(main, loop_factory=asyncio.SelectorEventLoop, debug=False) == (asyncio.SelectorEventLoop, False)


def test_runs_on_asyncio_where_uvloop_is_not_installed(monkeypatch):
    """A missing uvloop is no error."""
    monkeypatch.setitem(sys.modules, "uvloop", None)

    async def main(manager):
        return type(asyncio.get_running_loop()).__module__

    assert bgtasks.run(main).startswith("asyncio.")


def test_options_are_those_of_the_manager():
    """The drain time and the others can be chosen; the rest are those that fit into 30 seconds."""

    async def main(manager):
        return manager._drain_timeout, manager._default_shutdown_timeout, manager._max_pending_tasks

    assert bgtasks.run(main) == (20.0, 5.0, None)
    assert bgtasks.run(main, drain_timeout=1.0, max_pending_tasks=7) == (1.0, 5.0, 7)


@pytest.mark.parametrize("error", [ValueError("main"), SystemExit(3), KeyboardInterrupt()])
def test_an_exception_of_main_cancels_the_tasks_and_goes_on(error):
    """After an exception nothing is drained."""
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
    """A background failure is logged; main goes on."""

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
def test_refuses_what_is_no_coroutine_function(main, text):
    """The error says what is wanted, and a coroutine handed in is closed."""
    with pytest.raises(InvalidProgramError, match=text):
        bgtasks.run(main)


def test_refuses_options_outside_their_values():
    """A bad option is told before anything runs."""
    with pytest.raises(InvalidOptionError):
        bgtasks.run(endless, drain_timeout=-1)


async def test_refuses_to_run_inside_a_loop():
    """A second loop in one thread is refused, with what to do instead."""
    with pytest.raises(RunningLoopError, match="drain_on_signals"):
        bgtasks.run(endless)


def test_off_the_main_thread_it_runs_without_signals(caplog):
    """In another thread it works, and says that signals are not watched."""
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
    """A thousand tasks end while what main holds is open; then main ends, then the process, in the usual way."""
    with child(tmp_path, PROGRAM.replace("OPTIONS", ""), twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(number)
        program.wait_for("no new background tasks, 1000 have to end first")
        program.tell()
        assert program.end() == status
    said = [line for line in program.lines if line.startswith(("tasks ended", "pool", "after", "atexit"))]
    assert said == ["tasks ended: 1000", "pool closes", "after run", "atexit"]
    assert ("KeyboardInterrupt" in program.output) == (number == signal.SIGINT)


@signals
def test_a_second_signal_stops_it_now(tmp_path, twin, loop_name):
    """Tasks that wait for ever do not hold a program up that is asked twice."""
    with child(tmp_path, PROGRAM.replace("OPTIONS", "drain_timeout=3600.0"), twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("SIGTERM: no new")
        program.process.send_signal(signal.SIGTERM)
        assert program.end() == 143
    assert "WARNING Shutdown cancelled 1000 of 1000 background tasks: work (1000)" in program.lines
    assert program.lines[-3:] == ["pool closes", "after run", "atexit"]


@signals
def test_a_task_that_swallows_its_cancellation_does_not_hold_the_end_up(tmp_path, twin, loop_name):
    """The straggler is named and left; neither the manager nor the loop waits for it."""
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
    assert "1 background tasks outlast the shutdown: stubborn (1)" in program.output
    assert "Task was destroyed" not in program.output
    assert "Traceback" not in program.output


@signals
def test_main_that_starts_work_while_it_drains_ends_by_the_signal(tmp_path, twin, loop_name):
    """The refusal that a loop of new work meets is its end, said in one line of the log."""
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
    assert "WARNING The program wanted to start a background task after the signal" in program.output
    assert "Traceback" not in program.output


@signals
def test_an_error_of_main_while_it_drains_is_not_lost(tmp_path, twin, loop_name):
    """Another exception of main goes before the signal."""
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
        program.wait_for("SIGTERM: no new")
        program.tell()
        assert program.end() == 1
    assert "ValueError: lost?" in program.output


@signals
def test_a_handler_of_the_program_decides_itself(tmp_path, twin, loop_name):
    """A handler set before run() is called when the tasks have ended, and main is not cancelled."""
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
        program.wait_for("SIGTERM: no new")
        program.tell()
        assert program.end() == 0
    assert program.lines[-3:] == ["task ends", "handler", "main ends"]


@signals
def test_a_signal_during_the_last_draining_is_passed_on_after_it(tmp_path, twin, loop_name):
    """Main has returned and its tasks drain: a signal does not cut them short, and is not forgotten."""
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
        program.wait_for("SIGTERM: no new")
        program.tell()
        assert program.end() == 143
    assert program.lines[-1] == "task ends"
