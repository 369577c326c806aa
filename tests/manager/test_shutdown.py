"""shutdown: refuses, drains, cancels, waits and reports; no task holds it up or is lost silently."""

import asyncio
import contextlib
import logging
import re
import time

import anyio
import pytest
from work import after, forever, stubborn, until, value

from bgtasks import ManagerClosedError


async def test_cancels_and_reports(make_manager):
    """By default every task is cancelled; the statistics have the keys of the reference."""
    manager = make_manager()
    tasks = [manager.create_task(forever(), name=f"n{i}") for i in range(5)]
    stats = await manager.shutdown()
    duration = stats.pop("duration_seconds")
    assert 0 <= duration < 5
    assert stats == {
        "status": "completed",
        "initial_tasks": 5,
        "completed_tasks": 5,
        "remaining_tasks": 0,
        "remaining_names": [],
    }
    assert all(task.cancelled() for task in tasks)


async def test_a_second_call_returns_already_shutdown(make_manager):
    """The second shutdown returns already_shutdown."""
    manager = make_manager()
    assert (await manager.shutdown())["status"] == "completed"
    again = await manager.shutdown()
    assert (again["status"], again["initial_tasks"], again["remaining_tasks"]) == ("already_shutdown", 0, 0)


async def test_two_concurrent_calls_shut_down_once(make_manager):
    """Of two concurrent calls, one does the work and the other returns after it."""
    manager = make_manager()
    task = manager.create_task(forever())
    first, second = await asyncio.gather(manager.shutdown(), manager.shutdown())
    assert {first["status"], second["status"]} == {"completed", "already_shutdown"}
    assert task.cancelled()


async def test_draining_lets_tasks_finish(make_manager):
    """Within the drain time tasks, and the tasks they start, end by themselves."""
    manager = make_manager(drain_timeout=10)
    event = asyncio.Event()

    async def parent():
        await event.wait()
        return await manager.create_task(value("child"))

    task = manager.create_task(parent())
    closing = asyncio.ensure_future(manager.shutdown())
    await asyncio.sleep(0)
    with pytest.raises(ManagerClosedError):
        manager.create_task(value())
    event.set()
    assert (await closing)["status"] == "completed"
    assert task.result() == "child"


async def test_tasks_that_outlast_the_drain_are_cancelled(make_manager):
    """Tasks that outlast the drain time are cancelled."""
    manager = make_manager()
    task = manager.create_task(forever())
    stats = await manager.shutdown(drain=0.005)
    assert task.cancelled()
    assert stats["status"] == "completed"


async def test_an_endless_respawner_does_not_hold_up_shutdown(make_manager, caplog):
    """Tasks that start successors without end are stopped after the drain time."""
    manager = make_manager()

    async def respawn():
        await asyncio.sleep(0)
        manager.create_task(respawn())

    with caplog.at_level(logging.CRITICAL):
        manager.create_task(respawn())
        stats = await manager.shutdown(drain=0.01, timeout=5)
    assert stats["remaining_tasks"] == 0
    assert manager.get_task_count() == 0


async def test_cleanup_of_tasks_is_over_when_shutdown_returns(make_manager, caplog):
    """A resource closed after shutdown is not touched by a task's finally, nor by a child started in it."""
    manager = make_manager()
    resource = {"open": True}
    refused = []

    async def child():
        assert resource["open"]

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            assert resource["open"]
            try:
                manager.create_task(child())
            except ManagerClosedError as error:
                refused.append(error)

    manager.create_task(work())
    await asyncio.sleep(0)
    await manager.shutdown()
    resource["open"] = False
    assert len(refused) == 1
    assert manager.stats()["cancelled"] == 1


@pytest.mark.parametrize("times", [1, 2, 10**9])
async def test_a_task_that_swallows_cancellation_is_cancelled_again(make_manager, caplog, times):
    """A swallowed cancellation is repeated; a task that swallows all is named and abandoned in time."""
    manager = make_manager()
    release = asyncio.Event()
    task = manager.create_task(stubborn(times, release), name="stubborn")
    await asyncio.sleep(0)
    cpu = time.process_time()
    stats = await manager.shutdown(timeout=0.02)
    assert time.process_time() - cpu < 5
    if times == 1:
        assert stats["status"] == "completed"
        assert task.cancelled()
    else:
        assert (stats["status"], stats["remaining_tasks"], stats["remaining_names"]) == ("timeout", 1, ["stubborn"])
        assert stats["completed_tasks"] == 0
        assert not task.done()
    straggler = [record for record in caplog.records if "still runs" in record.getMessage()]
    assert len(straggler) == 1
    assert re.search(r"at \S+work\.py:\d+ in stubborn \(in asyncio\.Event\.wait\)$", straggler[0].getMessage())
    release.set()
    await asyncio.wait([task])


