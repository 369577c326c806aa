"""BackgroundExecutor: threads, limits, abandoned functions, timeouts and the end of the block."""

import asyncio
import concurrent.futures
import contextvars
import functools
import gc
import logging
import os
import subprocess
import sys
import threading
import weakref
from typing import Any, ClassVar

import pytest
from work import until, wait_until

from bgtasks import (
    BackgroundExecutor,
    ExecutorClosedError,
    InvalidFunctionError,
    InvalidOptionError,
    InvalidTimeoutError,
    ManagerClosedError,
    TaskRejectedError,
)
from bgtasks._locks import Signal

variable = contextvars.ContextVar("variable", default="unset")


@pytest.fixture
def make(make_manager):
    """Give a maker of executors on managers of the twin."""

    def make(config=None, *, history=0, **options):
        return BackgroundExecutor(config, manager=make_manager(history=history), **options)

    return make


class Gate:
    """A function that sets ``entered`` when it runs, and returns when ``opened`` is set."""

    def __init__(self):
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self, error=None):
        self.entered.set()
        assert self.opened.wait(10)
        if error is not None:
            raise error
        return "late"


def workers():
    """Return the live threads of executors."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("bgtasks-")]


def raising(error):
    """Raise."""
    raise error


# -- submitting --------------------------------------------------------------------------------------------------------


def test_submit_gives_a_concurrent_future(make):
    """The future has the result or the error; callbacks and waits work."""
    with make() as submit:
        future = submit(divmod, 7, 2)
        assert isinstance(future, concurrent.futures.Future)
        assert future.result(10) == (3, 1)
        failed = submit(raising, ValueError("x"), __reraise_on_exit__=False)
        assert isinstance(failed.exception(10), ValueError)
        called = []
        future.add_done_callback(called.append)
        assert called == [future]
        done, pending = concurrent.futures.wait([submit(pow, 2, number) for number in range(5)], timeout=10)
        assert sorted(future.result() for future in done) == [1, 2, 4, 8, 16]
        assert not pending
    assert weakref.ref(future)() in {future}


def test_submit_can_be_held_by_a_weak_method(make):
    """The block gets a bound method."""
    executor = make()
    with executor as submit:
        assert weakref.WeakMethod(submit)() == executor.submit


def test_the_function_sees_the_submitters_context_and_keeps_its_own(make):
    """The function sees context variables of the caller; the caller does not see its changes."""

    def change():
        before = variable.get()
        variable.set("changed")
        return before

    def block():
        variable.set("given")
        with make() as submit:
            assert submit(change).result(10) == "given"
            assert submit(change, __next_tick__=True).result(10) == "given"
        assert variable.get() == "given"

    contextvars.Context().run(block)


def test_everything_shows_in_info_statistics_and_history(make):
    """Functions are shown and counted as tasks are: by id, name, state, age and outcome."""
    executor = make(history=10, max_concurrency=1)
    gate = Gate()
    with executor as submit:
        running = submit(gate, __name__="runs", __timeout__=60)
        assert gate.entered.wait(10)
        waiting = submit(os.getpid)
        manager = executor.manager
        info = manager.get_task_info()
        assert [(task["name"], task["state"], task["timeout"]) for task in info] == [
            ("runs", "running", 60),
            ("getpid", "queued", None),
        ]
        assert info[0]["coroutine"] == "Gate"
        assert all(task["age_seconds"] >= 0 for task in info)
        assert manager.get_task_count() == 2
        stats = manager.stats()
        assert (stats["in_flight"], stats["running"], stats["queued"]) == (2, 1, 1)
        assert (running.running(), waiting.running()) == (True, False)
        gate.opened.set()
    stats = manager.stats()
    assert (stats["completed"], stats["in_flight"]) == (2, 0)
    assert stats["names"]["runs"]["p50_seconds"] >= 0
    assert [task["name"] for task in manager.get_history()] == ["runs", "getpid"]
    assert len({task["task_id"] for task in manager.get_history()}) == 2


def test_tasks_and_functions_of_one_name_share_counters_and_percentiles(make_manager):
    """Coroutines and functions of one name share one entry of the statistics."""
    manager = make_manager()

    async def main():
        async def nothing():
            pass

        for _ in range(3):
            manager.create_task(nothing(), name="shared")
        await manager.wait_for_all()

    asyncio.run(main())
    with BackgroundExecutor(manager=manager) as submit:
        for _ in range(4):
            submit(int, __name__="shared")
    assert manager.stats()["names"]["shared"]["completed"] == 7


# -- limits ------------------------------------------------------------------------------------------------------------


def test_ten_thousand_submits_never_run_more_than_ten(make):
    """max_concurrency limits the number of threads."""
    lock = threading.Lock()
    running = most = 0
    threads = set()

    def work():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            threads.add(threading.get_ident())
        with lock:
            running -= 1

    executor = make({"max_concurrency": 10})
    with executor as submit:
        for _ in range(10_000):
            submit(work)
        assert len(executor._threads) <= 10
    assert most <= 10
    assert len(threads) <= 10
    assert executor.manager.stats()["completed"] == 10_000


def test_functions_start_in_the_order_of_their_submission(make):
    """Functions start first come, first served."""
    order = []
    with make(max_concurrency=1) as submit:
        for number in range(1000):
            submit(order.append, number)
    assert order == list(range(1000))


def test_idle_threads_are_reused_and_new_ones_start_on_demand(make):
    """Sequential functions share one thread; functions that wait for each other get one each."""
    executor = make(max_concurrency=8)
    with executor as submit:
        for _ in range(20):
            submit(int).result(10)
            assert wait_until(lambda: not executor._running)
        assert len(executor._threads) == 1
        barrier = threading.Barrier(8)
        for _ in range(8):
            submit(barrier.wait, 10)
    assert not any(thread.is_alive() for thread in executor._threads)


def test_the_default_limit_is_that_of_the_thread_pool(make):
    """The default number of threads is that of ThreadPoolExecutor."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert make()._limit == pool._max_workers


