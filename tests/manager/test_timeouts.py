"""A timeout counts: hooks, waits and blocks learn of it as a TimeoutError."""

import asyncio
import gc
import threading
import weakref

import pytest
from work import failing_later, forever, until

from bgtasks import AsyncBackgroundExecutor, InvalidOptionError


class Marker:
    """Something to refer to weakly, which an exception is not."""


async def test_on_error_and_wait_for_all_get_a_timeout_error(make_manager):
    """Whoever looks at failures sees a timeout, too; awaiting the task raises what the reference texts say."""
    reported = []
    manager = make_manager(on_error=lambda info, error: reported.append((info["name"], info["context"], error)))
    task = manager.create_task(forever(), name="slow", timeout=0.001, context={"order": 7})
    with pytest.raises(TimeoutError, match=r"'slow' timed out after 0\.001 seconds") as caught:
        await manager.wait_for_all()
    assert reported == [("slow", {"order": 7}, caught.value)]
    assert task.cancelled()
    manager.create_task(forever(), timeout=0.001)
    await manager.wait_for_all(return_exceptions=True)
    assert len(reported) == 2


async def test_a_cancellation_is_no_timeout(make_manager):
    """A task that somebody cancels before its timeout concerns nobody else."""
    reported = []
    manager = make_manager(on_error=lambda *details: reported.append(details))
    manager.create_task(forever(), timeout=60).cancel()
    await manager.wait_for_all()
    assert not reported


@pytest.mark.parametrize("max_concurrency", [None, 1])
@pytest.mark.parametrize("eager", [False, True])
async def test_a_manager_can_have_tasks_raise_it(make_manager, max_concurrency, eager):
    """With timeouts="raise" awaiting the task raises TimeoutError, from the cancellation; nothing is reported twice."""
    manager = make_manager(timeouts="raise", max_concurrency=max_concurrency)
    task = manager.create_task(forever(), name="slow", timeout=0.001, eager_start=eager)
    with pytest.raises(TimeoutError, match="'slow' timed out after") as caught:
        await task
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    assert not task.cancelled()
    assert manager.stats()["timed_out"] == 1
    # Nobody awaits this one: the loop must not report it, see the fixture of the loop's errors.
    manager.create_task(forever(), timeout=0.001)
    await until(lambda: not manager.get_task_count())
    # A cancellation and a failure are what they were.
    cancelled = manager.create_task(forever(), timeout=60)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    with pytest.raises(ValueError, match="own"):
        await manager.create_task(failing_later(ValueError("own")), timeout=60)


async def test_a_timeout_that_is_raised_leaves_no_cycle(make_manager):
    """Without the cycle collector the error goes with the last reference to its task."""
    manager = make_manager(timeouts="raise")
    gc.collect()
    gc.disable()
    try:
        task = manager.create_task(forever(), timeout=0.001)
        await asyncio.wait([task])
        task.exception().marker = marker = Marker()
        error = weakref.ref(marker)
        del task, marker
        for _ in range(3):
            await asyncio.sleep(0)
        assert error() is None
    finally:
        gc.enable()


def test_the_choice_is_checked(make_manager):
    """What is neither of the two is refused."""
    with pytest.raises(InvalidOptionError, match="timeouts must be"):
        make_manager(timeouts="ignore")


@pytest.mark.parametrize("timeouts", ["cancel", "raise"])
async def test_the_block_of_an_executor_raises_it(make_manager, timeouts):
    """The first failure in the order of submission is raised, a timeout among them."""
    manager = make_manager(timeouts=timeouts)

    async def block():
        async with AsyncBackgroundExecutor(manager=manager) as submit:
            submit(forever, __name__="slow", __timeout__=0.001)
            submit(failing_later, ValueError("second"))

    with pytest.raises(TimeoutError, match="'slow' timed out after"):
        await block()
    async with AsyncBackgroundExecutor(manager=manager) as submit:
        submit(forever, __timeout__=0.001, __reraise_on_exit__=False)


async def test_the_block_raises_the_timeout_of_a_task_from_another_thread(make_manager):
    """A task that another thread submitted is no exception."""

    async def block():
        async with AsyncBackgroundExecutor(manager=make_manager()) as submit:
            thread = threading.Thread(target=lambda: submit(forever, __name__="slow", __timeout__=0.001))
            thread.start()
            await asyncio.to_thread(thread.join)

    with pytest.raises(TimeoutError, match="'slow' timed out after"):
        await block()
