"""drain_on_signals: a signal waits for the background tasks, then goes where it would have gone."""

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

# A thousand tasks that end when the test says so, and a body that waits for ever.
DRAINING = """
async def work():
    await gate.wait()

async def main():
    global gate
    gate = asyncio.Event()
    async with BackgroundTaskManager(drain_timeout=20.0, default_shutdown_timeout=5.0) as manager:
        async with bgtasks.drain_on_signals(manager) as watching:
            assert watching
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
    """The process dies of SIGTERM, as it would have, but after its thousand tasks."""
    after = DRAINING.replace("gate.set()", "gate.set(); await manager.wait_for_all(); say('all done')")
    with child(tmp_path, after + RUN, twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("SIGTERM: no new background tasks, 1000 have to end first")
        program.tell()
        program.wait_for("all done")
        assert program.end() == -signal.SIGTERM
        assert "Traceback" not in program.output


def test_sigint_raises_keyboard_interrupt_when_all_tasks_have_finished(tmp_path, twin, loop_name):
    """asyncio.run does with SIGINT what it always does, only later."""
    with child(tmp_path, DRAINING + RUN, twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGINT)
        program.wait_for("SIGINT: no new background tasks, 1000 have to end first")
        program.tell()
        program.wait_for("body ends, 1000 completed")
        assert program.end() == -signal.SIGINT
        assert "KeyboardInterrupt" in program.output


def test_what_does_not_finish_in_time_is_cancelled_and_named(tmp_path, twin, loop_name):
    """At the end of the drain time the log says how many tasks of which name were cancelled."""
    program_text = DRAINING.replace("drain_timeout=20.0", "drain_timeout=0.05") + RUN
    with child(tmp_path, program_text, twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGTERM)
        assert program.end() == -signal.SIGTERM
        assert "WARNING Shutdown cancelled 1000 of 1000 background tasks: work (1000)" in program.lines


def test_a_second_signal_cuts_the_draining_short(tmp_path, twin, loop_name):
    """Nobody has to wait for the drain time: the second signal cancels, and the first one has its effect."""
    with child(tmp_path, DRAINING.replace("20.0", "3600.0") + RUN, twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("SIGTERM: no new")
        program.process.send_signal(signal.SIGTERM)
        assert program.end() == -signal.SIGTERM
        assert "WARNING SIGTERM again: background tasks are cancelled" in program.lines
        assert "WARNING Shutdown cancelled 1000 of 1000 background tasks: work (1000)" in program.lines


def test_a_third_signal_is_not_held_back(tmp_path, twin, loop_name):
    """Against a task that swallows every cancellation the third signal has its usual effect."""
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
        program.wait_for("SIGTERM: no new")
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
    """Whoever handled SIGTERM before still does, once, and the handlers are put back."""
    program_text = HANDLED.replace("SET_HANDLER", "signal.signal(signal.SIGTERM, on_sigterm)")
    with child(tmp_path, program_text + RUN, twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("SIGTERM: no new")
        program.tell()
        assert program.end() == 0
    said = [line for line in program.lines if not line.startswith("INFO")]
    called = "handler of the program: SIGTERM <BackgroundTaskManager closed, 0 tasks>"
    assert said == ["ready", "task ends", called, "body ends", "as before"]


def test_a_handler_on_the_loop_runs_at_once(tmp_path, twin, loop_name):
    """loop.add_signal_handler is left alone: its handler runs, and the context waits for the tasks."""
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
    """The common handler that raises SystemExit gets its way, after the tasks."""
    program_text = HANDLED.replace("SET_HANDLER", "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))")
    with child(tmp_path, program_text + RUN, twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGTERM)
        program.wait_for("SIGTERM: no new")
        program.tell()
        assert program.end() == 7
        assert "task ends" in program.lines
        assert "never retrieved" not in program.output


@pytest.fixture
def taken():
    """Give both handlers as they are, and demand that they are the same afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield before
    assert {number: signal.getsignal(number) for number in before} == before


async def test_without_a_signal_nothing_happens(make_manager, taken):
    """The handlers are put back, the manager is left open."""
    manager = make_manager()
    async with drain_on_signals(manager) as watching:
        assert watching
        assert signal.getsignal(signal.SIGTERM) != taken[signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == taken[signal.SIGTERM]
    await manager.create_task(asyncio.sleep(0))


async def test_an_error_of_the_body_goes_on_and_the_handlers_are_put_back(make_manager, taken):
    """The context hides no exception."""
    with pytest.raises(ValueError, match="body"):
        async with drain_on_signals(make_manager()):
            raise ValueError("body")


async def test_an_ignored_signal_stays_ignored(make_manager, taken):
    """Who ignores SIGTERM goes on ignoring it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        async with drain_on_signals(make_manager()):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, taken[signal.SIGTERM])


async def test_a_handler_set_inside_stays_and_ours_passes_on(make_manager, taken):
    """A library that takes the signals after us may give ours back later than we left: it passes signals on."""
    calls = []
    signal.signal(signal.SIGTERM, lambda *_: calls.append("program"))
    program = signal.getsignal(signal.SIGTERM)
    manager = make_manager()
    try:
        async with drain_on_signals(manager):
            ours = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        signal.signal(signal.SIGTERM, ours)
        signal.raise_signal(signal.SIGTERM)
        assert calls == ["program"]
        await manager.create_task(asyncio.sleep(0))
    finally:
        assert callable(program)
        signal.signal(signal.SIGTERM, taken[signal.SIGTERM])


async def test_two_managers_end_one_after_the_other(make_manager, taken):
    """Of two nested contexts the inner manager ends first, then the outer one, then the signal is passed on."""
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
        signal.signal(signal.SIGTERM, taken[signal.SIGTERM])
    assert (outer._phase, inner._phase) == ("closed", "closed")


def test_off_the_main_thread_it_does_nothing_and_says_so(make_manager, taken, caplog):
    """In another thread the context yields False and logs a warning."""
    manager = make_manager()
    seen = []

    async def main():
        async with drain_on_signals(manager) as watching:
            seen.append(watching)
            seen.append({number: signal.getsignal(number) for number in taken} == taken)
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