# -- cancelling and abandoning -----------------------------------------------------------------------------------------


def test_a_queued_function_can_be_cancelled_a_running_one_cannot(make):
    """As with ThreadPoolExecutor; the manager cancels functions by id and name as well."""
    gate = Gate()
    executor = make(max_concurrency=1)
    called = []
    with executor as submit:
        running = submit(gate)
        queued = [submit(called.append, 1, __name__=name) for name in ("by future", "by id", "by name", "by name")]
        assert gate.entered.wait(10)
        assert not running.cancel()
        assert queued[0].cancel()
        assert queued[0].cancel()
        by_id = next(task["task_id"] for task in executor.manager.get_task_info() if task["name"] == "by id")
        assert executor.manager.cancel(by_id) == 1
        assert executor.manager.cancel("by name") == 2
        assert all(future.cancelled() for future in queued)
        with pytest.raises(concurrent.futures.CancelledError):
            queued[0].result()
        assert concurrent.futures.wait(queued, timeout=10).not_done == set()
        gate.opened.set()
    assert (running.result(), called) == ("late", [])
    assert executor.manager.stats()["cancelled"] == 4


def test_the_end_abandons_running_functions_with_cancel_on_exit(make, caplog):
    """The future is cancelled at once; a late result is discarded, a late error logged once."""
    gates = [Gate(), Gate()]
    executor = make()
    with executor as submit:
        futures = [submit(gates[0], __cancel_on_exit__=True)]
        futures.append(submit(gates[1], ValueError("too late"), __cancel_on_exit__=True, __name__="fails late"))
        assert all(gate.entered.wait(10) for gate in gates)
    assert all(future.cancelled() and future.done() for future in futures)
    assert executor.manager.stats()["abandoned"] == 2
    for gate in gates:
        gate.opened.set()
    assert wait_until(lambda: "too late" in caplog.text)
    assert wait_until(lambda: not workers())
    assert caplog.text.count("'fails late' failed after it was abandoned: ValueError: too late") == 1
    assert all(future.cancelled() for future in futures)


