"""AsyncBackgroundExecutor: submission, limits, failures, threads and the end of the block."""

import asyncio
import concurrent.futures
import contextvars
import gc
import logging
import sys
import threading
import weakref
from typing import Any, ClassVar

import pytest
from work import after, failing, failing_later, forever, stubborn, until, value

from bgtasks import (
    AsyncBackgroundExecutor,
    ExecutorClosedError,
    InvalidFunctionError,
    InvalidOptionError,
    InvalidTimeoutError,
    ManagerClosedError,
    NoRunningLoopError,
    TaskRejectedError,
)

variable = contextvars.ContextVar("variable", default="unset")


@pytest.fixture
def make(make_manager):
    """Give a maker of executors on managers of the twin."""

    def make(config=None, *, history=0, **options):
        return AsyncBackgroundExecutor(config, manager=make_manager(history=history), **options)

    return make


# -- submitting --------------------------------------------------------------------------------------------------------


async def test_submit_returns_a_named_task_of_the_loop(make):
    """The result of submit is a real task with the given name or that of the coroutine."""
    async with make() as submit:
        first = submit(value, 1, __name__="first")
        second = submit(value, result=2)
        assert isinstance(first, asyncio.Task)
        assert (first.get_name(), second.get_name()) == ("first", "value")
        assert (await first, await second) == (1, 2)


async def test_submit_can_be_held_by_a_weak_method(make):
    """The block gets a bound method that lives as long as its executor."""
    executor = make()
    async with executor as submit:
        held = weakref.WeakMethod(submit)
        assert held() == executor.submit


async def test_a_coroutine_starts_at_once_if_the_interpreter_can(make):
    """From Python 3.12 on, the coroutine runs inside submit up to its first suspension."""
    seen = []

    async def show():
        seen.append("started")
        await asyncio.sleep(0)

    async with make() as submit:
        submit(show)
        assert bool(seen) is (sys.version_info >= (3, 12))


async def test_next_tick_starts_after_the_submitter_yields(make):
    """With __next_tick__ the first step runs in the next iteration of the loop."""
    seen = []

    async def show():
        seen.append("started")

    async with make() as submit:
        submit(show, __next_tick__=True)
        assert not seen
        await asyncio.sleep(0)
        assert seen


async def test_the_function_sees_the_submitters_context_and_keeps_its_own(make):
    """The coroutine sees context variables of the caller; the caller does not see its changes."""

    async def change():
        before = variable.get()
        variable.set("changed")
        return before

    variable.set("given")
    async with make() as submit:
        assert await submit(change) == "given"
        assert await submit(change, __next_tick__=True) == "given"
    assert variable.get() == "given"


async def test_awaitables_that_are_no_coroutines_are_run(make):
    """A function may return a future, or an object with __await__."""

    class Answer:
        def __await__(self):
            yield from asyncio.sleep(0).__await__()
            return 42

    async with make() as submit:
        assert await submit(Answer) == 42
        future = asyncio.get_running_loop().create_future()
        task = submit(lambda: future)
        future.set_result("done")
        assert await task == "done"


async def test_everything_shows_in_info_statistics_and_history(make):
    """The manager shows names, states, ages and outcomes."""
    executor = make(history=10, max_concurrency=1)
    release = asyncio.Event()
    async with executor as submit:
        submit(after, release, __name__="runs")
        submit(value, __name__="waits")
        info = executor.manager.get_task_info()
        assert [(task["name"], task["state"]) for task in info] == [("runs", "running"), ("waits", "queued")]
        assert all(task["age_seconds"] >= 0 for task in info)
        stats = executor.manager.stats()
        assert (stats["in_flight"], stats["running"], stats["queued"]) == (2, 1, 1)
        release.set()
    assert executor.manager.stats()["names"]["waits"]["completed"] == 1
    assert [task["name"] for task in executor.manager.get_history()] == ["runs", "waits"]


async def test_a_timeout_cancels_the_task(make, caplog):
    """__timeout__ is seconds, counted from the start; the outcome is timed_out, and the block raises it."""
    executor = make()
    with pytest.raises(TimeoutError, match=r"'forever' timed out after 0\.01 seconds"):
        async with executor as submit:
            task = submit(forever, __timeout__=0.01)
    assert task.cancelled()
    assert executor.manager.stats()["timed_out"] == 1
    assert "timed out after 0.01 seconds" in caplog.text


