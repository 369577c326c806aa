"""Each public call with each of its allocations failing: no failed call harms the next one."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging

import pytest
from allocations import NEEDS_TESTCAPI, Sweep, call_failing, locked_elsewhere, others_errors, step_failing
from event_tools import assert_counters_add_up
from work import value, wait_until

from bgtasks.events import Publisher
from bgtasks.events.sinks.memory import MemorySink
from bgtasks.events.spool._syncing import Syncer
from bgtasks.executor import AsyncBackgroundExecutor, BackgroundExecutor

# Not on a loop with eager tasks: a constructor that fails there leaves asyncio's current task wrong. Nor on uvloop: it
# loses the wake-up of a task whose handle it cannot make.
pytestmark = [NEEDS_TESTCAPI, pytest.mark.loops("asyncio")]

ENDS = ("completed", "failed", "cancelled", "timed_out", "abandoned")


@pytest.fixture(autouse=True)
def _no_lock_left():
    """Fail the test if another thread finds a lock locked."""
    yield
    assert locked_elsewhere() == []


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """Log nothing: logging swallows failed allocations by itself."""
    with caplog.at_level(logging.CRITICAL + 1, logger="bgtasks"):
        yield


def without_debug():
    """Leave the loop's debug mode: it records stacks by generators, and CPython crashes where one cannot be made."""
    asyncio.get_running_loop().set_debug(False)


async def busy():
    """Run until cancelled; without a future, whose cancellation may fail half-way inside asyncio."""
    while True:
        await asyncio.sleep(0)


async def assert_serves(manager):
    """Fail unless the next tasks run, the next timeout comes, and counters close."""
    ran = []

    async def work():
        ran.append(True)

    manager.fire(work())
    late = manager.create_task(asyncio.sleep(3600), timeout=0.001)
    soon = manager.create_task(work(), timeout=3600)
    await asyncio.wait([soon, late], timeout=20)
    assert late.cancelled()
    async with asyncio.timeout(20):
        await manager.wait_for_all(return_exceptions=True)
    assert len(ran) == 2
    stats = manager.stats()
    assert stats["started"] == sum(stats[end] for end in ENDS)
    assert manager.get_task_count() == 0


# Made beforehand: what fails is to be the call, not its arguments.
CONTEXT = {"a": 1}

STARTS = {
    "create_task": lambda manager, coro: manager.create_task(coro, name="swept", timeout=3600.0, context=CONTEXT),
    "fire": lambda manager, coro: manager.fire(coro, name="swept", timeout=3600.0, context=CONTEXT),
    "create_task_threadsafe": lambda manager, coro: manager.create_task_threadsafe(coro, name="swept", timeout=3600.0),
    "unnamed": lambda manager, coro: manager.create_task(coro),
    "unnamed fire": lambda manager, coro: manager.fire(coro),
    "task_factory": lambda manager, coro: manager.task_factory(asyncio.get_running_loop(), coro, name="swept"),
}


OPTIONS = ({}, {"max_concurrency": 1}, {"history": 3, "max_pending_tasks": 10}, {"track_origin": True})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("start", STARTS)
async def test_a_start_that_fails_leaves_nothing_and_the_next_ones_run(make_manager, loop_errors, start, options):
    """The coroutine is closed, or runs if the call returned; what comes later runs, and counters close."""
    without_debug()
    manager = make_manager(**options)
    ran = []

    async def work():
        ran.append(True)

    async with manager:
        await assert_serves(manager)
        sweep = Sweep()
        for number in sweep:
            coro, error = work(), None
            try:
                call_failing(number, STARTS[start], manager, coro)
            except (MemoryError, RuntimeError) as caught:
                # A lock that cannot be made is a RuntimeError.
                error = caught
                if start == "task_factory":
                    # The dict of its options is made before it begins.
                    coro.close()
            sweep.meet(error)
            await assert_serves(manager)
            await asyncio.sleep(0)
            assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED, number
            del coro
            assert len(ran) == (error is None), number
            ran.clear()
            assert others_errors(loop_errors) == []