def test_abandon_running_false_waits_for_running_functions(make):
    """As in LangGraph, only functions that have not started are cancelled."""
    gate = Gate()
    with make(abandon_running=False, max_concurrency=1) as submit:
        running = submit(gate, __cancel_on_exit__=True)
        assert gate.entered.wait(10)
        queued = submit(int, __cancel_on_exit__=True)
        threading.Timer(0.01, gate.opened.set).start()
    assert running.result() == "late"
    assert queued.cancelled()
    assert wait_until(lambda: not workers())


def test_a_timeout_fails_the_future_and_abandons_the_function(make, caplog):
    """TimeoutError is raised at the end, the late outcome is discarded, and another thread serves the queue."""
    gate = Gate()
    executor = make(max_concurrency=1)
    with pytest.raises(TimeoutError, match=r"timed out after 0\.01 seconds"):
        with executor as submit:
            future = submit(gate, __timeout__=0.01, __name__="hangs")
            assert submit(pow, 2, 3, __timeout__=60).result(10) == 8
            assert isinstance(future.exception(10), TimeoutError)
    gate.opened.set()
    stats = executor.manager.stats()
    assert (stats["timed_out"], stats["completed"]) == (1, 1)
    assert caplog.text.count("'hangs' timed out after 0.01 seconds") == 1
    assert wait_until(lambda: not workers())


def test_timeouts_of_functions_that_ended_are_forgotten(make):
    """A thousand quick functions with timeouts of an hour leave nothing behind."""
    executor = make()
    with executor as submit:
        for _ in range(1000):
            submit(int, __timeout__=3600)
        assert wait_until(lambda: not executor._live)
        assert len(executor._deadlines._heap) < 200


def test_an_abandoned_function_does_not_hold_up_the_interpreter():
    """The program ends although one of its threads sleeps for a minute."""
    program = (
        "import time\nfrom bgtasks import BackgroundExecutor\n"
        "with BackgroundExecutor() as submit:\n    future = submit(time.sleep, 60, __cancel_on_exit__=True)\n"
        "    while not future.running(): time.sleep(0.001)\n"
        "print(future.cancelled())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


# -- the end of the block ----------------------------------------------------------------------------------------------


def test_the_first_failure_in_order_of_submission_is_raised(make, caplog):
    """The first submitted failure is raised, not the first in time; each failure is reported once."""
    gate = Gate()
    with pytest.raises(ValueError, match="submitted first"):
        with make() as submit:
            submit(raising, KeyError("not to be raised"), __reraise_on_exit__=False)
            submit(gate, ValueError("submitted first"))
            submit(raising, ValueError("failed first")).exception(10)
            gate.opened.set()
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 3


def test_an_exception_of_the_block_wins(make):
    """An exception of the block is not replaced by a function's failure."""
    with pytest.raises(KeyError, match="block"):
        with make() as submit:
            submit(raising, ValueError("function"))
            raise KeyError("block")


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration(1)])
def test_a_base_exception_is_set_on_the_future(make, error):
    """The thread survives it, and the end of the block raises it."""
    executor = make(max_concurrency=1)
    with pytest.raises(type(error)):
        with executor as submit:
            assert submit(raising, error).exception(10) is error
            assert submit(int).result(10) == 0
    assert executor.manager.stats()["failed"] == 1


def test_functions_submitted_meanwhile_are_awaited(make):
    """Functions and done callbacks may submit until the last function has ended."""
    done = []

    with make(max_concurrency=2) as submit:

        def parent(depth):
            done.append(depth)
            if depth:
                submit(parent, depth - 1)

        submit(parent, 3).add_done_callback(lambda future: submit(parent, 0))
        late = []
        submit(lambda: late.append(submit(threading.Event().wait, 60, __cancel_on_exit__=True)))
    assert sorted(done) == [0, 0, 1, 2, 3]
    assert late[0].cancelled() or late[0].done()


def test_an_interrupted_exit_waits_for_no_function(make):
    """Queued functions are cancelled, running ones abandoned, and the interrupt propagates."""
    gate = Gate()
    executor = make(max_concurrency=1)

    class Interrupted(Signal):
        def wait(self, timeout=None):
            raise KeyboardInterrupt

    executor._idle = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        with executor as submit:
            running = submit(gate)
            assert gate.entered.wait(10)
            queued = submit(int)
    assert running.cancelled()
    assert queued.cancelled()
    gate.opened.set()
    assert wait_until(lambda: not workers())


