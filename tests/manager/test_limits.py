"""The cap, spawn that waits for capacity, and concurrency slots."""

import asyncio
import inspect
import logging
import random
import threading
import time

import pytest
from work import after, failing, forever, until, value

import bgtasks
from bgtasks import ManagerClosedError, TaskRejectedError
from bgtasks._notifier import Notifier


async def test_create_task_raises_at_the_cap(make_manager):
    """With overflow="raise" the error says how to wait, and the coroutine is closed."""
    manager = make_manager(max_pending_tasks=2)
    manager.create_task(forever())
    manager.fire(forever())
    for start in (manager.create_task, manager.fire):
        coro = forever()
        with pytest.raises(TaskRejectedError, match=r"await spawn\(\)"):
            start(coro)
        assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
    assert (manager.stats()["started"], manager.dropped_count) == (2, 0)
    await manager.cancel_all()
    await manager.create_task(value())


async def test_fire_drops_at_the_cap(make_manager, caplog):
    """With overflow="drop_newest" fire returns False and counts the drop; many drops log one warning."""
    manager = make_manager(max_pending_tasks=1, overflow="drop_newest")
    assert manager.fire(forever()) is True
    coros = [forever() for _ in range(100)]
    for coro in coros:
        assert manager.fire(coro, name="dropped") is False
        assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
    assert manager.dropped_count == 100
    assert manager.stats()["dropped"] == 100
    # create_task returns a task, so it raises if there is none.
    with pytest.raises(TaskRejectedError):
        manager.create_task(forever())
    assert manager.dropped_count == 100
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "'dropped'" in caplog.records[0].getMessage()
    await manager.shutdown()


async def test_spawn_waits_for_capacity_in_order(make_manager):
    """Each task that ends admits one waiting spawn, in the order of the calls."""
    manager = make_manager(max_pending_tasks=2)
    events = [asyncio.Event() for _ in range(6)]
    started = []

    async def work(number):
        started.append(number)
        await events[number].wait()

    spawners = [asyncio.ensure_future(manager.spawn(work(number))) for number in range(6)]
    for number in range(4):
        await until(lambda expected=number + 2: len(started) == expected)
        assert manager.get_task_count() == 2
        events[number].set()
    for event in events:
        event.set()
    await asyncio.gather(*spawners)
    await manager.wait_for_all()
    assert started == [0, 1, 2, 3, 4, 5]


async def test_a_cancelled_spawn_passes_its_turn_on(make_manager):
    """A spawn that is cancelled while it waits closes its coroutine, and the next one is admitted."""
    manager = make_manager(max_pending_tasks=1)
    event = asyncio.Event()
    manager.create_task(after(event))
    coro = forever()
    first = asyncio.ensure_future(manager.spawn(coro))
    second = asyncio.ensure_future(manager.spawn(value("second")))
    await asyncio.sleep(0)
    event.set()
    await asyncio.sleep(0)
    first.cancel()
    task = await second
    assert await task == "second"
    await asyncio.wait([first])
    if first.cancelled():
        assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
    await manager.cancel_all()


async def test_a_spawn_that_waits_is_refused_by_shutdown(make_manager):
    """Shutdown raises ManagerClosedError in waiting spawns and closes their coroutines."""
    manager = make_manager(max_pending_tasks=1)
    manager.create_task(forever())
    coro = forever()
    waiting = asyncio.ensure_future(manager.spawn(coro))
    await asyncio.sleep(0)
    await manager.shutdown()
    with pytest.raises(ManagerClosedError):
        await waiting
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED


async def test_never_more_coroutines_run_than_allowed(make_manager):
    """Of a thousand tasks at most ten run at once, first come, first served."""
    manager = make_manager(max_concurrency=10)
    running, most, order = 0, 0, []

    async def work(number):
        nonlocal running, most
        running += 1
        most = max(most, running)
        order.append(number)
        await asyncio.sleep(0)
        running -= 1

    for number in range(1000):
        manager.create_task(work(number))
    assert manager.stats()["queued"] == 990
    assert {info["state"] for info in manager.get_task_info()} == {"queued", "running"}
    await manager.wait_for_all()
    assert most == 10
    assert order == list(range(1000))
    assert manager.stats()["queued"] == 0


