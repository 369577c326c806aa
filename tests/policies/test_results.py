"""Results that are kept after the end of a task, and progress before it."""

from __future__ import annotations

import asyncio
import threading

import pytest
from loops import VirtualLoop
from work import after, failing, forever, until, value

from bgtasks import InvalidTimeoutError, TaskResult, UnknownTaskError, progress
from bgtasks.policies import _results


async def test_a_result_is_kept(make_manager):
    """State before the end, outcome and result afterwards."""
    manager = make_manager()
    event = asyncio.Event()
    task = manager.submit(after, event, 7, name="w", keep_result=60.0)
    task_id = manager.get_task_id(task)
    await asyncio.sleep(0)
    assert manager.result(task_id) == TaskResult(task_id, "w", "running")
    event.set()
    await task
    result = manager.result(task_id)
    assert (result.state, result.result, result.error, result.done) == ("completed", 7, None, True)


async def test_a_function_that_ends_at_once_is_kept(make_manager):
    """On an eager loop it has ended inside submit."""
    manager = make_manager()
    task = manager.submit(value, 7, keep_result=60.0)
    result = await manager.wait(1)
    assert (result.task_id, result.result) == (1, 7)
    assert await task == 7


@pytest.mark.parametrize("end", ["failed", "cancelled", "timed_out"])
async def test_other_ends_are_kept(make_manager, end):
    """A failure as text: nothing of its frames stays."""
    manager = make_manager()
    if end == "failed":
        task = manager.submit(failing, ValueError("no"), keep_result=60.0)
    else:
        task = manager.submit(forever, timeout=0.001 if end == "timed_out" else None, keep_result=60.0)
        await asyncio.sleep(0)
        if end == "cancelled":
            task.cancel()
    await asyncio.wait([task])
    result = manager.result(1)
    assert (result.state, result.result) == (end, None)
    assert result.error == ("ValueError: no" if end == "failed" else None)


async def test_an_unknown_task_is_named(make_manager):
    """One that is not kept, and one that never was."""
    manager = make_manager()
    await manager.submit(value, 7)
    for task_id in (1, 99, "x"):
        with pytest.raises(UnknownTaskError, match="no result is kept"):
            manager.result(task_id)
        with pytest.raises(UnknownTaskError):
            await manager.wait(task_id)


async def test_wait_returns_at_the_end_or_at_the_timeout(make_manager):
    """Neither a timeout nor a cancellation touches the task."""
    manager = make_manager()
    event = asyncio.Event()
    task = manager.submit(after, event, 7, keep_result=60.0)
    assert (await manager.wait(1, timeout=0.001)).state == "running"
    waiter = asyncio.ensure_future(manager.wait(1))
    others = [asyncio.ensure_future(manager.wait(1)) for _ in range(3)]
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.wait([waiter])
    event.set()
    assert [(await each).result for each in others] == [7, 7, 7]
    assert await task == 7
    with pytest.raises(InvalidTimeoutError):
        await manager.wait(1, timeout=-1)


async def test_a_result_can_be_awaited_on_another_loop(make_manager):
    """And asked for from any thread."""
    manager = make_manager()
    event = asyncio.Event()
    task = manager.submit(after, event, 7, keep_result=60.0)
    await asyncio.sleep(0)
    seen = []

    def other():
        seen.append(manager.result(1).state)
        seen.append(asyncio.run(manager.wait(1)).result)

    thread = threading.Thread(target=other)
    thread.start()
    await until(lambda: seen)
    await asyncio.sleep(0.01)
    event.set()
    await task
    await asyncio.to_thread(thread.join)
    assert seen == ["running", 7]


def test_a_result_goes_when_its_time_is_over(make_manager, monkeypatch):
    """Also if nothing asks for it."""
    manager = make_manager()

    async def main():
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(_results.time, "monotonic", loop.time)
        await manager.submit(value, "long", keep_result=60.0)
        await manager.submit(value, "short", keep_result=5.0)
        await asyncio.sleep(4)
        assert manager.result(2).result == "short"
        await asyncio.sleep(2)
        with pytest.raises(UnknownTaskError):
            manager.result(2)
        assert manager.result(1).result == "long"
        await asyncio.sleep(60)
        assert not manager._policies.results._kept

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())
    monkeypatch.undo()


async def test_the_number_of_results_is_bounded(make_manager, monkeypatch):
    """The oldest goes first."""
    monkeypatch.setattr(_results, "MAX_RESULTS", 3)
    manager = make_manager()
    for number in range(5):
        await manager.submit(value, number, keep_result=60.0)
    assert [manager.result(task_id).result for task_id in (3, 4, 5)] == [2, 3, 4]
    with pytest.raises(UnknownTaskError):
        manager.result(2)
    for number in range(20):
        await manager.submit(value, number, keep_result=60.0)
    results = manager._policies.results
    assert len(results._kept) == 3
    assert len(results._ends) <= 6


async def test_progress_is_shown(make_manager):
    """In the info of any task and in the result."""
    manager = make_manager()
    event = asyncio.Event()

    async def work():
        progress(1, 3, "copying")
        await event.wait()
        progress(3, 3)

    manager.submit(work, keep_result=60.0)
    manager.create_task(work())
    await asyncio.sleep(0)
    expected = {"done": 1, "total": 3, "text": "copying"}
    assert [info["progress"] for info in manager.get_task_info()] == [expected, expected]
    assert manager.result(1).progress == expected
    event.set()
    await manager.wait_for_all()
    assert manager.result(1).progress == {"done": 3, "total": 3, "text": None}


async def test_progress_elsewhere_is_ignored():
    """Outside of a task, and in a task of no manager."""
    progress(1)
    await asyncio.create_task(value(progress(2)))


def test_progress_outside_of_a_loop_is_ignored():
    """A function may be called by a plain program."""
    progress(1)
