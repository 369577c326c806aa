"""The locks and signals between threads."""

from __future__ import annotations

import contextlib
import threading

import pytest
from allocations import HAS_SAFE_LOCKS, NEEDS_TESTCAPI, call_failing

import bgtasks
from bgtasks._locks import Lock, Signal


def acquired_elsewhere(lock):
    """Return whether another thread can acquire a lock, which it releases again."""
    outcome = []

    def acquire():
        outcome.append(lock.acquire(timeout=0.05))
        if outcome[0]:
            lock.release()

    thread = threading.Thread(target=acquire)
    thread.start()
    thread.join()
    return outcome[0]


@pytest.mark.skipif(bgtasks.IMPLEMENTATION == "python", reason="without extensions the lock is CPython's own")
def test_the_compiled_lock_comes_with_the_compiled_registry():
    """Nothing else takes its place silently."""
    assert HAS_SAFE_LOCKS


def test_a_lock_is_re_entrant_and_keeps_others_out():
    """Like threading.RLock."""
    lock = Lock()
    with lock:
        with lock:
            assert not acquired_elsewhere(lock)
        assert not acquired_elsewhere(lock)
    assert acquired_elsewhere(lock)
    with pytest.raises(RuntimeError, match="un-acquired"):
        lock.release()


def test_an_error_in_the_block_is_raised_and_releases_the_lock():
    """The end of the block swallows nothing."""
    lock = Lock()
    with pytest.raises(KeyError), lock:
        raise KeyError
    assert acquired_elsewhere(lock)


@NEEDS_TESTCAPI
@pytest.mark.skipif(not HAS_SAFE_LOCKS, reason="the compiled lock was not built")
def test_without_memory_at_the_end_of_a_block_the_lock_is_released():
    """The end of CPython's own lock needs a tuple."""
    lock = Lock()

    def use():
        with lock:
            pass

    for number in range(10):
        with contextlib.suppress(MemoryError):
            call_failing(number, use)
        assert acquired_elsewhere(lock), number


def test_a_signal_wakes_one_wait_now_or_later():
    """It is cleared by the wait; setting it twice is setting it once."""
    signal = Signal()
    assert not signal.wait(0.001)
    signal.set()
    signal.set()
    assert signal.wait()
    assert not signal.wait(0)
    signal.set()
    signal.clear()
    signal.clear()
    assert not signal.wait(-1)
    thread = threading.Thread(target=signal.wait)
    thread.start()
    signal.set()
    thread.join(20)
    assert not thread.is_alive()
