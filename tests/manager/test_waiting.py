"""wait_for_all: waits for all tasks and cancels none."""

import asyncio
import logging

import pytest
from work import after, failing, failing_later, forever, until, value


async def test_returns_at_once_when_nothing_runs(make_manager):
    """The wait for an empty manager returns at once."""
    await make_manager().wait_for_all()


async def test_waits_for_tasks_started_meanwhile(make_manager):
    """The wait includes tasks that tasks start."""
    manager = make_manager()
    seen = []

    async def work(depth):
        await asyncio.sleep(0)
        if depth:
            manager.create_task(work(depth - 1))
        seen.append(depth)

    manager.create_task(work(3))
    await manager.wait_for_all()
    assert sorted(seen) == [0, 1, 2, 3]


async def test_done_callbacks_have_run_when_the_wait_returns(make_manager):
    """When the wait returns, the count is zero and the done callbacks of the tasks have run."""
    manager = make_manager()
    called = []
    for _ in range(3):
        manager.create_task(asyncio.sleep(0)).add_done_callback(called.append)
    await manager.wait_for_all()
    assert len(called) == 3
    assert manager.get_task_count() == 0


async def test_the_first_failure_is_raised_after_all_have_ended(make_manager, caplog):
    """A failure does not end the wait; the first one is raised at its end."""
    manager = make_manager()
    event = asyncio.Event()
    last = manager.create_task(after(event, "last"))
    manager.create_task(failing_later(ValueError("first")))
    manager.create_task(failing_later(KeyError("second")))
    waiting = asyncio.ensure_future(manager.wait_for_all())
    await until(lambda: manager.get_task_count() == 1)
    assert not waiting.done()
    event.set()
    with pytest.raises(ValueError, match="first"):
        await waiting
    assert last.result() == "last"


async def test_return_exceptions_raises_no_failure(make_manager, caplog):
    """With return_exceptions the wait returns None after failures."""
    manager = make_manager()
    manager.create_task(failing(ValueError("expected")))
    assert await manager.wait_for_all(return_exceptions=True) is None


async def test_a_cancelled_task_is_no_failure(make_manager):
    """Cancelled tasks end the wait without an error."""
    manager = make_manager()
    manager.create_task(forever()).cancel()
    await manager.wait_for_all()


async def test_a_wait_that_times_out_cancels_nothing(make_manager, caplog):
    """After the timeout a warning is logged; the tasks go on and finish."""
    manager = make_manager()
    event = asyncio.Event()
    task = manager.create_task(after(event, "finished"))
    await manager.wait_for_all(timeout=0.005)
    assert not task.done()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    event.set()
    assert await task == "finished"


async def test_a_timeout_of_zero_does_not_wait(make_manager, caplog):
    """With timeout 0 the wait returns at once, also if tasks run."""
    manager = make_manager()
    await manager.wait_for_all(timeout=0)
    task = manager.create_task(forever())
    await manager.wait_for_all(timeout=0)
    assert not task.done()
    await manager.cancel_all()


async def test_a_wait_that_is_cancelled_cancels_nothing(make_manager):
    """Cancelling the wait does not cancel the tasks."""
    manager = make_manager()
    event = asyncio.Event()
    task = manager.create_task(after(event))
    waiting = asyncio.ensure_future(manager.wait_for_all())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    event.set()
    await task


async def test_a_managed_task_does_not_wait_for_itself(make_manager):
    """Managed tasks in wait_for_all do not wait for themselves, nor for each other."""
    manager = make_manager()
    event = asyncio.Event()
    manager.create_task(after(event))
    waiters = [manager.create_task(manager.wait_for_all()) for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiters)
    event.set()
    await asyncio.wait(waiters)
    await manager.wait_for_all()


async def test_each_of_two_waits_raises_a_failure(make_manager, caplog):
    """Each of two waits raises the failure that happened during it."""
    manager = make_manager()
    manager.create_task(failing_later(ValueError("expected")))
    results = await asyncio.gather(manager.wait_for_all(), manager.wait_for_all(), return_exceptions=True)
    assert [str(result) for result in results] == ["expected", "expected"]
    await manager.wait_for_all()


async def test_cancel_all_ends_the_tasks_and_leaves_the_manager_open(make_manager):
    """After cancel_all the tasks have ended and new ones may start."""
    manager = make_manager()
    tasks = [manager.create_task(forever()) for _ in range(10)]
    await manager.cancel_all()
    assert all(task.cancelled() for task in tasks)
    assert await manager.create_task(value(3)) == 3


async def test_cancel_all_ends_while_tasks_start_and_cancel_each_other(make_manager, caplog):
    """Tasks that end, start others and cancel each other during cancel_all do not disturb it or the counters."""
    manager = make_manager()

    async def work(depth):
        try:
            await asyncio.sleep(0)
            await asyncio.Event().wait()
        finally:
            manager.cancel("work")
            if depth:
                manager.create_task(work(depth - 1), name="work")

    with caplog.at_level(logging.CRITICAL):
        for _ in range(20):
            manager.create_task(work(3), name="work")
        await asyncio.sleep(0)
        while manager.get_task_count():
            await manager.cancel_all()
    assert manager.stats()["started"] == manager.stats()["cancelled"]


async def test_cancel_by_id_and_by_name(make_manager):
    """Cancel takes an id or a name and returns the number of tasks."""
    manager = make_manager()
    first, second, third = (manager.create_task(forever(), name=name) for name in ("a", "b", "b"))
    assert manager.cancel(manager.get_task_id(first)) == 1
    assert manager.cancel("b") == 2
    assert manager.cancel("unknown") == 0
    assert manager.cancel(10**6) == 0
    await asyncio.wait([first, second, third])
    assert all(task.cancelled() for task in (first, second, third))
    assert manager.get_task(1) is None
    assert manager.get_task_id(first) is None
