"""Submitted functions that run again: one task, one id, one record, however many attempts."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import math
import weakref
from datetime import timedelta
from functools import partial

import pytest
from loops import VirtualLoop
from requirements import need
from work import until

from bgtasks import InvalidFunctionError, InvalidOptionError, Retry, TaskRejectedError, skip_retry_waits
from bgtasks.policies._retry import policy_of


def flaky(failures, error=ValueError):
    """Return a coroutine function that fails a number of times, with the list of its calls."""
    calls = []

    async def work(*args, **kwargs):
        calls.append((args, kwargs))
        await asyncio.sleep(0)
        if len(calls) <= failures:
            raise error(f"call {len(calls)}")
        return len(calls)

    work.calls = calls
    return work


def fast(**options):
    """Return a Retry that does not wait."""
    return Retry(**{"on": ValueError, "wait": 0, "jitter": 0, **options})


def on_virtual_loop(main):
    """Run a coroutine function on a loop with a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())


# -- attempts ----------------------------------------------------------------------------------------------------------


async def test_submit_runs_a_function_with_its_arguments(make_manager):
    """The result is that of the function, the name its qualified name."""
    manager = make_manager()
    work = flaky(0)
    task = manager.submit(work, 1, two=2)
    assert isinstance(task, asyncio.Task)
    assert manager.get_task_info()[0]["name"] == work.__qualname__
    assert await task == 1
    assert work.calls == [((1,), {"two": 2})]


@pytest.mark.parametrize("limit", [None, 1])
async def test_all_attempts_are_one_task(make_manager, limit):
    """The same id, one start and one end in the counters, each further attempt counted."""
    manager = make_manager(max_concurrency=limit)
    work = flaky(2)
    task = manager.submit(work, "x", name="w", retry=fast())
    task_id = manager.get_task_id(task)
    assert await task == 3
    assert [args for args, _ in work.calls] == [("x",)] * 3
    stats = manager.stats()
    assert (stats["started"], stats["completed"], stats["retried"]) == (1, 1, 2)
    assert task_id is not None


async def test_each_failed_attempt_is_a_warning_and_the_last_one_an_error(make_manager, caplog):
    """One record per attempt; the error lists the earlier ones; on_error is called once."""
    seen = []
    manager = make_manager(on_error=lambda info, error: seen.append((info["state"], info["attempt"], str(error))))
    with pytest.raises(ValueError, match="call 3"):
        await manager.submit(flaky(5), name="w", retry=fast(attempts=3))
    levels = [record.levelno for record in caplog.records if record.name == "bgtasks"]
    assert levels == [logging.WARNING, logging.WARNING, logging.ERROR]
    assert (
        caplog.records[-1]
        .getMessage()
        .endswith("ValueError: call 3 (attempt 3; before: ValueError: call 1; ValueError: call 2)")
    )
    assert seen == [("failed", 3, "call 3")]


async def test_another_error_is_not_retried(make_manager):
    """Only what ``on`` names."""
    manager = make_manager()
    work = flaky(5, KeyError)
    with pytest.raises(KeyError):
        await manager.submit(work, retry=fast(on=(ValueError, OSError)))
    assert len(work.calls) == 1


def test_a_waiting_task_says_so(make_manager):
    """State, attempt and the seconds left; it counts as waiting, not as running."""

    async def main():
        manager = make_manager()
        task = manager.submit(flaky(1), retry=Retry(on=ValueError, wait=4, jitter=0))
        await asyncio.sleep(1)
        (info,) = manager.get_task_info()
        assert (info["state"], info["attempt"], info["next_attempt_seconds"]) == ("waiting", 1, pytest.approx(3))
        stats = manager.stats()
        assert (stats["waiting"], stats["running"], stats["in_flight"]) == (1, 0, 1)
        begun = asyncio.get_running_loop().time()
        assert await task == 2
        assert 3 <= asyncio.get_running_loop().time() - begun < 3.01

    on_virtual_loop(main)


def test_the_time_left_is_that_of_the_attempt(make_manager):
    """A waiting task has the whole timeout before it; an attempt has what is left since its begin."""
    failures = [ValueError()]

    async def work():
        if failures:
            raise failures.pop()
        await asyncio.sleep(5)

    async def main():
        manager = make_manager()
        task = manager.submit(work, timeout=10, retry=Retry(on=ValueError, wait=4, jitter=0))
        left = []
        for _ in range(2):
            await asyncio.sleep(3)
            left.append(manager.get_task_info()[0]["time_left_seconds"])
        assert left == [10, pytest.approx(8, abs=0.01)]
        await task

    on_virtual_loop(main)


