"""One deadline from the signal on, shared by draining and cancelling; and signals that a server handles."""

import asyncio
import logging
import os
import signal
import sys
import time

import pytest
from child import child
from loops import LOOPS
from work import forever, stubborn, until

import bgtasks
from bgtasks import BackgroundTaskManager, InvalidOptionError
from bgtasks.program._draining import RESERVE, Ending
from bgtasks.program._listening import SignalListener


@pytest.fixture
def make_ending(make_manager):
    """Give a maker of endings on managers of the twin."""

    def make(deadline=None, **options):
        return Ending(make_manager(**{"drain_timeout": 20.0, "default_shutdown_timeout": 5.0, **options}), deadline)

    return make


@pytest.mark.parametrize("deadline", [0, -1, float("inf"), "5"])
def test_a_deadline_that_is_none_is_refused(deadline):
    """Before anything runs."""

    async def main(manager):
        pytest.fail("it ran")

    with pytest.raises(InvalidOptionError, match="shutdown_deadline must be a finite number of seconds"):
        bgtasks.run(main, shutdown_deadline=deadline)


@pytest.mark.parametrize(
    ("deadline", "elapsed", "expected"),
    [(None, 0.0, (5.0, 20.0)), (60.0, 0.0, (5.0, 20.0)), (10.0, 0.0, (1.96, 7.84)), (25.0, 5.0, (3.96, 15.84))],
)
async def test_both_timeouts_share_what_is_left(make_ending, deadline, elapsed, expected):
    """They are shortened in proportion, by what has passed since the signal, too."""
    ending = make_ending(deadline)
    ending.begin("SIGTERM", time.monotonic() - elapsed, "")
    shares = ending._shares()
    assert all(0 <= wanted - share < 0.5 for share, wanted in zip(shares, expected, strict=True)), shares
    if expected != (5.0, 20.0):
        assert sum(shares) <= deadline - elapsed - RESERVE


async def test_what_is_left_of_a_deadline_that_is_over_is_nothing(make_ending):
    """The tasks are cancelled at once; nothing waits for a negative time."""
    ending = make_ending(1.0)
    ending.begin("SIGTERM", time.monotonic() - 60, "")
    assert ending._shares() == (0.0, 0.0)
    task = ending.manager.create_task(forever())
    await ending.close()
    assert task.cancelled()


async def test_a_server_that_waits_for_requests_does_not_keep_the_manager(make_ending, caplog):
    """When only the time for cancelling is left the manager shuts down by itself; the server's end finds it done."""
    ending = make_ending(0.3)
    task = ending.manager.create_task(forever(), name="export")
    ending.on_signal(signal.SIGTERM, 1, time.monotonic())
    await asyncio.wait([task])
    await ending.close()
    assert "SIGTERM: 1 background task is left, with at most 0." in caplog.text
    assert ". A second SIGTERM cancels them" in caplog.text
    assert (await ending.manager.shutdown())["status"] == "already_shutdown"


async def test_the_second_signal_cancels_and_the_third_waits_no_longer(make_ending, caplog):
    """As under run; a signal of another kind is the copy that a supervisor sends on."""
    ending = make_ending(600.0, drain_timeout=300.0, default_shutdown_timeout=300.0)
    release = asyncio.Event()
    task = ending.manager.create_task(stubborn(10**9, release), name="stubborn")
    polite = ending.manager.create_task(forever(), name="polite")
    ending.on_signal(signal.SIGINT, 1, time.monotonic())
    ending.on_signal(signal.SIGTERM, 1, time.monotonic())
    closing = asyncio.ensure_future(ending.close())
    await asyncio.sleep(0.01)
    assert not polite.done()
    ending.on_signal(signal.SIGINT, 2, time.monotonic())
    await asyncio.wait([polite])
    assert not closing.done()
    ending.on_signal(signal.SIGINT, 3, time.monotonic())
    await closing
    assert "'stubborn' still runs at the end of shutdown" in caplog.text
    release.set()
    await asyncio.wait([task])


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself these signals")
async def test_a_listener_passes_signals_on_and_restores_handlers():
    """The handler of the server is called at once, and stands again afterwards; without one nothing is touched."""
    handled, noticed = [], []
    previous = signal.signal(signal.SIGINT, lambda number, frame: handled.append(number))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        handler = signal.getsignal(signal.SIGINT)
        with SignalListener(asyncio.get_running_loop(), lambda number, count, since: noticed.append((number, count))):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            await until(lambda: len(noticed) == 2)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, previous)
        signal.signal(signal.SIGTERM, before)
    assert handled == [signal.SIGINT] * 2
    assert noticed == [(signal.SIGINT, 1), (signal.SIGINT, 2)]


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send others these signals")
@pytest.mark.parametrize("loop_name", list(LOOPS))
def test_a_program_killed_in_the_middle_has_named_what_it_lost(tmp_path, twin, loop_name):
    """The platform's SIGKILL comes while it drains: the log has the names by then."""
    program_text = """
async def main(manager):
    for number in range(3):
        manager.create_task(asyncio.Event().wait(), name="export" if number else "mail")
    say("ready")
    await asyncio.Event().wait()

bgtasks.run(main, loop_factory=loop_factory, shutdown_deadline=60.0)
"""
    with child(tmp_path, program_text, twin, loop_name) as program:
        program.wait_for("ready")
        program.process.send_signal(signal.SIGTERM)
        line = program.wait_for("SIGTERM: ")
        program.process.kill()
        assert program.end() == -signal.SIGKILL
    assert line == (
        "WARNING SIGTERM: 3 background tasks are left, with at most 20 s to finish: export (2), mail (1). "
        "A second SIGTERM cancels them"
    )


def test_a_clean_end_with_a_publisher_says_nothing(caplog):
    """The task of a publisher is its own: shutdown closes the publisher, and claims no cancellation."""
    pytest.importorskip("msgspec")
    from bgtasks.events import Publisher
    from bgtasks.events.sinks.memory import MemorySink

    sink = MemorySink()

    async def main(manager: BackgroundTaskManager):
        publisher = Publisher(sink, manager=manager, name="orders")
        publisher.emit({"order": 7})
        await asyncio.sleep(0)
        assert (
            [info["name"] for info in manager.get_task_info()] == list(manager.stats()["names"]) == ["publisher orders"]
        )

    bgtasks.run(main)
    assert len(sink.events) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