# -- limits ------------------------------------------------------------------------------------------------------------


async def test_ten_thousand_submits_never_run_more_than_ten(make):
    """max_concurrency limits running coroutines, first come, first served."""
    asyncio.get_running_loop().set_debug(False)
    running, most, order = 0, 0, []

    async def work(number):
        nonlocal running, most
        running += 1
        most = max(most, running)
        order.append(number)
        await asyncio.sleep(0)
        running -= 1

    async with make({"max_concurrency": 10}) as submit:
        for number in range(10_000):
            submit(work, number)
        assert len(order) <= 10
    assert most == 10
    assert order == list(range(10_000))


async def test_slots_are_released_at_every_end(make):
    """Failures, cancellations and timeouts of running and queued tasks release their slots."""
    executor = make(max_concurrency=2)
    async with executor as submit:
        tasks = []
        for _ in range(20):
            tasks += [
                submit(failing_later, ValueError("x"), __reraise_on_exit__=False),
                submit(forever, __timeout__=0.001, __reraise_on_exit__=False),
                submit(forever),
                submit(value),
            ]
        for task in tasks[2::4]:
            task.cancel()
        assert await submit(value, "still served") == "still served"
    stats = executor.manager.stats()
    assert (stats["failed"], stats["timed_out"], stats["cancelled"], stats["completed"]) == (20, 20, 20, 21)


async def test_limits_of_executor_and_manager_hold_both(make_manager):
    """A task needs a slot of its executor first, then one of its manager."""
    manager = make_manager(max_concurrency=3)
    running, most = {"a": 0, "b": 0}, {"a": 0, "b": 0, "all": 0}

    async def work(name):
        running[name] += 1
        most[name] = max(most[name], running[name])
        most["all"] = max(most["all"], sum(running.values()))
        await asyncio.sleep(0)
        running[name] -= 1

    async with (
        AsyncBackgroundExecutor(max_concurrency=2, manager=manager) as a,
        AsyncBackgroundExecutor(max_concurrency=2, manager=manager) as b,
    ):
        for _ in range(50):
            a(work, "a")
            b(work, "b")
    assert most == {"a": 2, "b": 2, "all": 3}


# -- memory ------------------------------------------------------------------------------------------------------------


async def test_finished_tasks_are_dropped(make):
    """The executor keeps no task that succeeded, was cancelled or failed without having to be raised."""

    class Result:
        pass

    async with make() as submit:
        task = submit(value, Result())
        reference = weakref.ref(await task)
        failed = submit(failing, ValueError("x"), __reraise_on_exit__=False)
        references = [reference, weakref.ref(task), weakref.ref(failed)]
        await until(failed.done)
        del task, failed
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        gc.collect()
        assert [reference() for reference in references] == [None] * 3


async def test_memory_is_flat_over_many_submits_in_one_block(make):
    """Ten thousand tasks leave as many objects as one thousand."""

    async def objects_after(submit, count):
        for _ in range(count):
            task = submit(asyncio.sleep, 0, __cancel_on_exit__=True)
        await task
        await asyncio.sleep(0)
        del task
        gc.collect()
        return len(gc.get_objects())

    # In debug mode each task keeps its source traceback, which takes time.
    asyncio.get_running_loop().set_debug(False)
    async with make(max_concurrency=100) as submit:
        before = await objects_after(submit, 1_000)
        assert await objects_after(submit, 10_000) - before < 200


async def test_only_the_failure_to_raise_is_kept(make):
    """A thousand failures do not keep a thousand tracebacks."""
    executor = make()
    with pytest.raises(ValueError, match="first"):
        async with executor as submit:
            submit(failing_later, ValueError("first"))
            for _ in range(100):
                submit(failing, ValueError("later"))
            await until(lambda: executor._failures)
            assert len(executor._failures) == 1
    assert not executor._failures


# -- the end of the block ----------------------------------------------------------------------------------------------