def test_a_counter_of_waiting_tasks_never_drifts(make_manager):
    """Whether the next attempt begins, waits for a slot, is cancelled, or is given up by shutdown."""

    async def main():
        manager = make_manager(max_concurrency=1)
        retry = Retry(on=ValueError, wait=4, jitter=0)
        cancelled, queued, _given_up = (manager.submit(flaky(1), retry=retry) for _ in range(3))
        await asyncio.sleep(1)
        assert manager.stats()["waiting"] == 3
        cancelled.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert manager.stats()["waiting"] == 2
        holder = manager.create_task(asyncio.sleep(5))
        await asyncio.sleep(4)
        stats = manager.stats()
        assert (stats["waiting"], stats["queued"], stats["running"]) == (0, 2, 1)
        await asyncio.wait([holder, queued])
        manager.submit(flaky(1), retry=retry)
        await asyncio.sleep(1)
        stats = manager.stats()
        assert (stats["waiting"], stats["queued"]) == (1, 0)
        await manager.shutdown()
        stats = manager.stats()
        assert (stats["waiting"], stats["queued"], stats["running"]) == (0, 0, 0)

    on_virtual_loop(main)


def test_a_wait_is_no_timer_and_no_task(make_manager):
    """A thousand waits share the timer of the wheel."""

    async def main():
        manager = make_manager()
        loop = asyncio.get_running_loop()
        tasks = [manager.submit(flaky(1), retry=Retry(on=ValueError, wait=4, jitter=1)) for _ in range(1000)]
        await asyncio.sleep(1)
        assert len([timer for timer in loop._scheduled if not timer.cancelled()]) == 1
        assert len(asyncio.all_tasks()) == 1001
        assert await asyncio.gather(*tasks) == [2] * 1000

    on_virtual_loop(main)


def test_a_timeout_is_that_of_one_attempt(make_manager, caplog):
    """Each attempt has its own; one that expires counts as TimeoutError, the last one ends the task."""

    async def main():
        manager = make_manager()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        retry = Retry(on=TimeoutError, attempts=3, wait=1, base=1, jitter=0)
        task = manager.submit(asyncio.sleep, 60, timeout=2.0, retry=retry)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert 8 <= loop.time() - begun < 8.02
        assert manager.stats()["timed_out"] == 1
        assert [record.levelname for record in caplog.records] == ["WARNING"] * 3 + ["ERROR"]
        assert caplog.records[-1].getMessage() == (
            "Background task 'sleep' timed out for the last time (attempt 3; before: TimeoutError: attempt 1 timed out "
            "after 2.0 seconds; TimeoutError: attempt 2 timed out after 2.0 seconds)"
        )

        attempts = []

        async def second_is_quick():
            attempts.append(loop.time())
            await asyncio.sleep(60 if len(attempts) == 1 else 1.5)
            return "done"

        task = manager.submit(second_is_quick, timeout=2.0, retry=retry)
        assert await task == "done"
        assert task.cancelling() == 0

    on_virtual_loop(main)


def test_no_attempt_begins_after_the_timeout_of_all(make_manager):
    """A wait that would end later is not begun."""

    async def main():
        manager = make_manager()
        work = flaky(100)
        task = manager.submit(work, retry=Retry(on=ValueError, attempts=None, timeout=10, wait=3, base=1, jitter=0))
        with pytest.raises(ValueError, match="call 4"):
            await task

    on_virtual_loop(main)


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["running", "waiting"])
async def test_a_cancellation_is_never_retried(make_manager, when):
    """Neither while an attempt runs nor between two."""
    manager = make_manager()
    work = flaky(1)
    task = manager.submit(work, retry=Retry(on=Exception, wait=60, jitter=0, max_wait=60))
    if when == "waiting":
        await until(lambda: manager.stats()["waiting"])
    else:
        await asyncio.sleep(0)
    assert manager.cancel(manager.get_task_id(task)) == 1
    with pytest.raises(asyncio.CancelledError):
        await task
    assert manager.stats()["cancelled"] == 1
    assert len(work.calls) <= 1


async def test_an_error_in_answer_to_a_cancellation_is_not_retried(make_manager):
    """Whoever cancels a task wants it to end."""
    manager = make_manager()
    calls = []

    async def stubborn():
        calls.append(1)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise ValueError("instead") from None

    task = manager.submit(stubborn, retry=fast())
    await until(lambda: calls)
    task.cancel()
    with pytest.raises(ValueError, match="instead"):
        await task
    assert calls == [1]


