"""Retries of what an ``AsyncBackgroundExecutor`` runs."""

from __future__ import annotations

import asyncio

import pytest

from bgtasks import AsyncBackgroundExecutor, InvalidOptionError, Retry

RETRY = Retry(on=ValueError, attempts=3, wait=0.001, jitter=0)


def failing(times):
    """Return a coroutine function that fails so many times, and its calls."""
    calls = []

    async def work(value):
        calls.append(value)
        await asyncio.sleep(0)
        if len(calls) <= times:
            raise ValueError(f"call {len(calls)}")
        return value

    return work, calls


@pytest.mark.parametrize("limit", [None, 1])
async def test_a_failed_attempt_is_followed_by_another(make_manager, limit):
    """As one task; the block waits for the last attempt, and the others run meanwhile."""
    manager = make_manager()
    work, calls = failing(2)
    async with AsyncBackgroundExecutor(manager=manager, max_concurrency=limit) as submit:
        task = submit(work, 7, __retry__=RETRY)
        other = submit(asyncio.sleep, 0)
    assert (task.result(), calls, other.done()) == (7, [7, 7, 7], True)
    stats = manager.stats()
    assert (stats["completed"], stats["retried"], stats["failed"]) == (2, 2, 0)


async def test_the_last_failure_is_raised(make_manager):
    """Once, at the end of the block."""
    work, calls = failing(5)
    with pytest.raises(ValueError, match="call 3"):
        async with AsyncBackgroundExecutor(manager=make_manager()) as submit:
            submit(work, 7, __retry__=RETRY)
    assert len(calls) == 3


async def test_a_waiting_retry_is_cancelled_on_exit(make_manager):
    """It does not hold the block."""
    manager = make_manager()
    work, calls = failing(5)
    async with AsyncBackgroundExecutor(manager=manager) as submit:
        task = submit(work, 7, __retry__=Retry(on=ValueError, wait=50, max_wait=50), __cancel_on_exit__=True)
        while not manager.get_task_info(state="waiting"):
            await asyncio.sleep(0)
    assert (task.cancelled(), calls) == (True, [7])


async def test_a_submission_from_another_thread_is_retried(make_manager):
    """Its future gets the outcome of the last attempt."""
    work, calls = failing(2)
    async with AsyncBackgroundExecutor(manager=make_manager()) as submit:
        future = await asyncio.to_thread(submit, work, 7, __retry__=RETRY)
        assert await asyncio.wrap_future(future) == 7
    assert len(calls) == 3


async def test_a_wrong_policy_is_refused(make_manager):
    """The function is not called."""
    work, calls = failing(0)
    async with AsyncBackgroundExecutor(manager=make_manager()) as submit:
        with pytest.raises(InvalidOptionError, match="retry must be"):
            submit(work, 7, __retry__=3)
    assert calls == []
