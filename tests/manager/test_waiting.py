"""wait_for_all: waits for all tasks and cancels none."""

import asyncio
import logging
import re
import threading

import pytest
from work import after, failing, failing_later, forever, until, value

import bgtasks


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
    """With return_exceptions the wait returns all failures in their order, those by timeout included."""
    manager = make_manager()
    errors = [ValueError("expected"), KeyError("expected, too")]
    for error in errors:
        manager.create_task(failing_later(error))
    manager.create_task(forever(), name="slow", timeout=0.005)
    *found, timeout = await manager.wait_for_all(return_exceptions=True)
    assert found == errors
    assert isinstance(timeout, TimeoutError)
    assert "'slow' timed out" in str(timeout)
    assert await manager.wait_for_all(return_exceptions=True) == []


async def test_all_failures_are_raised_as_a_group(make_manager, caplog):
    """With as_group none of them is lost; a single one comes in a group, too."""
    manager = make_manager()
    errors = [ValueError("first"), KeyError("second")]
    for error in errors:
        manager.create_task(failing_later(error))
    with pytest.raises(ExceptionGroup, match="2 background tasks failed") as caught:
        await manager.wait_for_all(as_group=True)
    assert list(caught.value.exceptions) == errors
    manager.create_task(failing_later(errors[0]))
    with pytest.raises(ExceptionGroup, match="1 background task failed"):
        await manager.wait_for_all(as_group=True)
    await manager.wait_for_all(as_group=True)


async def test_waiting_for_names(make_manager, caplog):
    """It ends with the last task of these names, those started meanwhile included, and raises only their failures."""
    manager = make_manager()
    other, release = manager.create_task(forever(), name="other"), asyncio.Event()

    async def load(depth):
        await release.wait()
        if depth:
            manager.create_task(load(depth - 1), name="load")
        else:
            raise ValueError("load")

    manager.create_task(load(2), name="load")
    manager.fire(failing(KeyError("not asked for")), name="third")
    waiting = asyncio.ensure_future(manager.wait_for_all(names=("load", "none")))
    await until(lambda: manager.stats()["failed"] == 1)
    assert not waiting.done()
    release.set()
    with pytest.raises(ValueError, match="load"):
        await waiting
    assert not other.done()
    await manager.wait_for_all(names="load")
    await manager.wait_for_all(names=[])
    await manager.shutdown()


async def test_services_are_not_waited_for_by_name(make_manager):
    """As everywhere, nothing waits for them."""
    manager = make_manager()
    manager.create_task(forever(), name="beat", service=True)
    await asyncio.wait_for(manager.wait_for_all(names="beat"), 5)
    await manager.shutdown()


async def test_tasks_that_wait_for_each_other_by_name(make_manager):
    """A task waits neither for itself nor for another that waits, for names or for all; others wait for both."""
    manager = make_manager()
    release = asyncio.Event()

    async def waits(names):
        await release.wait()
        await manager.wait_for_all(names=names)
        await asyncio.sleep(0.001)

    tasks = [manager.create_task(waits(names), name=name) for name, names in [("a", "ab"), ("b", "a"), ("c", None)]]
    waiting = asyncio.ensure_future(manager.wait_for_all(names=["a", "b", "c"]))
    manager.create_task(after(release), name="a")
    release.set()
    await asyncio.wait_for(waiting, 5)
    assert all(task.done() for task in tasks)


async def test_waiting_for_the_name_of_a_function_in_a_thread(make_manager):
    """Functions of executors have names, too."""
    manager, release = make_manager(), threading.Event()
    with bgtasks.BackgroundExecutor(manager=manager) as submit:
        future = submit(release.wait, __name__="parse")
        waiting = asyncio.ensure_future(manager.wait_for_all(names="parse"))
        await asyncio.sleep(0.005)
        assert not waiting.done()
        release.set()
        await asyncio.wait_for(waiting, 5)
        assert manager.get_task_count() == 0
    assert future.result()


@pytest.mark.parametrize("names", [None, "slow"])
async def test_the_end_of_the_time_names_what_is_left(make_manager, caplog, names):
    """As a warning or as an error; in either case the tasks go on."""
    manager = make_manager()
    for name in ("slow", "slow", "other"):
        manager.create_task(forever(), name=name)
    text = "2 background tasks still run after waiting 0.005 s for those names: slow (2)"
    if names is None:
        text = "3 background tasks still run after waiting 0.005 s for all: other (1), slow (2)"
    assert await manager.wait_for_all(0.005, names=names) == []
    assert [record.getMessage() for record in caplog.records] == [text]
    with pytest.raises(TimeoutError, match=re.escape(text)):
        await manager.wait_for_all(0.005, names=names, on_timeout="raise")
    assert len(caplog.records) == 1
    assert manager.get_task_count() == 3
    await manager.shutdown()


@pytest.mark.parametrize("arguments", [{"names": 5}, {"names": [5]}, {"names": iter(["a"])}, {"on_timeout": "stop"}])
async def test_invalid_arguments_of_a_wait_are_named(make_manager, arguments):
    """The error names the argument."""
    (name,) = arguments
    with pytest.raises(bgtasks.InvalidOptionError, match=name):
        await make_manager().wait_for_all(**arguments)


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