async def test_slots_are_released_at_every_end(make_manager, caplog):
    """Cancelled, failed, timed-out and queued tasks release their slots."""
    manager = make_manager(max_concurrency=3)
    chance = random.Random(7)
    with caplog.at_level(logging.CRITICAL):
        for number in range(300):
            kind = chance.randrange(4)
            if kind == 0:
                manager.create_task(failing(ValueError(number)))
            elif kind == 1:
                manager.create_task(forever(), timeout=0.0005)
            elif kind == 2:
                manager.create_task(asyncio.sleep(0))
            else:
                task = manager.create_task(forever(), name="stopped")
                if chance.randrange(2):
                    await asyncio.sleep(0)
                task.cancel()
            assert manager.stats()["running"] <= 3
        await manager.wait_for_all(return_exceptions=True)
    tasks = [manager.create_task(forever()) for _ in range(4)]
    await asyncio.sleep(0)
    assert manager.stats()["running"] == 3
    assert manager.stats()["queued"] == 1
    await manager.cancel_all()
    assert all(task.cancelled() for task in tasks)


async def test_a_queued_task_that_is_cancelled_never_runs(make_manager):
    """Its coroutine is closed, and the next queued task moves up."""
    manager = make_manager(max_concurrency=1)
    event = asyncio.Event()
    manager.create_task(after(event))
    coro = failing(AssertionError("must not run"))
    queued = manager.create_task(coro, name="queued")
    behind = manager.create_task(value("behind"))
    await asyncio.sleep(0)
    queued.cancel()
    await asyncio.wait([queued])
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
    event.set()
    assert await behind == "behind"


async def test_the_timeout_of_a_queued_task_counts_from_its_start(make_manager):
    """Waiting for a slot does not use up the timeout, and the age counts from the start."""
    manager = make_manager(max_concurrency=1)
    event = asyncio.Event()
    manager.create_task(after(event))
    queued = manager.create_task(asyncio.sleep(0, "done"), timeout=0.01)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await until(lambda: loop.time() - begun > 0.03)
    event.set()
    assert await queued == "done"


async def test_a_fired_task_waits_for_a_slot(make_manager):
    """Under max_concurrency, fire queues like create_task."""
    manager = make_manager(max_concurrency=1)
    order = []

    async def work(number):
        order.append(number)
        await asyncio.sleep(0)

    for number in range(5):
        manager.fire(work(number))
    await manager.wait_for_all()
    assert order == [0, 1, 2, 3, 4]


async def test_spawn_at_the_cap_of_a_draining_manager_is_refused(make_manager):
    """A draining manager at its cap refuses a spawn, with a named error and a closed coroutine."""
    manager = make_manager(max_pending_tasks=1, overflow="drop_newest")
    draining = asyncio.Event()
    refused = []

    async def spawning():
        await draining.wait()
        try:
            await manager.spawn(value())
        except TaskRejectedError as error:
            refused.append(error)

    manager.create_task(spawning())
    closing = asyncio.ensure_future(manager.shutdown(drain=5.0))
    await until(lambda: manager._shutdown.phase == "draining")
    draining.set()
    await closing
    assert len(refused) == 1


@pytest.mark.parametrize("cap", [1, 3])
async def test_a_spawn_that_waits_for_itself_is_refused(make_manager, cap):
    """When every task in flight waits in spawn, none can end: the last one gets an error, and the others go on."""
    manager = make_manager(max_pending_tasks=cap)
    refused = []

    async def spawning():
        await asyncio.sleep(0)
        try:
            await manager.spawn(value())
        except TaskRejectedError as error:
            refused.append(str(error))

    for _ in range(cap):
        manager.create_task(spawning(), name="parent")
    await asyncio.wait_for(manager.wait_for_all(), 5)
    assert len(refused) == 1
    assert f"(max_pending_tasks={cap}) wait in spawn()" in refused[0]
    assert "the calling 'parent'" in refused[0]
    assert manager.stats()["completed"] == 2 * cap - 1


async def test_a_spawn_inside_of_a_task_waits_for_others(make_manager):
    """While one task in flight can end, a task at the cap waits for capacity as any caller does."""
    manager = make_manager(max_pending_tasks=2)
    release = asyncio.Event()
    results = []

    async def spawning():
        await asyncio.sleep(0)
        results.append(await (await manager.spawn(value(7))))

    manager.create_task(spawning())
    manager.create_task(after(release))
    await asyncio.sleep(0.005)
    assert not results
    release.set()
    await manager.wait_for_all()
    assert results == [7]


