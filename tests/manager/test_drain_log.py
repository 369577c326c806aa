"""Nothing is silent at the end of a program: what is left, what was cancelled, what nobody waited for."""

import asyncio
import logging

import pytest
from loops import LOOPS
from work import after, forever, until, value

from bgtasks import _drain_log


def warnings_of(caplog):
    """Return the warnings of bgtasks."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "bgtasks" and record.levelno >= logging.WARNING
    ]


async def test_draining_names_what_is_left_and_shutdown_what_it_cancelled(make_manager, caplog, monkeypatch):
    """One record at the start with names and time, one at each interval, one of what was cancelled."""
    monkeypatch.setattr(_drain_log, "SILENCE", 0.0)
    monkeypatch.setattr(_drain_log, "INTERVAL", 0.0)
    manager = make_manager(drain_timeout=60.0)
    release = asyncio.Event()
    manager.create_task(after(release), name="mail")
    for _ in range(2):
        manager.create_task(forever(), name="export")
    shutdown = asyncio.ensure_future(manager.shutdown())
    await until(lambda: len(warnings_of(caplog)) > 1)
    release.set()
    await until(lambda: any(text.endswith("to go: export (2)") for text in warnings_of(caplog)))
    manager._shutdown.hurry()
    await shutdown
    first, again, *_, last = warnings_of(caplog)
    assert first == ("Shutdown: 3 background tasks are left, with at most 60 s to finish: export (2), mail (1)")
    assert again.startswith("3 background tasks left after 0 s, with ")
    assert last == "Shutdown cancelled 2 of 3 background tasks: export (2)"


async def test_tasks_that_end_at_once_are_no_news(make_manager, caplog):
    """A clean end of a program says nothing."""
    async with make_manager(drain_timeout=60.0) as manager:
        manager.create_task(value())
    assert not warnings_of(caplog)


async def test_tasks_of_a_factory_are_not_claimed(make_manager, caplog):
    """What a library cancels by itself while the manager shuts down is not what the shutdown cancelled."""
    manager = make_manager(drain_timeout=60.0)
    loop = asyncio.get_running_loop()
    previous = loop.get_task_factory()
    loop.set_task_factory(manager.task_factory)
    try:
        other = loop.create_task(forever(), name="other")
    finally:
        loop.set_task_factory(previous)
    manager.create_task(value()).add_done_callback(lambda _: other.cancel())
    await manager.shutdown()
    await asyncio.wait([other])
    assert not warnings_of(caplog)


@pytest.mark.parametrize("loop_name", list(LOOPS))
def test_a_loop_that_ends_under_a_manager_names_what_it_cancels(make_manager, caplog, loop_name):
    """Nobody shut the manager down: asyncio.run cancels its tasks, and the log says so once, by name."""
    manager = make_manager()

    async def main():
        for _ in range(2):
            manager.create_task(forever(), name="export")
        manager.create_task(forever(), name="mail", service=True)
        await asyncio.sleep(0)

    with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
        runner.run(main())
    assert warnings_of(caplog) == [
        "The event loop ends and cancels 3 background tasks, which nobody waited for: export (2), mail (1). Shut the "
        "manager down first: enter it with 'async with', or await shutdown()"
    ]


@pytest.mark.parametrize("loop_name", list(LOOPS))
def test_a_task_cancelled_between_two_runs_of_a_loop_is_no_end_of_it(make_manager, caplog, loop_name):
    """One of several tasks that is cancelled while the loop stands was cancelled by the program."""
    manager = make_manager()

    async def main():
        return manager.create_task(forever()), manager.create_task(forever())

    async def end(tasks):
        await asyncio.wait(tasks[:1])
        await manager.shutdown()

    with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
        tasks = runner.run(main())
        tasks[0].cancel()
        runner.run(end(tasks))
    assert not warnings_of(caplog)


@pytest.mark.parametrize("loop_name", list(LOOPS))
def test_a_loop_that_never_runs_again_silences_no_later_one(make_manager, caplog, loop_name):
    """Tasks of a loop that was closed at once after their cancellation hide nothing of the next loop's end."""
    manager = make_manager()

    async def main(name):
        return manager.create_task(forever(), name=name)

    loop = LOOPS[loop_name]()
    loop.run_until_complete(main("first")).cancel()
    loop.close()
    with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
        runner.run(main("second"))
    assert (
        len(
            [
                text
                for text in warnings_of(caplog)
                if "The event loop ends and cancels 1" in text and "second (1)" in text
            ]
        )
        == 1
    )