@pytest.mark.parametrize("limit", [None, 2])
async def test_a_spawn_that_fails_leaves_nothing(make_manager, loop_errors, limit):
    """Also one that waits for capacity: its place goes to the next."""
    without_debug()
    manager = make_manager(max_pending_tasks=limit)
    await assert_serves_spawned(manager)
    for step in range(2 if limit else 1):
        sweep = Sweep()
        # The first allocation is that of the frame, before the call has begun.
        for number in sweep:
            coro, error = value(), None
            tasks = [manager.create_task(asyncio.sleep(0)) for _ in range(limit or 0)]
            try:
                await asyncio.wait_for(step_failing(number, step, manager.spawn(coro, name="swept")), 20)
            except MemoryError as caught:
                error = caught
                coro.close()
            sweep.meet(error)
            await asyncio.gather(*tasks)
            await assert_serves_spawned(manager)
            assert others_errors(loop_errors) == []


@pytest.mark.parametrize("names", [None, ("swept", "other")])
async def test_a_wait_that_fails_leaves_nothing(make_manager, loop_errors, names):
    """Neither the tasks nor later waits notice."""
    without_debug()
    manager = make_manager()
    for step in range(2):
        sweep = Sweep()
        for number in sweep:
            release, error = asyncio.Event(), None
            task = manager.create_task(release.wait(), name="swept")
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(release.set)
            try:
                await step_failing(number, step, manager.wait_for_all(20, names=names))
            except MemoryError as caught:
                error = caught
            sweep.meet(error)
            assert await asyncio.wait_for(task, 20)
            async with asyncio.timeout(20):
                await manager.wait_for_all(names=names)
            assert manager.get_task_count() == 0
            assert manager._idle._waits == manager._idle._named_waits == set()
            assert manager._observers.all() == ()
            assert others_errors(loop_errors) == []


async def assert_serves_spawned(manager):
    """Fail unless tasks are spawned."""
    async with asyncio.timeout(20):
        assert await (await manager.spawn(value(3))) == 3
        await manager.wait_for_all()
    assert manager.get_task_count() == 0


async def test_a_submit_that_fails_leaves_nothing_for_the_block_to_wait_for(make_manager, loop_errors):
    """AsyncBackgroundExecutor, in the loop's thread."""
    without_debug()
    manager = make_manager()
    sweep = Sweep()
    for number in sweep:
        error = None
        async with asyncio.timeout(20), AsyncBackgroundExecutor(manager=manager, max_concurrency=2) as submit:
            assert await submit(value, 1, __next_tick__=True) == 1
            try:
                call_failing(number, submit, value, 2, __name__="swept", __timeout__=3600.0, __next_tick__=True)
            except MemoryError as caught:
                error = caught
            sweep.meet(error)
            assert await submit(value, 3, __next_tick__=True) == 3
        assert manager.get_task_count() == 0
        assert others_errors(loop_errors) == []


def test_a_function_that_cannot_be_submitted_leaves_nothing_for_the_block_to_wait_for(make_manager):
    """BackgroundExecutor: enrolled and never queued, it would keep its block from ending."""
    manager = make_manager()
    sweep = Sweep()
    for number in sweep:
        error = None
        with BackgroundExecutor(manager=manager, max_concurrency=1) as submit:
            # The thread starts here: an allocation that fails while CPython starts one hangs.
            assert submit(pow, 2, 3).result(20) == 8
            try:
                call_failing(number, submit, pow, 2, 4, __name__="swept")
            except MemoryError as caught:
                error = caught
            sweep.meet(error)
            assert submit(pow, 2, 5).result(20) == 32
        assert manager.get_task_count() == 0
    stats = manager.stats()
    assert stats["started"] == sum(stats[end] for end in ENDS)