async def test_a_spawn_that_waits_for_tasks_in_its_own_slot_is_refused(make_manager):
    """Queued tasks cannot end before the one that holds their slot; one that has its slot already can."""
    manager = make_manager(max_pending_tasks=2, max_concurrency=1)
    results = []

    async def spawning():
        manager.create_task(value(1))
        with pytest.raises(TaskRejectedError, match="would wait for itself"):
            await manager.spawn(value(2))
        results.append("refused")

    await manager.create_task(spawning())
    assert results == ["refused"]
    await manager.wait_for_all()

    manager = make_manager(max_pending_tasks=3, max_concurrency=2)
    release = asyncio.Event()

    async def ends():
        await release.wait()
        manager.create_task(value("begun")).add_done_callback(lambda task: results.append(task.result()))

    async def spawns():
        await release.wait()
        await asyncio.sleep(0)
        results.append(await (await manager.spawn(value("spawned"))))

    manager.create_task(ends())
    manager.create_task(spawns())
    manager.create_task(value())
    release.set()
    await asyncio.wait_for(manager.wait_for_all(return_exceptions=True), 5)
    assert "spawned" in results


async def test_a_function_in_a_thread_can_end(make_manager):
    """A task that waits for capacity which a function in a thread holds is not refused."""
    manager = make_manager(max_pending_tasks=2)
    release = threading.Event()
    with bgtasks.BackgroundExecutor(manager=manager) as submit:
        submit(release.wait)

        async def spawning():
            asyncio.get_running_loop().call_later(0.005, release.set)
            return await (await manager.spawn(value(7)))

        assert await asyncio.wait_for(manager.create_task(spawning()), 5) == 7


async def test_a_spawn_whose_capacity_is_taken_by_another_task_waits_on(make_manager):
    """Between its notification and its next step another task may start: it then waits for the end of that one."""
    manager = make_manager(max_pending_tasks=1)
    first, second = asyncio.Event(), asyncio.Event()
    manager.create_task(after(first))
    spawning = asyncio.ensure_future(manager.spawn(value(7)))
    await until(lambda: manager._capacity_wanted)
    first.set()
    asyncio.get_running_loop().call_soon(lambda: manager.create_task(after(second)))
    await asyncio.sleep(0.005)
    assert not spawning.done()
    second.set()
    assert await (await asyncio.wait_for(spawning, 5)) == 7


async def test_a_spawn_on_another_loop_that_comes_while_capacity_is_passed_on_is_notified(make_manager, monkeypatch):
    """The end of a task sees every coroutine that waits, those that come to wait in this moment included."""
    manager = make_manager(max_pending_tasks=1)
    release = asyncio.Event()
    spawned = []

    def spawn_elsewhere():
        asyncio.run(spawn())

    async def spawn():
        spawned.append(await (await asyncio.wait_for(manager.spawn(value(7)), 5)))

    def look(notifier):
        waits = bool(notifier._waiting)
        if not waits and not threads:
            # Another task takes the capacity, and a thread comes to wait for it.
            manager.create_task(after(release))
            threads.append(threading.Thread(target=spawn_elsewhere))
            threads[0].start()
            while not notifier._waiting:
                time.sleep(0.001)
        return waits

    threads = []
    monkeypatch.setattr(Notifier, "__bool__", look)
    manager._capacity_wanted = True
    await manager.create_task(value())
    release.set()
    await until(lambda: not threads[0].is_alive())
    assert spawned == [7]


def test_a_slot_freed_while_a_task_is_queued_is_its_own(make_manager):
    """A loop in another thread frees the only slot while the task that is to wait for it gets its turn."""
    manager = make_manager(max_concurrency=1)
    holds, frees, freed = threading.Event(), threading.Event(), threading.Event()

    async def hold():
        holds.set()
        while not frees.is_set():
            await asyncio.sleep(0.001)

    async def hold_elsewhere():
        await manager.create_task(hold())
        freed.set()

    class Loop(asyncio.SelectorEventLoop):
        def create_future(self):
            if holds.is_set() and not frees.is_set():
                frees.set()
                # The other thread may have to wait until this task is queued.
                freed.wait(0.2)
            return super().create_future()

    async def queue():
        async with asyncio.timeout(10):
            return await manager.create_task(value(1))

    thread = threading.Thread(target=asyncio.run, args=(hold_elsewhere(),))
    thread.start()
    assert holds.wait(10)
    with asyncio.Runner(loop_factory=Loop) as runner:
        assert runner.run(queue()) == 1
    thread.join()
    stats = manager.stats()
    assert (stats["completed"], stats["queued"], stats["in_flight"]) == (2, 0, 0)