async def test_a_managed_task_can_shut_down_its_manager(make_manager):
    """A managed task that shuts its manager down is neither cancelled nor waited for."""
    manager = make_manager()
    other = manager.create_task(forever())
    task = manager.create_task(manager.shutdown())
    stats = await task
    assert (stats["status"], stats["initial_tasks"], stats["remaining_tasks"]) == ("completed", 1, 0)
    assert other.cancelled()


async def test_shutdown_inside_a_cancelled_task_returns_at_once(make_manager):
    """Shutdown in a task's cleanup during shutdown returns at once: neither waits for the other."""
    manager = make_manager()
    seen = []

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            seen.append((await manager.shutdown())["status"])

    manager.create_task(work())
    await asyncio.sleep(0)
    stats = await manager.shutdown(timeout=5)
    assert stats["status"] == "completed"
    assert seen == ["already_shutdown"]


@pytest.mark.parametrize("drain", [0, 60])
async def test_a_cancelled_shutdown_ends_the_tasks_and_raises(make_manager, drain):
    """A cancelled shutdown raises CancelledError after the tasks have ended."""
    manager = make_manager()
    ended = []

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            ended.append(True)

    tasks = [manager.create_task(work()) for _ in range(3)]
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(manager.shutdown(drain=drain))
    await asyncio.sleep(0)
    closing.cancel("enough")
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert len(ended) == 3
    assert all(task.cancelled() for task in tasks)
    assert (await manager.shutdown())["status"] == "already_shutdown"


async def test_a_shutdown_that_is_cancelled_repeatedly_gives_up(make_manager, caplog):
    """A shutdown that is cancelled repeatedly returns promptly although a task never ends."""
    manager = make_manager()
    release = asyncio.Event()
    task = manager.create_task(stubborn(10**9, release))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(manager.shutdown())
    for _ in range(20):
        await asyncio.sleep(0)
        closing.cancel()
    await asyncio.wait([closing], timeout=5)
    assert closing.cancelled()
    release.set()
    await asyncio.wait([task])


async def test_shutdown_inside_a_cancelled_anyio_scope_ends_the_tasks(make_manager):
    """Also in a cancelled anyio scope, the tasks are cancelled and end."""
    manager = make_manager()
    task = manager.create_task(forever())
    await asyncio.sleep(0)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await manager.shutdown(drain=60)
    await until(task.done)
    assert task.cancelled()
    assert manager.get_task_count() == 0
    assert (await manager.shutdown())["status"] == "already_shutdown"


async def test_the_context_manager_shuts_down(make_manager):
    """By default, leaving the block cancels running tasks."""
    async with make_manager() as manager:
        task = manager.create_task(forever())
        assert manager.get_task_count() == 1
    assert task.cancelled()
    assert "closed" in repr(manager)


async def test_the_context_manager_drains_except_after_an_error(make_manager):
    """With drain_timeout a clean exit lets tasks finish; an exception in the block cancels them at once."""
    async with make_manager(drain_timeout=10) as manager:
        task = manager.create_task(asyncio.sleep(0.001, "finished"))
    assert task.result() == "finished"
    manager = make_manager(drain_timeout=3600)
    task = manager.create_task(forever())
    await manager.__aexit__(KeyError, KeyError(), None)
    assert task.cancelled()


async def test_aclose_closes(make_manager):
    """A manager works with contextlib.aclosing."""
    async with contextlib.aclosing(make_manager()) as manager:
        task = manager.create_task(forever())
    assert task.cancelled()


async def test_fired_and_queued_tasks_are_cancelled(make_manager):
    """Fired and queued tasks that have not started are cancelled without running."""
    manager = make_manager(max_concurrency=1)
    manager.create_task(forever(), name="runs")
    manager.create_task(after(None), name="queued")
    manager.fire(after(None), name="fired")
    stats = await manager.shutdown()
    assert stats["remaining_tasks"] == 0
    assert manager.stats()["cancelled"] == 3


async def test_thousands_of_tasks_end(make_manager):
    """Two thousand tasks end in one shutdown."""
    manager = make_manager()
    for _ in range(2_000):
        manager.create_task(forever())
    await asyncio.sleep(0)
    stats = await manager.shutdown()
    assert (stats["initial_tasks"], stats["remaining_tasks"]) == (2_000, 0)


async def test_an_error_inside_of_shutdown_is_raised(make_manager, monkeypatch):
    """What keeps it from its work reaches the caller, and another call does the work."""
    manager = make_manager()
    task = manager.create_task(forever())
    with monkeypatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "create_future", failing_future, raising=True)
        with pytest.raises(MemoryError):
            await manager.shutdown(drain=5.0)
    assert (await manager.shutdown())["status"] == "completed"
    assert task.cancelled()


def failing_future():
    """Do as ``create_future`` does when memory is out."""
    raise MemoryError