async def test_the_end_cancels_tasks_with_cancel_on_exit_and_awaits_the_others(make):
    """Without flags a task is awaited; with __cancel_on_exit__ it is cancelled."""
    release = asyncio.Event()
    async with make() as submit:
        cancelled = submit(forever, __cancel_on_exit__=True)
        awaited = submit(after, release, "result")
        asyncio.get_running_loop().call_later(0.001, release.set)
    assert cancelled.cancelled()
    assert awaited.result() == "result"


async def test_the_first_failure_in_order_of_submission_is_raised(make, caplog):
    """The first submitted failure is raised, not the first in time; each failure is reported once."""
    with pytest.raises(ValueError, match="submitted first"):
        async with make() as submit:
            submit(failing_later, KeyError("not to be raised"), __reraise_on_exit__=False)
            submit(failing_later, ValueError("submitted first"))
            submit(failing, ValueError("failed first"))
    records = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(records) == 3


async def test_an_exception_of_the_block_wins(make):
    """An exception of the block is not replaced by a task's failure."""
    with pytest.raises(KeyError, match="block"):
        async with make() as submit:
            submit(failing, ValueError("task"))
            raise KeyError("block")


async def test_cancelled_tasks_do_not_raise(make):
    """A cancellation is not raised as a failure."""
    async with make() as submit:
        submit(forever).cancel()


async def test_tasks_submitted_meanwhile_are_awaited(make):
    """Tasks and their done callbacks may submit until the last task has ended."""
    done = []

    async with make() as submit:

        async def parent(depth):
            await asyncio.sleep(0)
            done.append(depth)
            if depth:
                submit(parent, depth - 1)

        submit(parent, 3).add_done_callback(lambda task: submit(parent, 0))
        late = []

        async def submits_late():
            await asyncio.sleep(0)
            late.append(submit(forever, __cancel_on_exit__=True))

        submit(submits_late)
    assert sorted(done) == [0, 0, 1, 2, 3]
    assert late[0].cancelled()


async def test_a_cancelled_exit_cancels_its_tasks_and_waits_for_them(make):
    """Running and queued tasks end, and the cancellation propagates."""
    ended = []
    children = []

    async def child():
        try:
            await forever()
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    executor = make(max_concurrency=3)

    async def block():
        async with executor as submit:
            children.extend(submit(child) for _ in range(5))

    closer = asyncio.create_task(block())
    await until(lambda: executor._idle is not None)
    closer.cancel("enough")
    with pytest.raises(asyncio.CancelledError, match="enough"):
        await closer
    assert len(ended) == 3
    assert all(child.cancelled() for child in children)


async def test_a_cancelled_exit_outlasts_more_cancellations(make):
    """Further cancellations of the exit do not cut short a task that needs time to end."""
    release = asyncio.Event()
    executor = make()

    async def block():
        async with executor as submit:
            submit(stubborn, 1, release)

    closer = asyncio.create_task(block())
    await until(lambda: executor._idle is not None)
    for _ in range(20):
        closer.cancel()
        await asyncio.sleep(0)
    assert not closer.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await closer


async def test_a_task_that_swallows_its_cancellation_is_named_and_let_go(make_manager, caplog):
    """A cancelled exit ends after the manager's default_shutdown_timeout, and the log names the remaining tasks."""
    release = asyncio.Event()
    executor = AsyncBackgroundExecutor(manager=make_manager(default_shutdown_timeout=0.01))

    async def block():
        async with executor as submit:
            submit(stubborn, 99, release, __name__="swallows")

    closer = asyncio.create_task(block())
    await until(lambda: executor._idle is not None)
    closer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closer
    assert "'swallows' still runs at the end of its executor's cancelled exit, at " in caplog.text
    release.set()
    await executor.manager.wait_for_all()


async def test_queued_coroutines_of_a_cancelled_exit_are_closed(make):
    """Coroutines that never started are closed, not left unawaited."""
    async with make(max_concurrency=1) as submit:
        for _ in range(10):
            submit(forever, __cancel_on_exit__=True)
    gc.collect()


async def test_submit_outside_the_block_raises(make):
    """Before and after the block, submit raises."""
    executor = make()
    with pytest.raises(ExecutorClosedError, match="was not entered"):
        executor.submit(value)
    async with executor as submit:
        pass
    with pytest.raises(ExecutorClosedError, match="has ended"):
        submit(value)
    with pytest.raises(ExecutorClosedError, match="has ended"):
        async with executor:
            pass


