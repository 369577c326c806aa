"""Several threads with one manager: threads hand over coroutines, and none is lost."""

import asyncio
import concurrent.futures
import inspect
import logging
import random
import threading

import pytest
from internals import release_closed_loops
from work import failing, forever, stubborn, value

from bgtasks import ManagerClosedError, NoRunningLoopError, TaskRejectedError


async def in_thread(function, *arguments):
    """Run a function in a thread and return what it returned or raised."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


def outcome(future):
    """Return the result of a future or the exception in it."""
    try:
        return future.result(timeout=30)
    except BaseException as error:
        return error


async def test_a_thread_hands_over_and_gets_the_outcome(make_manager, caplog):
    """Results, failures and cancellations reach the concurrent future."""
    async with make_manager() as manager:

        def hand_over():
            futures = [
                manager.create_task_threadsafe(value(5), name="fine", timeout=30, context={"a": 1}),
                manager.create_task_threadsafe(failing(ValueError("expected"))),
                manager.create_task_threadsafe(forever(), timeout=0.001),
            ]
            return [outcome(future) for future in futures]

        result, error, timed_out = await in_thread(hand_over)
    assert result == 5
    assert str(error) == "expected"
    assert type(timed_out).__name__ == "CancelledError"
    assert [manager.stats()[key] for key in ("completed", "failed", "timed_out")] == [1, 1, 1]


async def test_cancelling_the_future_cancels_the_task(make_manager):
    """A thread that cancels its future stops the task, before its start or after."""
    async with make_manager() as manager:
        started = threading.Event()

        async def work():
            started.set()
            await asyncio.Event().wait()

        def hand_over():
            future = manager.create_task_threadsafe(work())
            started.wait(30)
            assert future.cancel()
            unstarted = manager.create_task_threadsafe(value())
            unstarted.cancel()
            return future

        future = await in_thread(hand_over)
        await manager.wait_for_all()
        assert future.cancelled()
    assert manager.stats()["cancelled"] >= 1


async def test_errors_of_create_task_are_set_on_the_future(make_manager):
    """A bad timeout, a drop at the cap and a closed manager set errors on the future; the coroutine is closed."""
    async with make_manager(max_pending_tasks=1, overflow="drop_newest") as manager:
        manager.create_task(forever())
        coros = [forever(), forever(), forever()]

        def hand_over():
            return [
                outcome(manager.create_task_threadsafe(coros[0])),
                outcome(manager.create_task_threadsafe(coros[1], timeout=-1)),
            ]

        dropped, refused = await in_thread(hand_over)
        assert isinstance(dropped, TaskRejectedError)
        assert isinstance(refused, (ValueError, TaskRejectedError))
    closed = await in_thread(lambda: outcome(manager.create_task_threadsafe(coros[2])))
    assert isinstance(closed, ManagerClosedError)
    assert {inspect.getcoroutinestate(coro) for coro in coros} == {inspect.CORO_CLOSED}


def test_without_a_running_loop_the_call_raises(make_manager):
    """Without a running loop the call raises a named error and closes the coroutine."""
    manager = make_manager()
    closed = asyncio.new_event_loop()
    closed.close()
    for options, text in (({}, "knows no running event loop"), ({"loop": closed}, "closed")):
        coro = forever()
        with pytest.raises(NoRunningLoopError, match=text):
            manager.create_task_threadsafe(coro, **options)
        assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
    with pytest.raises(TypeError, match="call it"):
        manager.create_task_threadsafe(forever)


async def test_with_two_running_loops_one_must_be_named(make_manager):
    """With two running loops the error says to name one."""
    manager = make_manager()
    await manager.create_task(value())
    here = asyncio.get_running_loop()
    ready, release = threading.Event(), threading.Event()
    others = []

    async def elsewhere():
        await manager.create_task(value())
        others.append(asyncio.get_running_loop())
        ready.set()
        await asyncio.to_thread(release.wait, 30)

    thread = threading.Thread(target=asyncio.run, args=(elsewhere(),))
    thread.start()
    await in_thread(ready.wait, 30)

    async def where():
        return asyncio.get_running_loop()

    def hand_over():
        with pytest.raises(NoRunningLoopError, match="loop="):
            manager.create_task_threadsafe(where())
        return [outcome(manager.create_task_threadsafe(where(), loop=loop)) for loop in (here, others[0])]

    assert await in_thread(hand_over) == [here, others[0]]
    release.set()
    await in_thread(thread.join, 30)


def test_a_loop_closed_before_the_start_resolves_the_future(make_manager):
    """If the loop is closed before the start, the future gets an error when the manager releases the loop."""
    manager = make_manager()
    loop = asyncio.new_event_loop()
    coro = forever()
    future = manager.create_task_threadsafe(coro, loop=loop)
    loop.close()
    assert manager.get_task_info() == []
    release_closed_loops(manager)
    assert isinstance(future.exception(timeout=0), NoRunningLoopError)
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED


async def test_create_task_off_the_loop_names_the_threadsafe_call(make_manager):
    """In a thread without a loop, create_task names the right method and closes the coroutine."""
    manager = make_manager()
    coro = forever()

    def call():
        with pytest.raises(NoRunningLoopError, match=r"create_task_threadsafe\(\)"):
            manager.create_task(coro)

    await in_thread(call)
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED


def test_every_future_resolves_while_another_thread_shuts_down(make_manager):
    """Every future of the threads resolves, whenever the shutdown comes."""
    manager = make_manager()
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    handles, refusals = [], []

    async def main():
        async with manager:
            ready.set()
            await asyncio.sleep(0.02)
        # The loop must still run to refuse coroutines that were posted last.
        await asyncio.sleep(0.02)

    def spawn():
        ready.wait(30)
        for _ in range(300):
            try:
                handles.append(manager.create_task_threadsafe(asyncio.sleep(0.001), loop=loop))
            except NoRunningLoopError as error:
                refusals.append(error)

    threads = [threading.Thread(target=spawn) for _ in range(8)]
    for thread in threads:
        thread.start()
    loop.run_until_complete(main())
    for thread in threads:
        thread.join(30)
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    manager.get_task_info()
    assert len(handles) + len(refusals) == 2400
    assert all(handle.done() for handle in handles)


def test_counters_add_up_with_eight_loops_at_once(make_manager):
    """Eight threads with loops create, cancel and time out tasks while others query; no error occurs."""
    logging.disable(logging.CRITICAL)
    manager = make_manager(history=50)
    done = threading.Event()
    failures = []
    started = []

    async def work(chance):
        for _ in range(40):
            await asyncio.gather(*(one(chance) for _ in range(10)), return_exceptions=True)
        await manager.wait_for_all(timeout=0, return_exceptions=True)

    async def one(chance):
        kind = chance.randrange(6)
        started.append(kind)
        if kind == 0:
            await manager.create_task(value(), name="fine", timeout=5)
        elif kind == 1:
            await manager.create_task(failing(ValueError("expected")), name="fails")
        elif kind == 2:
            await manager.create_task(forever(), name="late", timeout=0.002)
        elif kind == 3:
            task = manager.create_task(stubborn(1, asyncio.Event()), name="stopped", timeout=60)
            await asyncio.sleep(0)
            while not task.done():
                task.cancel()
                await asyncio.sleep(0)
        elif kind == 4:
            manager.fire(asyncio.sleep(0), name="fired", timeout=5)
        else:
            await manager.create_task(asyncio.sleep(0.001), name="sleeps", eager_start=True)

    def run(seed):
        try:
            asyncio.run(work(random.Random(seed)))
        except BaseException as error:
            failures.append(error)

    def ask():
        try:
            while not done.is_set():
                for info in manager.get_task_info():
                    assert info["task_id"] > 0
                    assert info["age_seconds"] >= 0
                stats = manager.stats()
                assert stats["in_flight"] >= 0
                manager.get_history()
                manager.get_task_count()
                manager.cancel("unknown")
                assert isinstance(manager.get_task_info(), list)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    askers = [threading.Thread(target=ask) for _ in range(2)]
    try:
        for thread in workers + askers:
            thread.start()
        for thread in workers:
            thread.join(100)
        done.set()
        for thread in askers:
            thread.join(30)
    finally:
        logging.disable(logging.NOTSET)
    assert not failures
    assert manager.stats()["started"] == len(started) == 3200


async def test_a_future_that_is_cancelled_before_its_start_ends_the_waits_for_it(make_manager):
    """concurrent.futures.wait and as_completed return for it, as they do for a future of a pool."""
    async with make_manager() as manager:
        future = manager.create_task_threadsafe(forever())
        future.cancel()
        done, _ = await in_thread(lambda: concurrent.futures.wait([future], timeout=5))
    assert done == {future}
