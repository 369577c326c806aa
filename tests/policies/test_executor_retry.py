"""Retries of what the executors run."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest
from work import wait_until

from bgtasks import AsyncBackgroundExecutor, BackgroundExecutor, InvalidOptionError, Retry

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


# -- functions in threads and processes --------------------------------------------------------------------------------


def failing_function(times, error=ValueError):
    """Return a function that fails so many times, and its calls."""
    calls = []

    def work(value):
        calls.append(value)
        if len(calls) <= times:
            raise error(f"call {len(calls)}")
        return value

    return work, calls


def counted_failure(path, times):
    """Fail so many times, in whichever process; the calls are the bytes of a file."""
    with Path(path).open("ab") as file:
        file.write(b".")
    calls = Path(path).stat().st_size
    if calls <= times:
        raise ValueError(f"call {calls}")
    return calls, os.getpid()


@pytest.mark.parametrize("seconds", [0, 0.001])
@pytest.mark.parametrize("limit", [1, 4])
def test_a_function_that_fails_runs_again(make_manager, caplog, limit, seconds):
    """As one task with one future, in any of the threads; each failure is a warning."""
    manager = make_manager()
    work, calls = failing_function(2)
    with BackgroundExecutor(manager=manager, max_concurrency=limit) as submit:
        future = submit(work, 7, __retry__=Retry(on=ValueError, wait=seconds, jitter=0))
        others = [submit(abs, -number) for number in range(20)]
    assert (future.result(), calls) == (7, [7, 7, 7])
    assert [other.result() for other in others] == list(range(20))
    stats = manager.stats()
    assert (stats["started"], stats["completed"], stats["retried"], stats["failed"]) == (21, 21, 2, 0)
    assert (stats["waiting"], stats["queued"], stats["running"]) == (0, 0, 0)
    assert [record.levelname for record in caplog.records if record.name == "bgtasks"] == ["WARNING"] * 2


def test_the_last_failure_of_a_function_is_raised(make_manager, caplog):
    """Once, at the end of the block; the error in the log quotes the attempts before it."""
    work, calls = failing_function(5)
    with pytest.raises(ValueError, match="call 3"), BackgroundExecutor(manager=make_manager()) as submit:
        future = submit(work, 7, __retry__=RETRY)
    assert len(calls) == 3
    assert str(future.exception()) == "call 3"
    assert "(attempt 3; before: ValueError: call 1; ValueError: call 2)" in caplog.text


def test_another_error_of_a_function_is_not_retried(make_manager):
    """Only what ``on`` names."""
    work, calls = failing_function(5, KeyError)
    with pytest.raises(KeyError), BackgroundExecutor(manager=make_manager()) as submit:
        submit(work, 7, __retry__=RETRY)
    assert len(calls) == 1


def test_a_function_between_two_attempts_says_so(make_manager):
    """It waits without a thread, and can be cancelled as one that has not begun."""
    manager = make_manager()
    work, calls = failing_function(5)
    with BackgroundExecutor(manager=manager, max_concurrency=1) as submit:
        future = submit(work, 7, __timeout__=30, __retry__=Retry(on=ValueError, wait=600, max_wait=600, jitter=0))
        assert wait_until(lambda: manager.stats()["waiting"] and manager.get_task_info()[0]["next_attempt_seconds"])
        (info,) = manager.get_task_info()
        assert (info["state"], info["attempt"], info["time_left_seconds"]) == ("waiting", 1, 30)
        assert 500 < info["next_attempt_seconds"] <= 600
        assert submit(abs, -1).result(10) == 1
        assert not future.running()
        assert future.cancel()
    assert (future.cancelled(), calls, manager.stats()["cancelled"]) == (True, [7], 1)


def test_the_end_of_a_block_cancels_a_function_that_waits(make_manager):
    """With ``__cancel_on_exit__``."""
    manager = make_manager()
    work, calls = failing_function(5)
    with BackgroundExecutor(manager=manager) as submit:
        retry = Retry(on=ValueError, wait=600, max_wait=600)
        future = submit(work, 7, __retry__=retry, __cancel_on_exit__=True)
        assert wait_until(lambda: manager.stats()["waiting"])
    assert (future.cancelled(), calls) == (True, [7])


async def test_shutdown_gives_up_a_function_that_waits(make_manager, caplog):
    """Its future has the last error at once; the log says why there was no other attempt."""
    manager = make_manager(drain_timeout=600)
    work, calls = failing_function(5)
    submit = BackgroundExecutor(manager=manager).open()
    future = submit(work, 7, __retry__=Retry(on=ValueError, wait=600, max_wait=600))
    while not manager.get_task_info()[0]["next_attempt_seconds"]:
        await asyncio.sleep(0.001)
    await manager.shutdown()
    assert (str(future.exception()), calls) == ("call 1", [7])
    assert "given up by shutdown after attempt 1" in caplog.text


def test_an_attempt_that_times_out_is_abandoned_and_followed_by_another(make_manager):
    """What the abandoned function returns or raises later is not the outcome; each attempt has the whole timeout."""
    manager = make_manager()
    release = threading.Event()
    calls = []

    def work():
        calls.append(threading.get_ident())
        if len(calls) == 1:
            release.wait(60)
            raise KeyError("too late")
        return len(calls)

    with BackgroundExecutor(manager=manager, max_concurrency=1) as submit:
        retry = Retry(on=TimeoutError, wait=0.001, jitter=0)
        future = submit(work, __timeout__=1.0, __retry__=retry)
        assert future.result(60) == 2
        release.set()
    stats = manager.stats()
    assert (stats["completed"], stats["timed_out"], stats["retried"]) == (1, 0, 1)
    assert len(set(calls)) == 2


def test_the_last_attempt_that_times_out_is_the_outcome(make_manager, caplog):
    """It counts as timed out, and the future fails with ``TimeoutError``."""
    manager = make_manager()
    release = threading.Event()
    with BackgroundExecutor(manager=manager) as submit:
        retry = Retry(on=TimeoutError, attempts=2, wait=0, jitter=0)
        future = submit(release.wait, 60, __timeout__=0.05, __retry__=retry, __reraise_on_exit__=False)
        with pytest.raises(TimeoutError):
            future.result(60)
        release.set()
    stats = manager.stats()
    assert (stats["timed_out"], stats["retried"], stats["failed"]) == (1, 1, 0)


def test_many_functions_that_fail_share_few_threads(make_manager):
    """None is lost and none runs twice at once, while others are cancelled."""
    manager = make_manager()
    lock = threading.Lock()
    running, calls = set(), dict.fromkeys(range(300), 0)

    def work(number):
        with lock:
            assert number not in running
            running.add(number)
            calls[number] += 1
            attempt = calls[number]
        time.sleep(0)
        with lock:
            running.discard(number)
        if attempt <= number % 4:
            raise ValueError(number)
        return number

    with BackgroundExecutor(manager=manager, max_concurrency=4) as submit:
        retry = Retry(on=ValueError, attempts=4, wait=0.001, jitter=0.002)
        futures = [submit(work, number, __retry__=retry) for number in range(300)]
        for future in futures[::7]:
            future.cancel()
    for number, future in enumerate(futures):
        if not future.cancelled():
            assert (future.result(), calls[number]) == (number, number % 4 + 1)
    stats = manager.stats()
    assert stats["completed"] + stats["cancelled"] == 300
    assert (stats["waiting"], stats["queued"], stats["running"]) == (0, 0, 0)


def test_a_function_in_a_process_runs_again(make_manager, tmp_path):
    """In the same process, or in a new one if that has died."""
    manager = make_manager()
    with BackgroundExecutor(manager=manager, kind="processes", max_concurrency=1) as submit:
        future = submit(counted_failure, str(tmp_path / "calls"), 2, __retry__=RETRY)
        calls, pid = future.result(60)
    assert calls == 3
    assert pid != os.getpid()


def test_a_wrong_policy_of_a_function_is_refused(make_manager):
    """The function is not called, and nothing is left behind."""
    work, calls = failing_function(0)
    manager = make_manager()
    with BackgroundExecutor(manager=manager) as submit:
        with pytest.raises(InvalidOptionError, match="retry must be"):
            submit(work, 7, __retry__=3)
        assert manager.get_task_count() == 0
    assert calls == []