async def test_hooks_decide_which_failures_the_exit_reports_and_raises(make_manager, caplog):
    """Subclasses decide which failures are reported and raised, also of tasks that ended long ago."""

    class Special(AsyncBackgroundExecutor):
        _zero_is_no_limit = True
        _decides_late = True
        spared: ClassVar[set[Any]] = set()

        def _reports(self, error):
            return not isinstance(error, KeyError)

        def _reraises(self, future, error):
            return future not in self.spared

    with pytest.raises(ValueError, match="second"):
        async with Special({"max_concurrency": 0}, manager=make_manager()) as submit:
            first = submit(failing, KeyError("first"))
            submit(failing_later, ValueError("second"))
            await until(first.done)
            Special.spared.add(first)
    assert "KeyError" not in caplog.text
    assert "second" in caplog.text


# -- other threads -----------------------------------------------------------------------------------------------------


async def in_thread(function):
    """Run a function in a thread and wait for it."""
    return await asyncio.get_running_loop().run_in_executor(None, function)


async def test_submit_from_a_thread_gives_a_concurrent_future(make):
    """The coroutine runs on the executor's loop, in the context of the thread."""
    executor = make()
    main = threading.get_ident()

    async def show(number):
        await asyncio.sleep(0)
        return number, variable.get(), threading.get_ident()

    async with executor as submit:

        def work():
            variable.set("of the thread")
            future = submit(show, 7, __name__="from a thread")
            assert isinstance(future, concurrent.futures.Future)
            return future.result(10)

        assert await in_thread(lambda: contextvars.Context().run(work)) == (7, "of the thread", main)
    assert executor.manager.stats()["names"]["from a thread"]["completed"] == 1


async def test_many_threads_submit_and_the_end_waits_for_all(make):
    """No coroutine that a thread submitted before the end is lost."""
    executor = make(max_concurrency=5)
    count = 0

    async def work():
        nonlocal count
        await asyncio.sleep(0)
        count += 1

    async with executor as submit:
        await asyncio.gather(*[in_thread(lambda: [submit(work) for _ in range(100)]) for _ in range(8)])
    assert count == 800


async def test_failures_from_threads_are_raised_and_reported_once(make, caplog):
    """The future has the exception, and the end of the block raises it."""
    with pytest.raises(ValueError, match="from a thread"):
        async with make() as submit:
            future = await in_thread(lambda: submit(failing_later, ValueError("from a thread")))
    assert isinstance(future.exception(), ValueError)
    assert caplog.text.count("Traceback") == 1


async def test_a_future_of_a_thread_cancels_its_task(make):
    """The task is cancelled before and after its start."""
    executor = make()
    async with executor as submit:
        future = await in_thread(lambda: submit(forever))
        await until(executor.manager.get_task_count)
        future.cancel()
        await until(lambda: not executor.manager.get_task_count())
        early = await in_thread(lambda: (future := submit(forever), future.cancel()))
        assert early[1]


async def test_a_cancelled_future_of_a_thread_has_no_failure_to_raise(make, caplog):
    """If the task raises instead of ending, the error is logged, and the block does not raise."""
    began = asyncio.Event()

    async def resists():
        began.set()
        try:
            await forever()
        except asyncio.CancelledError:
            raise ValueError("instead") from None

    async with make() as submit:
        future = await in_thread(lambda: submit(resists))
        await began.wait()
        future.cancel()
    assert future.cancelled()
    assert "ValueError: instead" in caplog.text