def test_submit_outside_the_block_raises(make):
    """Before and after the block, submit raises."""
    executor = make()
    with pytest.raises(ExecutorClosedError, match="was not entered"):
        executor.submit(int)
    with executor as submit:
        pass
    with pytest.raises(ExecutorClosedError, match="has ended"):
        submit(int)
    with pytest.raises(ExecutorClosedError, match="has ended"):
        with executor:
            pass


def test_no_thread_outlives_the_block(make):
    """No thread starts without work, and all end with the block."""
    with make() as submit:
        assert not workers()
        for _ in range(100):
            submit(int, __timeout__=60)
    assert not workers()


def test_finished_functions_are_freed(make):
    """Idle threads keep no result, arguments or future."""

    class Thing:
        def method(self):
            return Thing()

    with make(max_concurrency=2) as submit:
        thing = Thing()
        future = submit(thing.method)
        references = [weakref.ref(thing), weakref.ref(future), weakref.ref(future.result(10))]
        del thing, future

        def gone():
            gc.collect()
            return all(reference() is None for reference in references)

        assert wait_until(gone)


def test_memory_is_flat_over_many_submits_in_one_block(make):
    """Twenty thousand functions leave as many objects as two thousand."""
    executor = make(max_concurrency=4)

    def objects_after(submit, count):
        for _ in range(count):
            submit(int, __cancel_on_exit__=True)
        assert wait_until(lambda: not executor._live)
        gc.collect()
        return len(gc.get_objects())

    with executor as submit:
        before = objects_after(submit, 2_000)
        assert objects_after(submit, 20_000) - before < 200


def test_only_the_failure_to_raise_is_kept(make):
    """A hundred failures do not keep a hundred tracebacks."""
    executor = make()
    with pytest.raises(ValueError, match="number 0"):
        with executor as submit:
            for number in range(100):
                submit(raising, ValueError(f"number {number}"))
            assert wait_until(lambda: not executor._live)
            assert len(executor._failures) == 1


def test_hooks_decide_which_failures_the_exit_reports_and_raises(make_manager, caplog):
    """Subclasses decide which failures are reported and raised, also of functions that ended long ago."""

    class Special(BackgroundExecutor):
        _zero_is_no_limit = True
        _decides_late = True
        spared: ClassVar[set[Any]] = set()

        def _reports(self, error):
            return not isinstance(error, KeyError)

        def _reraises(self, future, error):
            return future not in self.spared

    with pytest.raises(ValueError, match="second"):
        with Special({"max_concurrency": 0}, manager=make_manager()) as submit:
            first = submit(raising, KeyError("first"))
            submit(raising, ValueError("second"))
            first.exception(10)
            Special.spared.add(first)
    assert "KeyError" not in caplog.text


def test_without_a_thread_the_submission_is_refused(make, monkeypatch):
    """If the system starts no thread, submit refuses the function, which does not run later."""
    called = []
    with make() as submit:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", lambda thread: raising(RuntimeError("can't start new thread")))
            with pytest.raises(RuntimeError, match="can't start new thread"):
                submit(called.append, 1)
        submit(called.append, 2)
    assert called == [2]


def test_without_a_thread_for_its_timeout_the_function_fails(make, monkeypatch):
    """The error of the future says why; the next function has its timeout."""
    start, gate = threading.Thread.start, Gate()
    with make() as submit:
        with monkeypatch.context() as patch:
            patch.setattr(
                threading.Thread,
                "start",
                lambda thread: (
                    raising(RuntimeError("no more")) if thread.name == "bgtasks-deadlines" else start(thread)
                ),
            )
            assert "no more" in str(submit(int, __timeout__=60, __reraise_on_exit__=False).exception(10))
        assert isinstance(submit(gate, __timeout__=0.01, __reraise_on_exit__=False).exception(10), TimeoutError)
        gate.opened.set()


