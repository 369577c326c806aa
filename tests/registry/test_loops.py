"""One manager on many loops: one after another, several at once, closed in use, with foreign task factories."""

import asyncio
import gc
import inspect
import sys
import threading

import pytest
from internals import release_closed_loops
from loops import LOOPS
from work import after, forever, until, value


def test_serves_loops_one_after_another(make_manager, loop_errors):
    """A manager serves many asyncio.run calls, with ids that never repeat and counters that add up."""
    manager = make_manager(history=100)
    for _ in range(20):
        asyncio.run(one_round(manager))
    assert manager.stats()["completed"] == 40
    assert len({entry["task_id"] for entry in manager.get_history()}) == 40


async def one_round(manager):
    """Run two tasks."""
    assert await manager.create_task(value(1)) == 1
    manager.fire(value(2))
    await manager.wait_for_all()


@pytest.mark.parametrize("kind", list(LOOPS))
def test_tasks_of_a_closed_loop_are_abandoned_with_one_warning(make_manager, caplog, kind, capfd):
    """Tasks of a closed loop are abandoned at the next use: counted, closed and named in one warning."""
    manager = make_manager(max_concurrency=3)
    coro = forever()
    ended = []

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def start():
        manager.create_task(work(), name="left", timeout=3600)
        manager.create_task(work(), name="left")
        await asyncio.sleep(0)
        manager.fire(forever(), name="not started")
        manager.create_task(coro, name="queued")

    loop = LOOPS[kind]()
    loop.run_until_complete(start())
    loop.close()
    # A query changes nothing, and already counts the tasks as abandoned.
    assert manager.get_task_count() == 0
    assert manager.stats()["abandoned"] == 4
    assert "open, 0 tasks" in repr(manager)
    assert not ended
    assert not caplog.records
    release_closed_loops(manager)
    assert manager.stats()["abandoned"] == 4
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "4 background tasks" in record.getMessage()
    assert "left (2)" in record.getMessage()
    assert ended == [True, True]
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
    assert asyncio.run(run_value(manager)) == 5
    gc.collect()
    assert "destroyed" not in capfd.readouterr().err


async def run_value(manager):
    """Run one task."""
    return await manager.create_task(value(5))


def test_tasks_cancelled_by_the_end_of_a_run_are_cancelled_not_abandoned(make_manager):
    """asyncio.run cancels the remaining tasks, and the manager counts them as cancelled."""
    manager = make_manager()

    async def main():
        manager.create_task(forever())
        manager.fire(forever())

    asyncio.run(main())
    assert (manager.stats()["cancelled"], manager.stats()["abandoned"]) == (2, 0)


def test_serves_loops_in_several_threads_at_once(make_manager):
    """Tasks run on their own loops; counters and infos cover all loops."""
    manager = make_manager()
    barrier = threading.Barrier(4)
    failures = []

    async def main():
        loop = asyncio.get_running_loop()
        event = asyncio.Event()
        task = manager.create_task(after(event, loop), name="shared")
        await asyncio.to_thread(barrier.wait)
        if manager.get_task_count() < 4:
            failures.append("count")
        await asyncio.to_thread(barrier.wait)
        event.set()
        if await task is not loop:
            failures.append("loop")

    threads = [threading.Thread(target=asyncio.run, args=(main(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert manager.stats()["completed"] == 4


def test_shutdown_reaches_the_tasks_of_other_threads(make_manager):
    """A shutdown on one loop cancels the tasks of other running loops, and waits for them."""
    manager = make_manager()
    started = threading.Event()
    seen = []

    async def elsewhere():
        task = manager.create_task(forever())
        started.set()
        await asyncio.wait([task])
        seen.append(task.cancelled())

    thread = threading.Thread(target=asyncio.run, args=(elsewhere(),))
    thread.start()
    started.wait(30)
    stats = asyncio.run(manager.shutdown())
    thread.join(30)
    assert seen == [True]
    assert (stats["status"], stats["initial_tasks"]) == ("completed", 1)


def test_a_stopped_loop_does_not_hold_up_shutdown(make_manager):
    """Tasks of a loop that is neither running nor closed are cancelled and named, not waited for."""
    manager = make_manager()
    idle = asyncio.new_event_loop()

    async def start():
        manager.create_task(forever(), name="idle")

    idle.run_until_complete(start())
    stats = asyncio.run(manager.shutdown(timeout=3600))
    assert (stats["status"], stats["remaining_names"]) == ("timeout", ["idle"])
    idle.run_until_complete(asyncio.sleep(0))
    idle.close()
    assert manager.stats()["cancelled"] == 1


def plain_factory(loop, coro):
    """Build a task with two arguments, as older factories do."""
    return asyncio.Task(coro, loop=loop)


def options_factory(loop, coro, **kwargs):
    """Build a task with all given options."""
    return asyncio.Task(coro, loop=loop, **kwargs)


class Wrapped(asyncio.Task):
    """A task class of another package."""


def class_factory(loop, coro, context=None, **kwargs):
    """Build a task of another class around a coroutine of its own, as instrumentation does."""

    async def instrumented():
        return await coro

    return Wrapped(instrumented(), loop=loop, context=context, **kwargs)


@pytest.mark.parametrize("factory", [plain_factory, options_factory, class_factory])
async def test_a_foreign_factory_builds_the_task(make_manager, loop_kind, factory):
    """Two-argument, keyword and instrumenting factories build the tasks; every end is counted."""
    manager = make_manager()
    if factory is plain_factory and (loop_kind == "uvloop" or sys.version_info >= (3, 14)):
        # Instrumenting factories always pass options, with or without a manager.
        return
    asyncio.get_running_loop().set_task_factory(factory)
    try:
        tasks = [
            manager.create_task(value(7), name="fine"),
            manager.create_task(forever(), timeout=0.001),
            manager.create_task(forever()),
            manager.create_task(forever(), eager_start=True),
        ]
        tasks[2].cancel()
        await asyncio.sleep(0)
        manager.cancel(manager.get_task_id(tasks[3]))
        await asyncio.wait(tasks)
    finally:
        asyncio.get_running_loop().set_task_factory(None)
    assert isinstance(tasks[0], asyncio.Task)
    assert tasks[0].result() == 7
    assert [manager.stats()[key] for key in ("completed", "timed_out", "cancelled")] == [1, 1, 2]


async def test_a_factory_that_fails_loses_nothing(make_manager):
    """If a factory raises, the error propagates, the coroutine is closed and no task is counted."""
    manager = make_manager()

    def broken(loop, coro, **kwargs):
        raise RuntimeError("in the factory")

    loop = asyncio.get_running_loop()
    usual = loop.get_task_factory()
    loop.set_task_factory(broken)
    coro = forever()
    try:
        with pytest.raises(RuntimeError, match="in the factory"):
            manager.create_task(coro)
    finally:
        loop.set_task_factory(usual)
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
    assert manager.stats()["started"] == 0


async def test_the_factory_of_another_manager_tracks_the_task_as_well(make_manager):
    """On a loop with another manager's factory both managers see the task."""
    manager, other = make_manager(), make_manager()
    loop = asyncio.get_running_loop()
    usual = loop.get_task_factory()
    loop.set_task_factory(other.task_factory)
    try:
        task = manager.create_task(after(asyncio.Event()), name="both")
        await asyncio.sleep(0)
        assert manager.get_task_count() == 1
        assert other.get_task_count() == 1
        task.cancel()
        await asyncio.wait([task])
    finally:
        loop.set_task_factory(usual)
    await until(lambda: other.get_task_count() == 0)
    assert manager.stats()["cancelled"] == other.stats()["cancelled"] == 1
