"""The futures of BackgroundExecutor: as those of concurrent.futures, except that their locks are made later."""

import asyncio
import concurrent.futures
import gc
import os
import signal
import threading
import weakref

import pytest

from bgtasks import BackgroundExecutor, _registry_py
from bgtasks.executor import _call


@pytest.fixture(params=["made late", "unknown layout"])
def make(request, make_manager, monkeypatch):
    """Give a maker of executors; if the layout of futures is unknown, the base class makes all fields."""
    if request.param == "unknown layout":
        monkeypatch.setattr(_call, "_IS_KNOWN", False)
    return lambda **options: BackgroundExecutor(manager=make_manager(), **options)


def test_the_futures_of_this_python_are_known():
    """The constructor of futures in this Python is known, so the fast path runs."""
    assert _call._IS_KNOWN


def test_a_future_that_was_not_queried_has_its_outcome(make):
    """result, exception, done, cancelled and repr of a future are right although it finished before the first query."""
    error = ValueError("expected")

    def fails():
        raise error

    with make() as submit:
        good = submit(lambda: 7)
        bad = submit(fails, __reraise_on_exit__=False)
    assert (good.result(), good.exception(), good.done(), good.cancelled(), good.running()) == (
        7,
        None,
        True,
        False,
        False,
    )
    assert (bad.exception(), bad.done()) == (error, True)
    with pytest.raises(ValueError, match="expected"):
        bad.result()
    assert "state=finished returned int" in repr(good)
    assert "state=finished raised ValueError" in repr(bad)
    assert hash(good) != hash(bad)
    assert weakref.ref(good)() is good
    with pytest.raises(AttributeError, match="'BackgroundFuture' object has no attribute 'missing'"):
        _ = good.missing
    for refused in (lambda: good.set_result(8), lambda: good.set_exception(error)):
        with pytest.raises(concurrent.futures.InvalidStateError):
            refused()
    assert (good.cancel(), good.result()) == (False, 7)


def test_a_future_shows_the_state_of_its_function(make):
    """repr, running and done show pending, running and finished; cancel returns True only if it cancelled."""
    gate = threading.Event()
    with make(max_concurrency=1) as submit:
        first = submit(gate.wait)
        while not first.running():
            pass
        second = submit(int)
        assert "state=running" in repr(first)
        assert "state=pending" in repr(second)
        assert (first.cancel(), second.cancel(), second.cancel()) == (False, True, True)
        assert "state=cancelled" in repr(second)
        gate.set()
        first.result()
        assert not first.running()
        assert "state=finished" in repr(first)


def test_a_cancellation_that_comes_while_the_outcome_is_set_is_too_late(make, monkeypatch):
    """Between the end of the function and that of its future, cancel returns False and the outcome stays."""
    answers = []

    class Moment:
        def __enter__(self):
            if not answers:
                answers.append(None)
                answers.append(future.cancel())

        def __exit__(self, *error):
            pass

    gate = threading.Event()
    with make() as submit:
        future = submit(gate.wait)
        monkeypatch.setattr(_call, "_making", Moment())
        gate.set()
    assert answers == [None, False]
    assert future.result(timeout=10) is True


class _Escaped(BaseException):
    """An error of a done callback that is no Exception."""


def _raising(future):
    raise _Escaped


def test_a_base_exception_of_a_callback_harms_neither_the_thread_nor_the_end(make, caplog):
    """The worker logs it and goes on; the block still ends after the function."""
    gate = threading.Event()
    with make(max_concurrency=1) as submit:
        future = submit(gate.wait, __name__="failing callback")
        future.add_done_callback(_raising)
        gate.set()
        assert submit(int, 7).result(timeout=10) == 7
    assert future.result() is True
    assert caplog.text.count("A done callback or hook of background task 'failing callback' raised") == 1


def test_a_base_exception_of_a_callback_reaches_the_canceller(make):
    """As in concurrent.futures, cancel() raises it; waiters and the end of the block see the cancellation."""
    gate = threading.Event()
    with make(max_concurrency=1) as submit:
        submit(gate.wait)
        future = submit(int)
        future.add_done_callback(_raising)
        with pytest.raises(_Escaped):
            future.cancel()
        assert concurrent.futures.wait([future], timeout=10).done == {future}
        gate.set()


def test_later_timeouts_work_after_a_base_exception_of_a_callback(make, caplog):
    """The thread for timeouts survives it."""
    gate = threading.Event()
    with make() as submit:
        for _ in range(2):
            future = submit(gate.wait, __timeout__=0.01, __reraise_on_exit__=False)
            future.add_done_callback(_raising)
            assert isinstance(future.exception(timeout=10), TimeoutError)
        gate.set()
    assert caplog.text.count("A done callback or hook") == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_the_child_of_a_fork_is_not_held_up_by_a_lock_of_the_parent(make):
    """An executor works in the child, even if threads of the parent held locks during the fork."""
    held, gate = threading.Event(), threading.Event()

    def hold():
        with _call._making, _registry_py._calls_lock:
            held.set()
            gate.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if not child:
        with make() as submit:
            os._exit(submit(int, 7).result(timeout=10))
    gate.set()
    thread.join()
    signal.signal(signal.SIGALRM, lambda number, frame: os.kill(child, signal.SIGKILL))
    signal.alarm(20)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_waiters_and_callbacks_are_notified_in_every_state(make):
    """wait, as_completed, callbacks and asyncio work on pending, running and finished futures."""
    gate = threading.Event()
    called = []
    with make(max_concurrency=1) as submit:
        futures = [submit(gate.wait), submit(lambda: 1), submit(lambda: 2)]
        for future in futures:
            future.add_done_callback(called.append)
        assert concurrent.futures.wait(futures, timeout=0).not_done == set(futures)
        with pytest.raises(concurrent.futures.TimeoutError):
            futures[1].result(timeout=0)
        gate.set()
        assert set(concurrent.futures.as_completed(futures, timeout=10)) == set(futures)

        async def awaiting():
            return await asyncio.wrap_future(submit(lambda: 3))

        assert asyncio.run(awaiting()) == 3
    assert called == futures
    late = []
    futures[0].add_done_callback(late.append)
    assert late == [futures[0]]


def test_no_waiter_misses_a_simultaneous_end(make):
    """Other threads wait for ten thousand futures, each of which may be finishing, and all waits end."""
    found = []

    def wait(futures):
        found.append(sum(future.result(timeout=10) for future in futures))

    with make(max_concurrency=4) as submit:
        futures = []
        for start in range(0, 10_000, 500):
            batch = [submit(int, number) for number in range(start, start + 500)]
            waiters = [threading.Thread(target=wait, args=(batch,)) for _ in range(2)]
            for waiter in waiters:
                waiter.start()
            for waiter in waiters:
                waiter.join()
            futures += batch
    assert sum(found) == 2 * sum(range(10_000))
    assert all(future.done() for future in futures)


def test_a_finished_future_keeps_only_its_outcome(make):
    """A finished future keeps neither its function nor its arguments nor its executor."""

    class Argument:
        pass

    argument = Argument()
    gone = weakref.ref(argument)
    with make() as submit:
        future = submit(id, argument)
        future.result()
    del argument
    gc.collect()
    assert gone() is None
    executor = weakref.ref(submit.__self__)
    del submit
    gc.collect()
    assert executor() is None
