"""drain_on_signals: a signal waits for the background tasks, then has its usual effect."""

import asyncio
import logging
import signal
import sys
import threading

import pytest
from child import child
from loops import LOOPS
from work import forever

from bgtasks import drain_on_signals

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself or others these signals")

# A thousand tasks that end when the test lets them, and a body that never ends.
DRAINING = """
async def work():
    await gate.wait()

async def main():
    global gate
    gate = asyncio.Event()
    async with BackgroundTaskManager(drain_timeout=20.0, default_shutdown_timeout=5.0) as manager:
        async with bgtasks.drain_on_signals(manager) as is_installed:
            assert is_installed
            for _ in range(1000):
                manager.create_task(work(), name="work")
            say("ready")
            await told()
            gate.set()
            try:
                await asyncio.Event().wait()
            finally:
                say("body ends,", manager.stats()["completed"], "completed")
"""
RUN = """
with asyncio.Runner(loop_factory=loop_factory) as runner:
    runner.run(main())
"""


@pytest.fixture(params=list(LOOPS))
def loop_name(request):
    """Give the name of a loop for a child."""
    return request.param


def test_sigterm_takes_its_default_action_when_all_tasks_have_finished(tmp_path, twin, loop_name):
    """The process dies of SIGTERM as usual, but after its thousand tasks."""
    after = DRAINING.replace("gate.set()", "gate.set(); await manager.wait_for_all(); say('all done')")
    with child(tmp_path, after + RUN, twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("SIGTERM: 1000 background tasks are left")
        program.tell()
        program.wait_for("all done")
        assert program.end() == -signal.SIGTERM
        assert "Traceback" not in program.output


def test_sigint_raises_keyboard_interrupt_when_all_tasks_have_finished(tmp_path, twin, loop_name):
    """asyncio.run handles SIGINT as usual, but later."""
    with child(tmp_path, DRAINING + RUN, twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGINT)
        program.wait_for("SIGINT: 1000 background tasks are left")
        program.tell()
        program.wait_for("body ends, 1000 completed")
        assert program.end() == -signal.SIGINT
        assert "KeyboardInterrupt" in program.output


def test_tasks_that_do_not_finish_in_time_are_cancelled_and_named(tmp_path, twin, loop_name):
    """At the end of the drain timeout the log has the number of cancelled tasks of each name."""
    program_text = DRAINING.replace("drain_timeout=20.0", "drain_timeout=0.05") + RUN
    with child(tmp_path, program_text, twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGTERM)
        assert program.end() == -signal.SIGTERM
        assert "WARNING Shutdown cancelled 1000 of 1000 background tasks: work (1000)" in program.lines


def test_a_second_signal_ends_the_draining(tmp_path, twin, loop_name):
    """The second signal cancels the tasks before the drain timeout, then the first one has its effect."""
    with child(tmp_path, DRAINING.replace("20.0", "3600.0") + RUN, twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("SIGTERM: 1")
        program.process.send_signal(signal.SIGTERM)
        assert program.end() == -signal.SIGTERM
        assert "WARNING SIGTERM again: background tasks are cancelled" in program.lines
        assert "WARNING Shutdown cancelled 1000 of 1000 background tasks: work (1000)" in program.lines


def test_a_third_signal_is_not_held_back(tmp_path, twin, loop_name):
    """With a task that swallows every cancellation, the third signal has its usual effect at once."""
    program_text = """
    async def stubborn():
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                say("swallowed")

    async def main():
        async with BackgroundTaskManager(drain_timeout=3600.0, default_shutdown_timeout=3600.0) as manager:
            async with bgtasks.drain_on_signals(manager):
                manager.create_task(stubborn(), name="stubborn")
                say("ready")
                await asyncio.Event().wait()
    """
    with child(tmp_path, program_text.replace("\n    ", "\n") + RUN, twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("SIGTERM: 1")
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("swallowed")
        program.process.send_signal(signal.SIGTERM)
        assert program.end() == -signal.SIGTERM


HANDLED = """
def on_sigterm(number, frame):
    say("handler of the program:", signal.Signals(number).name, manager)
    done.set()

async def work():
    await told()
    say("task ends")

async def main():
    global manager, done
    done = asyncio.Event()
    SET_HANDLER
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    async with BackgroundTaskManager(drain_timeout=20.0) as manager:
        async with bgtasks.drain_on_signals(manager):
            manager.create_task(work())
            say("ready")
            await done.wait()
            say("body ends")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    say("as before")
"""


def test_a_handler_of_the_program_is_called_after_the_tasks(tmp_path, twin, loop_name):
    """The handler that was installed before is called once, and the handlers are restored."""
    program_text = HANDLED.replace("SET_HANDLER", "signal.signal(signal.SIGTERM, on_sigterm)")
    with child(tmp_path, program_text + RUN, twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("SIGTERM: 1")
        program.tell()
        assert program.end() == 0
    printed = [line for line in program.lines if not line.startswith(("INFO", "WARNING SIGTERM: 1 background task is"))]
    called = "handler of the program: SIGTERM <BackgroundTaskManager closed, 0 tasks>"
    assert printed == ["ready", "task ends", called, "body ends", "as before"]


def test_a_handler_on_the_loop_runs_at_once(tmp_path, twin, loop_name):
    """A handler of loop.add_signal_handler stays: it runs at once, and the context waits for the tasks."""
    program_text = HANDLED.replace(
        "SET_HANDLER",
        "asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, on_sigterm, signal.SIGTERM, None)",
    )
    with child(tmp_path, program_text + RUN, twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("body ends")
        program.tell()
        assert program.end() == 0
    assert program.output.count("handler of the program") == 1
    assert program.output.endswith("task ends\nas before")


def test_an_exception_of_the_program_s_handler_ends_the_program(tmp_path, twin, loop_name):
    """The common handler that raises SystemExit ends the program after the tasks."""
    program_text = HANDLED.replace("SET_HANDLER", "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))")
    with child(tmp_path, program_text + RUN, twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("SIGTERM: 1")
        program.tell()
        assert program.end() == 7
        assert "task ends" in program.lines
        assert "never retrieved" not in program.output


@pytest.fixture
def handlers():
    """Give both handlers as they are; fail if they are others after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield before
    assert {number: signal.getsignal(number) for number in before} == before


async def test_without_a_signal_nothing_happens(make_manager, handlers):
    """The handlers are restored, the manager is left open."""
    manager = make_manager()
    async with drain_on_signals(manager) as is_installed:
        assert is_installed
        assert signal.getsignal(signal.SIGTERM) != handlers[signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == handlers[signal.SIGTERM]
    await manager.create_task(asyncio.sleep(0))


async def test_an_error_of_the_body_is_raised_and_the_handlers_are_restored(make_manager, handlers):
    """The context hides no exception."""
    with pytest.raises(ValueError, match="body"):
        async with drain_on_signals(make_manager()):
            raise ValueError("body")


async def test_an_ignored_signal_stays_ignored(make_manager, handlers):
    """A program that ignores SIGTERM continues to ignore it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        async with drain_on_signals(make_manager()):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, handlers[signal.SIGTERM])


async def test_a_handler_installed_in_the_block_stays_and_can_restore_its_predecessor(make_manager, handlers):
    """A library may restore our handler after the block has ended: it then forwards the signal."""
    calls = []
    signal.signal(signal.SIGTERM, lambda *_: calls.append("program"))
    program = signal.getsignal(signal.SIGTERM)
    manager = make_manager()
    try:
        async with drain_on_signals(manager):
            handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
        assert calls == ["program"]
        await manager.create_task(asyncio.sleep(0))
    finally:
        assert callable(program)
        signal.signal(signal.SIGTERM, handlers[signal.SIGTERM])


async def test_two_managers_end_one_after_the_other(make_manager, handlers):
    """Of two nested contexts the inner manager ends first, then the outer one; then the signal has its effect."""
    ends = []
    signal.signal(signal.SIGTERM, lambda *_: ends.append("handler"))
    outer, inner = make_manager(drain_timeout=10), make_manager(drain_timeout=10)
    gate = asyncio.Event()

    async def work(name):
        await gate.wait()
        ends.append(name)

    try:
        async with drain_on_signals(outer), drain_on_signals(inner):
            outer.create_task(work("outer"))
            inner.create_task(work("inner"))
            signal.raise_signal(signal.SIGTERM)
            await asyncio.sleep(0)
            gate.set()
        assert sorted(ends[:2]) == ["inner", "outer"]
        assert ends[2:] == ["handler"]
    finally:
        signal.signal(signal.SIGTERM, handlers[signal.SIGTERM])
    assert (outer._shutdown.phase, inner._shutdown.phase) == ("closed", "closed")


def test_off_the_main_thread_it_does_nothing_and_says_so(make_manager, handlers, caplog):
    """In another thread the context yields False and logs a warning."""
    manager = make_manager()
    seen = []

    async def main():
        async with drain_on_signals(manager) as is_installed:
            seen.append(is_installed)
            seen.append({number: signal.getsignal(number) for number in handlers} == handlers)
            task = manager.create_task(forever())
            await manager.cancel_all()
            assert task.cancelled()

    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=asyncio.run, args=(main(),))
        thread.start()
        thread.join()
    assert seen == [False, True]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "in the main thread only" in caplog.text