async def test_a_shutdown_that_fails_can_be_called_again(make_manager, loop_errors):
    """It refuses new work meanwhile; the second call ends what the first one left."""
    without_debug()
    for step in range(2):
        sweep = Sweep()
        for number in sweep:
            manager, error = make_manager(), None
            for _ in range(3):
                manager.create_task(busy(), timeout=3600)
            await asyncio.sleep(0)
            try:
                await step_failing(number, step, manager.shutdown(timeout=20))
            except MemoryError as caught:
                error = caught
            sweep.meet(error)
            stats = await manager.shutdown(timeout=20)
            assert stats["remaining_tasks"] == 0
            assert manager.get_task_count() == 0
            assert manager.stats()["cancelled"] == 3
            assert others_errors(loop_errors) == []


# -- events ---------------------------------------------------------------------------------------------------------


def memory_publisher():
    """Return a publisher into memory."""
    return Publisher(MemorySink(), linger=0.001)


async def assert_publishes(publisher):
    """Fail unless the next event arrives, and with it all that was accepted before."""
    assert publisher.emit({"later": True})
    report = await publisher.flush(20)
    assert report["status"] == "flushed"
    stats = publisher.stats()
    assert_counters_add_up(stats)
    assert stats["delivered"] == len(publisher.sink.events) == stats["accepted"]


@pytest.mark.parametrize("is_first", [True, False])
async def test_an_emit_that_fails_leaves_a_publisher_that_delivers(queue_of_twin, loop_errors, is_first):
    """Also where it is the flusher's start, or its notification, that fails."""
    without_debug()
    publisher = memory_publisher()
    for number in range(60):
        await assert_publishes(publisher)
        if is_first:
            await publisher.close()
            publisher = memory_publisher()
        with contextlib.suppress(MemoryError):
            # One that was accepted says so, whatever failed behind it.
            assert call_failing(number, publisher.emit, {"swept": number})
        await assert_publishes(publisher)
        assert others_errors(loop_errors) == []
    await publisher.close()


CALLS = {
    "publish": lambda publisher: publisher.publish({"swept": True}),
    "durable": lambda publisher: publisher.publish({"swept": True}, durable=True),
    "flush": lambda publisher: publisher.flush(20),
}


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("call", CALLS)
async def test_a_publish_or_flush_that_fails_leaves_a_publisher_that_delivers(
    queue_of_twin, loop_errors, call, is_first
):
    """Whatever step of them fails."""
    without_debug()
    for step in range(2):
        publisher = memory_publisher()
        for number in range(60):
            if not is_first:
                await assert_publishes(publisher)
            publisher.emit({"before": number})
            with contextlib.suppress(MemoryError):
                await step_failing(number, step, CALLS[call](publisher))
            await assert_publishes(publisher)
            assert others_errors(loop_errors) == []
            if is_first:
                await publisher.close()
                publisher = memory_publisher()
        await publisher.close()


async def test_a_close_that_fails_can_be_called_again(queue_of_twin, loop_errors):
    """The second call delivers what the first one left."""
    without_debug()
    for step in range(2):
        for number in range(60):
            publisher = memory_publisher()
            for event in range(10):
                publisher.emit({"n": event})
            with contextlib.suppress(MemoryError):
                await step_failing(number, step, publisher.close(20))
            await publisher.close(20)
            stats = publisher.stats()
            assert_counters_add_up(stats)
            assert (stats["delivered"], stats["state"]) == (10, "closed")
            assert others_errors(loop_errors) == []


def test_a_syncer_whose_stop_fails_ends_and_syncs_what_was_committed(tmp_path):
    """The thread of the spool ends at the next stop, and another one starts with the next commit."""
    log = tmp_path / "log"
    log.write_bytes(b"commit")
    for number in range(20):
        syncer = Syncer()
        syncer.mark(log)
        with contextlib.suppress(MemoryError):
            call_failing(number, syncer.stop)
        syncer.stop()
        assert wait_until(lambda syncer=syncer: not syncer._is_running)
        syncer.mark(log)
        assert syncer._is_running
        syncer.stop()
        assert wait_until(lambda syncer=syncer: not syncer._is_running)