# -- with the manager --------------------------------------------------------------------------------------------------


async def test_shutdown_cancels_queued_functions_and_waits_for_running_ones(make_manager):
    """The manager's shutdown cancels queued functions and waits for running ones."""
    manager = make_manager()
    gate = Gate()
    executor = BackgroundExecutor(manager=manager, max_concurrency=1)
    with executor as submit:
        running = submit(gate)
        await until(gate.entered.is_set)
        queued = submit(int)
        closing = asyncio.ensure_future(manager.shutdown())
        await until(queued.cancelled)
        assert not closing.done()
        with pytest.raises(ManagerClosedError):
            submit(int)
        gate.opened.set()
        stats = await closing
    assert stats["status"] == "completed"
    assert running.result() == "late"


def test_a_full_manager_refuses(make_manager):
    """The cap of a manager includes functions."""
    for overflow in ("raise", "drop_newest"):
        gate = Gate()
        manager = make_manager(max_pending_tasks=1, overflow=overflow)
        with BackgroundExecutor(manager=manager) as submit:
            submit(gate)
            with pytest.raises(TaskRejectedError):
                submit(int)
            gate.opened.set()


def test_every_future_ends_while_threads_submit_and_cancel(make):
    """Every future ends, and every function is counted once."""
    executor = make(max_concurrency=4)
    futures = [[] for _ in range(8)]
    with executor as submit:

        def work(mine):
            for number in range(300):
                mine.append(submit(pow, number, 2, __timeout__=60 if number % 3 else None))
                if number % 5 == 0:
                    mine[number // 2].cancel()

        threads = [threading.Thread(target=work, args=(mine,)) for mine in futures]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    every = [future for mine in futures for future in mine]
    assert all(future.done() for future in every)
    stats = executor.manager.stats()
    cancelled = sum(future.cancelled() for future in every)
    assert (stats["cancelled"], stats["completed"]) == (cancelled, len(every) - cancelled)
    assert (stats["queued"], stats["in_flight"]) == (0, 0)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, -1, 1.5, "3", True])
def test_a_limit_that_is_no_positive_whole_number_is_refused(limit):
    """The limit is checked in the config and as a keyword."""
    with pytest.raises(InvalidOptionError, match="max_concurrency"):
        BackgroundExecutor({"max_concurrency": limit})
    with pytest.raises(InvalidOptionError, match="max_concurrency"):
        BackgroundExecutor(max_concurrency=limit)


def test_options_of_other_values_are_refused():
    """Each message lists the allowed values."""
    with pytest.raises(InvalidOptionError, match="kind must be one of 'threads', 'processes', 'interpreters'"):
        BackgroundExecutor(kind="fibres")
    with pytest.raises(InvalidOptionError, match="config must be a mapping"):
        BackgroundExecutor(7)


def test_an_object_that_cannot_be_run_is_refused(make):
    """The message names the other class if it would run the function."""

    async def coroutine():
        pass

    async def generator():
        yield

    class Callable:
        async def __call__(self):
            pass

    with make() as submit:
        with pytest.raises(InvalidFunctionError, match="a function is needed"):
            submit(42)
        for function in (generator, functools.partial(generator)):
            with pytest.raises(InvalidFunctionError, match="until it is iterated over"):
                submit(function)
        for function in (coroutine, functools.partial(coroutine)):
            with pytest.raises(InvalidFunctionError, match="AsyncBackgroundExecutor runs coroutine functions"):
                submit(function)
        for function in (Callable(), lambda: coroutine()):
            future = submit(function, __reraise_on_exit__=False)
            assert "AsyncBackgroundExecutor runs coroutine functions" in str(future.exception(10))
        with pytest.raises(InvalidOptionError, match="__nmae__"):
            submit(int, __nmae__="x")
        for timeout in (0, -1, float("nan"), float("inf"), "1", True):
            with pytest.raises(InvalidTimeoutError):
                submit(int, __timeout__=timeout)
        with pytest.raises(TypeError):
            submit(pow, 1, 2, 3, 4, __reraise_on_exit__=False).result(10)
    gc.collect()