async def test_a_thread_that_submits_at_the_end_is_waited_for(make, monkeypatch):
    """A coroutine that is submitted when the last task has just ended runs inside the block."""
    executor = make()
    loop = asyncio.get_running_loop()
    submitting, may_go = threading.Event(), threading.Event()
    seen, threads = [], []

    class SlowLoop:
        def call_soon_threadsafe(self, *arguments):
            submitting.set()
            may_go.wait()
            loop.call_soon_threadsafe(*arguments)

        def __getattr__(self, name):
            return getattr(loop, name)

    async def late():
        seen.append("inside")

    is_busy = executor._is_busy

    def is_busy_and_late():
        busy = is_busy()
        if not busy and not threads:
            # The block has just decided to end.
            executor._loop = SlowLoop()
            threads.append(threading.Thread(target=lambda: submit(late)))
            threads[0].start()
            submitting.wait()
            loop.call_later(0.01, may_go.set)
        return busy

    monkeypatch.setattr(executor, "_is_busy", is_busy_and_late)
    async with executor as submit:
        pass
    may_go.set()
    seen.append("behind")
    await in_thread(threads[0].join)
    await asyncio.sleep(0)
    assert seen == ["inside", "behind"]


async def test_a_refused_thread_does_not_hold_up_the_end(make):
    """The block ends although it may have counted a submission that was refused a moment later."""
    executor = make()
    async with executor as submit:
        executor._is_open = False
        with pytest.raises(ExecutorClosedError):
            await in_thread(lambda: submit(value))
        executor._is_open = True
    assert not executor._handovers


async def test_a_thread_is_refused_after_the_end_and_after_the_loop(make):
    """The coroutine of a refused submission is closed."""
    executor = make()
    async with executor as submit:
        pass
    with pytest.raises(ExecutorClosedError):
        await in_thread(lambda: submit(value))


def test_submit_to_a_closed_loop_is_refused(make):
    """A block that never ended accepts no work for a closed loop."""
    executor = make()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(executor.__aenter__())
    loop.close()
    with pytest.raises(NoRunningLoopError, match="is closed"):
        executor.submit(value)
    gc.collect()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, -1, 1.5, "3", True, float("nan")])
def test_a_limit_that_is_no_positive_whole_number_is_refused(limit):
    """The limit is checked in the config and as a keyword."""
    with pytest.raises(InvalidOptionError, match="max_concurrency"):
        AsyncBackgroundExecutor({"max_concurrency": limit})
    with pytest.raises(InvalidOptionError, match="max_concurrency"):
        AsyncBackgroundExecutor(max_concurrency=limit)


def test_a_config_or_manager_of_another_kind_is_refused():
    """A config must be a mapping, a manager a BackgroundTaskManager."""
    with pytest.raises(InvalidOptionError, match="config must be a mapping"):
        AsyncBackgroundExecutor([("max_concurrency", 1)])
    with pytest.raises(InvalidOptionError, match="manager must be"):
        AsyncBackgroundExecutor(manager=object())


async def test_an_object_that_cannot_be_run_is_refused(make):
    """The message gives advice, and names the other class if it would run the function."""

    async def generator():
        yield

    async with make() as submit:
        with pytest.raises(InvalidFunctionError, match="a function is needed"):
            submit(42)
        with pytest.raises(InvalidFunctionError, match="until it is iterated over"):
            submit(generator)
        coro = value()
        with pytest.raises(InvalidFunctionError, match="not the result of a call"):
            submit(coro)
        coro.close()
        with pytest.raises(InvalidFunctionError, match=r"returned 4.*BackgroundExecutor runs this one"):
            submit(pow, 2, 2)
        with pytest.raises(InvalidOptionError, match="__nmae__"):
            submit(value, __nmae__="x")
        with pytest.raises(InvalidTimeoutError):
            submit(value, __timeout__=0)
        with pytest.raises(InvalidTimeoutError):
            await in_thread(lambda: submit(value, __timeout__=-1))
        with pytest.raises(TypeError):
            submit(value, 1, 2, 3)
    gc.collect()


async def test_a_closed_or_full_manager_refuses(make_manager):
    """A manager that is closed or full also refuses work of an executor."""
    manager = make_manager(max_pending_tasks=1, overflow="drop_newest")
    release = asyncio.Event()
    async with AsyncBackgroundExecutor(manager=manager) as submit:
        submit(after, release)
        with pytest.raises(TaskRejectedError):
            submit(value)
        future = await in_thread(lambda: submit(value))
        with pytest.raises(TaskRejectedError):
            await asyncio.wrap_future(future)
        release.set()
    await manager.shutdown()
    async with AsyncBackgroundExecutor(manager=manager) as submit:
        with pytest.raises(ManagerClosedError):
            submit(value)