def test_shutdown_ends_a_wait_at_once(make_manager, caplog):
    """The drain does not sit out a wait: the task fails with the error of its last attempt, which is logged."""

    async def main():
        manager = make_manager(max_concurrency=1)
        loop = asyncio.get_running_loop()
        task = manager.submit(flaky(1), name="w", retry=Retry(on=ValueError, wait=300, max_wait=300, jitter=0))
        await asyncio.sleep(1)
        begun = loop.time()
        stats = await manager.shutdown(drain=60)
        assert loop.time() == begun
        assert (stats["status"], stats["remaining_tasks"]) == ("completed", 0)
        with pytest.raises(ValueError, match="call 1"):
            await task
        assert manager.stats()["failed"] == 1

    on_virtual_loop(main)
    assert "given up by shutdown after attempt 1" in caplog.records[-1].getMessage()


def test_no_attempt_begins_during_shutdown(make_manager):
    """A failure while shutdown drains is the last one."""

    async def main():
        manager = make_manager()
        work = flaky(1)

        async def slow():
            await asyncio.sleep(5)
            await work()

        task = manager.submit(slow, retry=fast())
        await asyncio.sleep(1)
        await manager.shutdown(drain=60)
        with pytest.raises(ValueError, match="call 1"):
            await task

    on_virtual_loop(main)


async def test_a_waiting_task_holds_no_concurrency_slot(make_manager):
    """Another task runs meanwhile, and the next attempt waits for its slot."""
    manager = make_manager(max_concurrency=1)
    release = asyncio.Event()
    task = manager.submit(flaky(1), retry=fast(wait=0.001))
    other = manager.create_task(release.wait())
    await until(lambda: [info["state"] for info in manager.get_task_info()] == ["queued", "running"])
    release.set()
    assert await task == 2
    assert await other


async def test_a_queued_attempt_is_given_up_by_shutdown(make_manager):
    """It waits for a slot instead of for a time; no attempt begins any more."""
    manager = make_manager(max_concurrency=1)
    task = manager.submit(flaky(1), retry=fast(wait=0.001))
    other = manager.create_task(asyncio.sleep(60))
    await until(lambda: [info["state"] for info in manager.get_task_info()] == ["queued", "running"])
    await manager.shutdown()
    with pytest.raises(ValueError, match="call 1"):
        await task
    assert other.cancelled()


async def test_a_finished_submission_keeps_nothing_alive(make_manager):
    """Arguments, results and errors of all attempts are freed without the cycle collector."""

    class Payload:
        pass

    async def work(payload):
        raise ValueError(payload)

    manager = make_manager(on_error=None)
    logging.getLogger("bgtasks").disabled = True
    gc.disable()
    try:
        payload = Payload()
        freed = weakref.ref(payload)
        task = manager.submit(work, payload, retry=fast())
        del payload
        await asyncio.wait([task])
        task.exception().__traceback__ = None
        del task
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert freed() is None
    finally:
        gc.enable()
        logging.getLogger("bgtasks").disabled = False


async def test_every_attempt_runs_in_the_same_context(make_manager):
    """A context variable that the first attempt sets is seen by the second."""
    variable = contextvars.ContextVar("variable", default=0)
    seen = []

    async def work():
        seen.append(variable.get())
        variable.set(len(seen))
        if len(seen) < 3:
            raise ValueError

    await make_manager().submit(work, retry=fast())
    assert seen == [0, 1, 2]


async def test_a_call_that_raises_is_a_failed_attempt(make_manager):
    """A function that returns a coroutine may fail before it does."""
    calls = []

    def work():
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("while called")
        return flaky(0 if len(calls) > 2 else 1)()

    assert await make_manager().submit(work, retry=fast()) == 1
    assert len(calls) == 3


async def test_an_awaitable_object_is_a_result_too(make_manager):
    """As for executors."""

    class Later:
        def __await__(self):
            yield from asyncio.sleep(0).__await__()
            return 7

    assert await make_manager().submit(Later) == 7


# -- the rules ---------------------------------------------------------------------------------------------------------


def waits(retry, count=4, error=None):
    """Return the waits after the first failures."""
    return [retry.next_wait(error or ValueError(), attempt=number, elapsed=0.0) for number in range(1, count + 1)]


def test_waits_grow_up_to_the_longest():
    """Doubling by default, with a random part that the longest wait includes."""
    assert waits(Retry(on=ValueError, attempts=None, wait=1, max_wait=3, jitter=0)) == [1, 2, 3, 3]
    jittered = waits(Retry(on=ValueError, attempts=None, wait=1, max_wait=9, jitter=0.5))
    assert all(least <= wait <= least + 0.5 for wait, least in zip(jittered, (1, 2, 4, 8), strict=True))
    assert Retry(on=ValueError, attempts=None, jitter=0).next_wait(ValueError(), attempt=10**6, elapsed=0) == 5.0
    whole = Retry(on=ValueError, attempts=None, wait=1, base=2, jitter=0)
    assert whole.next_wait(ValueError(), attempt=10**6, elapsed=0) == 5.0


