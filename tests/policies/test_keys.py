"""At most one task of a key at once, whatever comes first."""

from __future__ import annotations

import asyncio
import gc
import logging
import tracemalloc

import pytest
from work import after, forever, until

from bgtasks import InvalidOptionError, NoRunningLoopError, Retry, TaskRejectedError


def recorder():
    """Return a coroutine function that notes its calls and the most that ran at once."""
    notes = []
    running = 0

    async def work(number, event=None, error=None):
        nonlocal running
        running += 1
        assert running == 1, "two at once"
        notes.append(number)
        try:
            if event is None:
                await asyncio.sleep(0)
            else:
                await event.wait()
            if error is not None:
                raise error
            return number
        finally:
            running -= 1

    work.notes = notes
    return work


async def test_join_returns_the_task_that_runs(make_manager):
    """The function is not called again; all get one result."""
    manager = make_manager()
    work = recorder()
    event = asyncio.Event()
    first = manager.submit(work, 1, event, key="k")
    await asyncio.sleep(0)
    second = manager.submit(work, 2, key="k", on_duplicate="join")
    assert second is first
    assert isinstance(first, asyncio.Task)
    event.set()
    assert await asyncio.gather(first, second) == [1, 1]
    assert work.notes == [1]
    assert await manager.submit(work, 3, key="k") == 3


async def test_a_joiners_cancellation_does_not_cancel_the_task(make_manager):
    """Neither that of the first caller nor that of a later one; a timeout around the wait neither."""
    manager = make_manager()
    work = recorder()
    event = asyncio.Event()

    async def caller():
        return await manager.submit(work, 1, event, key="k")

    callers = [asyncio.ensure_future(caller()) for _ in range(3)]
    await until(lambda: work.notes)
    await asyncio.sleep(0)
    for each in callers[:2]:
        each.cancel()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await manager.submit(work, 1, key="k")
    event.set()
    assert await callers[2] == 1
    assert [each.cancelled() for each in callers] == [True, True, False]
    assert work.notes == [1]


async def test_a_failure_reaches_every_joiner_and_is_logged_once(make_manager, caplog):
    """Also one whose caller went away."""
    manager = make_manager()
    work = recorder()
    event = asyncio.Event()
    task = manager.submit(work, 1, event, ValueError("no"), key="k")

    async def caller():
        await manager.submit(work, 2, key="k")

    callers = [asyncio.ensure_future(caller()) for _ in range(2)]
    await until(lambda: work.notes)
    await asyncio.sleep(0)
    callers[0].cancel()
    await asyncio.wait(callers[:1])
    event.set()
    for each in (task, callers[1]):
        with pytest.raises(ValueError, match="no"):
            await each
    assert [record.levelno for record in caplog.records if record.name == "bgtasks"] == [logging.ERROR]


async def test_cancelling_the_task_itself_cancels_it(make_manager):
    """task.cancel() and manager.cancel() mean the work."""
    manager = make_manager()
    task = manager.submit(forever, key="k")
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert manager.stats()["cancelled"] == 1


async def test_a_task_cannot_await_itself(make_manager):
    """As with any task of asyncio."""
    manager = make_manager()

    async def work():
        await manager.submit(work, key="k")

    with pytest.raises(RuntimeError, match="cannot await on itself"):
        await manager.submit(work, key="k")


async def test_skip_returns_none(make_manager):
    """And calls nothing."""
    manager = make_manager()
    work = recorder()
    event = asyncio.Event()
    task = manager.submit(work, 1, event, key="k", on_duplicate="skip")
    assert manager.submit(work, 2, key="k", on_duplicate="skip") is None
    event.set()
    assert await task == 1
    again = manager.submit(work, 3, key="k", on_duplicate="skip")
    assert await again == 3
    assert work.notes == [1, 3]


async def test_replace_begins_after_the_end_of_the_replaced_one(make_manager):
    """Which may take its time to clean up; the new one is shown as queued."""
    manager = make_manager()
    released = asyncio.Event()
    ended = []

    async def slow(number):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await released.wait()
            ended.append(number)
            raise

    work = recorder()
    first = manager.submit(slow, 1, key="k")
    await asyncio.sleep(0)
    second = manager.submit(work, 2, key="k", on_duplicate="replace")
    third = manager.submit(work, 3, key="k", on_duplicate="replace")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [info["state"] for info in manager.get_task_info()] == ["running", "queued"]
    assert work.notes == []
    released.set()
    assert await third == 3
    assert first.cancelled()
    assert second.cancelled()
    assert (work.notes, ended) == ([3], [1])


async def test_queue_latest_runs_the_last_one_after_the_current(make_manager):
    """Those in between are cancelled and never called."""
    manager = make_manager()
    work = recorder()
    event = asyncio.Event()
    tasks = [
        manager.submit(work, number, event if number == 0 else None, key="k", on_duplicate="queue_latest")
        for number in range(5)
    ]
    await asyncio.sleep(0)
    event.set()
    await asyncio.wait(tasks)
    assert work.notes == [0, 4]
    assert [task.cancelled() for task in tasks] == [False, True, True, True, False]
    assert manager.stats()["cancelled"] == 3


