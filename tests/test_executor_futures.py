"""The futures of BackgroundExecutor: concurrent.futures' own in everything but when their locks are made."""

import asyncio
import concurrent.futures
import gc
import threading
import weakref

import pytest

from bgtasks import BackgroundExecutor
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
    """Neither function nor arguments nor context are kept by a future that is."""

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