def test_a_function_decides():
    """It returns True, False, or the wait."""
    assert waits(Retry(on=lambda error: "again" in str(error), wait=1, jitter=0), 1, ValueError("again")) == [1]
    assert waits(Retry(on=lambda error: False), 1) == [None]
    assert waits(Retry(on=lambda error: timedelta(seconds=2)), 1) == [2.0]
    assert waits(Retry(on=lambda error: 0), 1) == [0.0]
    with pytest.raises(InvalidOptionError, match="must return True, False"):
        waits(Retry(on=lambda error: "soon"), 1)


async def test_a_function_that_raises_ends_the_attempts(make_manager, loop_errors):
    """Its error goes to the loop's exception handler, the failure of the task to its holder."""
    manager = make_manager()

    def broken(error):
        raise RuntimeError("in the rule")

    with pytest.raises(ValueError, match="call 1"):
        await manager.submit(flaky(1), retry=fast(on=broken))
    assert [str(context["exception"]) for context in loop_errors] == ["in the rule"]
    loop_errors.clear()


async def test_a_policy_of_the_program_is_asked(make_manager):
    """Any object with ``next_wait``."""

    class Twice:
        def next_wait(self, error, *, attempt, elapsed):
            return 0.0 if attempt < 2 else None

    work = flaky(5)
    with pytest.raises(ValueError, match="call 2"):
        await make_manager().submit(work, retry=Twice())


def test_a_tenacity_object_is_asked():
    """Its retry, stop and wait mean what they mean there."""
    tenacity = need("tenacity")
    policy = policy_of(
        tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(ValueError),
            stop=tenacity.stop_after_attempt(3),
            wait=tenacity.wait_incrementing(start=1, increment=2),
        )
    )
    assert waits(policy) == [1.0, 3.0, None, None]
    assert waits(policy, 1, KeyError()) == [None]


def test_waits_are_skipped_in_tests(make_manager):
    """The attempts stay, the clock does not move."""

    async def main():
        loop = asyncio.get_running_loop()
        begun = loop.time()
        with skip_retry_waits():
            assert await make_manager().submit(flaky(2), retry=Retry(on=ValueError, wait=5, jitter=0)) == 3
        assert loop.time() == begun

    on_virtual_loop(main)


@pytest.mark.parametrize(
    "options",
    [
        {"on": ()},
        {"on": asyncio.CancelledError},
        {"on": (ValueError, SystemExit)},
        {"on": BaseException},
        {"on": int},
        {"on": None},
        {"on": "ValueError"},
        {"attempts": 0},
        {"attempts": 1.5},
        {"timeout": 0},
        {"timeout": math.inf},
        {"wait": -1},
        {"wait": math.nan},
        {"max_wait": math.inf},
        {"jitter": -0.1},
        {"base": 0.5},
        {"base": math.nan},
    ],
    ids=repr,
)
def test_a_wrong_rule_is_refused(options):
    """With the named error, which says what is wanted."""
    with pytest.raises(InvalidOptionError, match="must"):
        Retry(**{"on": ValueError, **options})


# -- refusals ----------------------------------------------------------------------------------------------------------


async def test_a_wrong_function_is_refused(make_manager):
    """Nothing is started; a coroutine object is closed."""
    manager = make_manager()
    for wrong in (None, 7):
        with pytest.raises(InvalidFunctionError, match="takes a coroutine function"):
            manager.submit(wrong)
    with pytest.raises(InvalidFunctionError, match=r"submit\(function, \*args\)"):
        manager.submit(flaky(0)())
    with pytest.raises(InvalidFunctionError, match="BackgroundExecutor runs this one"):
        manager.submit(partial(int, "7"))
    with pytest.raises(InvalidOptionError, match=r"bgtasks\.Retry\(on"):
        manager.submit(flaky(0), retry=3)
    with pytest.raises(InvalidOptionError, match=r"bgtasks\.Retry\(on"):
        manager.submit(flaky(0), retry=Retry)
    with pytest.raises(TypeError):
        manager.submit(asyncio.sleep, 1, 2, 3, 4)
    assert manager.stats()["started"] == 0


async def test_a_coroutine_object_is_not_retried(make_manager):
    """create_task names submit, and closes the coroutine."""
    manager = make_manager()
    with pytest.raises(InvalidOptionError, match=r"submit\(function, \*args, retry"):
        manager.create_task(flaky(0)(), retry=fast())
    assert manager.stats()["started"] == 0


async def test_a_full_manager_refuses_a_function(make_manager):
    """As create_task does; an attempt after the first needs no new admission."""
    manager = make_manager(max_pending_tasks=1)
    task = manager.submit(flaky(1), retry=fast())
    with pytest.raises(TaskRejectedError):
        manager.submit(flaky(0))
    assert await task == 2
