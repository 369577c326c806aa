"""The futures of BackgroundExecutor: concurrent.futures' own in everything but when their locks are made."""

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
    """Give a maker of executors; with a layout of futures that is not known the base class makes everything."""
    if request.param == "unknown layout":
        monkeypatch.setattr(_call, "_IS_KNOWN", False)
    return lambda **options: BackgroundExecutor(manager=make_manager(), **options)


def test_this_python_is_known():
    """The constructor of this Python's futures sets what is made late, so the short way is the one that runs."""
    assert _call._IS_KNOWN


def test_a_future_nobody_looked_at_has_its_outcome(make):
    """result, exception, done, cancelled and repr tell of a future that settled before anybody asked."""
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
    with pytest.raises(AttributeError, match="'CallFuture' object has no attribute 'missing'"):
        _ = good.missing
    for refused in (lambda: good.set_result(8), lambda: good.set_exception(error)):
        with pytest.raises(concurrent.futures.InvalidStateError):
            refused()
    assert (good.cancel(), good.result()) == (False, 7)


def test_a_future_tells_how_far_its_function_is(make):
    """repr, running and done say pending, running and finished, and cancel says True only of what is cancelled."""
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
    """Between the end of the function and that of its future cancel says False, and the outcome stays."""
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
    """What a done callback may raise and nobody catches as an Exception."""


def _raising(future):
    raise _Escaped


def test_a_callback_that_raises_no_exception_costs_neither_a_thread_nor_the_end(make, caplog):
    """The worker logs it and goes on; the end of the block is told of the function all the same."""
    gate = threading.Event()
    with make(max_concurrency=1) as submit:
        future = submit(gate.wait, __name__="hears badly")
        future.add_done_callback(_raising)
        gate.set()
        assert submit(int, 7).result(timeout=10) == 7
    assert future.result() is True
    assert caplog.text.count("A done callback or hook of background task 'hears badly' raised") == 1


def test_a_callback_that_raises_no_exception_reaches_who_cancels(make):
    """As in concurrent.futures; those that wait, and the end of the block, hear of the cancellation."""
    gate = threading.Event()
    with make(max_concurrency=1) as submit:
        submit(gate.wait)
        future = submit(int)
        future.add_done_callback(_raising)
        with pytest.raises(_Escaped):
            future.cancel()
        assert concurrent.futures.wait([future], timeout=10).done == {future}
        gate.set()


def test_a_timeout_whose_callback_raises_no_exception_is_not_the_last(make, caplog):
    """The thread that watches the timeouts outlives it."""
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
    """Whatever the parent's threads held at that moment, an executor of the child works."""
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


def test_waiters_and_callbacks_hear_of_the_end_whenever_they_come(make):
    """wait, as_completed, callbacks and asyncio work on futures that wait, that run and that have ended."""
    gate = threading.Event()
    heard = []
    with make(max_concurrency=1) as submit:
        futures = [submit(gate.wait), submit(lambda: 1), submit(lambda: 2)]
        for future in futures:
            future.add_done_callback(heard.append)
        assert concurrent.futures.wait(futures, timeout=0).not_done == set(futures)
        with pytest.raises(concurrent.futures.TimeoutError):
            futures[1].result(timeout=0)
        gate.set()
        assert set(concurrent.futures.as_completed(futures, timeout=10)) == set(futures)

        async def awaiting():
            return await asyncio.wrap_future(submit(lambda: 3))

        assert asyncio.run(awaiting()) == 3
    assert heard == futures
    late = []
    futures[0].add_done_callback(late.append)
    assert late == [futures[0]]


def test_no_waiter_misses_an_end_that_comes_at_the_same_time(make):
    """Ten thousand futures, each waited for by other threads while its function may just have ended."""
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


def test_a_settled_future_holds_its_outcome_and_nothing_else(make):
    """Neither function nor arguments nor executor are kept by a future that is."""

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