@pytest.mark.parametrize("end", ["failed", "cancelled", "timed_out", "retried", "raises at once"])
async def test_a_key_is_free_after_every_end(make_manager, end):
    """The next function of the key begins, the one that waited first."""
    manager = make_manager()
    event = asyncio.Event()

    async def work():
        if end == "raises at once":
            raise ValueError
        await event.wait()
        raise ValueError

    timeout = 0.001 if end == "timed_out" else None
    retry = Retry(on=ValueError, attempts=2, wait=0, jitter=0) if end == "retried" else None
    task = manager.submit(work, key="k", timeout=timeout, retry=retry)
    if end != "raises at once":
        waiting = manager.submit(after, event, "second", key="k", on_duplicate="queue_latest")
    await asyncio.sleep(0)
    if end == "cancelled":
        task.cancel()
    elif end != "timed_out":
        event.set()
    await asyncio.wait([task])
    event.set()
    if end != "raises at once":
        assert await waiting == "second"
    assert await manager.submit(after, event, "third", key="k") == "third"


async def test_a_key_that_waits_can_be_cancelled(make_manager):
    """And leaves room for another one."""
    manager = make_manager()
    event = asyncio.Event()
    first = manager.submit(after, event, 1, key="k")
    second = manager.submit(after, event, 2, key="k", on_duplicate="queue_latest")
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait([second])
    third = manager.submit(after, event, 3, key="k", on_duplicate="queue_latest")
    event.set()
    assert await asyncio.gather(first, third) == [1, 3]


async def test_a_refused_function_leaves_no_key(make_manager):
    """The manager is full, or an argument is wrong."""
    manager = make_manager(max_pending_tasks=1)
    event = asyncio.Event()
    task = manager.create_task(event.wait())
    with pytest.raises(TaskRejectedError):
        manager.submit(after, event, 1, key="k")
    event.set()
    await task
    with pytest.raises(TypeError):
        manager.submit(after, key="k")
    assert await manager.submit(after, event, 1, key="k") == 1


async def test_a_refused_replacement_replaces_nothing(make_manager):
    """The one that runs and the one that waits stay."""
    manager = make_manager(max_pending_tasks=2)
    event = asyncio.Event()
    first = manager.submit(after, event, 1, key="k")
    second = manager.submit(after, event, 2, key="k", on_duplicate="queue_latest")
    with pytest.raises(TaskRejectedError):
        manager.submit(after, event, 3, key="k", on_duplicate="replace")
    event.set()
    assert await asyncio.gather(first, second) == [1, 2]


async def test_a_held_task_waits_for_its_concurrency_slot_too(make_manager):
    """Its key is free before there is a slot."""
    manager = make_manager(max_concurrency=1)
    work = recorder()
    event = asyncio.Event()
    first = manager.submit(work, 1, event, key="k")
    second = manager.submit(work, 2, key="k", on_duplicate="queue_latest")
    other = manager.submit(work, 3)
    await asyncio.sleep(0)
    event.set()
    assert await asyncio.gather(first, second, other) == [1, 2, 3]
    assert manager.stats()["queued"] == 0


async def test_shutdown_ends_what_a_key_holds(make_manager):
    """Drained in order, or cancelled together."""
    manager = make_manager()
    work = recorder()
    tasks = [manager.submit(work, number, key="k", on_duplicate="queue_latest") for number in (1, 2)]
    await manager.shutdown(drain=5)
    assert [task.result() for task in tasks] == [1, 2]
    manager = make_manager()
    tasks = [manager.submit(forever, key="k", on_duplicate="queue_latest") for number in (1, 2)]
    await manager.shutdown()
    assert [task.cancelled() for task in tasks] == [True, True]


def test_each_loop_has_keys_of_its_own(make_manager):
    """A closed loop leaves no key behind."""
    manager = make_manager()

    async def leave():
        manager.submit(forever, key="k")
        await asyncio.sleep(0)

    async def again():
        event = asyncio.Event()
        event.set()
        return await manager.submit(after, event, 2, key="k", on_duplicate="skip")

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    assert asyncio.run(again()) == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"key": []}, "hashable"),
        ({"key": "k", "on_duplicate": "drop"}, "on_duplicate must be one of"),
        ({"on_duplicate": "skip"}, "needs a key"),
        ({"keep_result": 0}, "keep_result"),
        ({"keep_result": float("inf")}, "keep_result"),
        ({"keep_result": -1}, "keep_result"),
    ],
    ids=repr,
)
async def test_wrong_options_are_refused(make_manager, options, text):
    """Before anything starts."""
    manager = make_manager()
    with pytest.raises(InvalidOptionError, match=text):
        manager.submit(forever, **options)
    assert manager.stats()["started"] == 0


def test_a_key_needs_a_loop(make_manager):
    """As create_task does."""
    with pytest.raises(NoRunningLoopError):
        make_manager().submit(forever, key="k")


def held_bytes(manager, count, **options):
    """Return the traced bytes of tasks that wait, each with a key of its own if there is one to be."""

    async def main():
        event = asyncio.Event()

        async def work():
            await event.wait()

        async def hold(numbers):
            for number in numbers:
                manager.submit(work, **dict.fromkeys(options, number))
            await asyncio.sleep(0)

        await hold(range(10**6, 10**6 + 100))
        gc.collect()
        tracemalloc.start()
        try:
            await hold(range(count))
            gc.collect()
            held = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        event.set()
        await manager.wait_for_all()
        return held

    return asyncio.run(main())


def test_many_keys_cost_what_their_records_cost(make_manager):
    """An entry of a dict, the key, and the record of the function: no second table, no task in between; and all goes.

    A million keys take a million times as much, so this holds 20,000.
    """
    manager = make_manager()
    count = 20_000
    plain = held_bytes(manager, count) / count
    keyed = held_bytes(manager, count, key=True) / count
    assert keyed - plain < 600, (plain, keyed)
    assert not any(records.keys for records in manager._by_loop.values() if hasattr(records, "keys"))
    assert manager.get_task_count() == 0
