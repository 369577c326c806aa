"""An executor keeps no references to functions and coroutines that have ended."""

import asyncio
import gc
import logging
import weakref

import pytest

from bgtasks.executor import AsyncBackgroundExecutor, BackgroundExecutor

WAIT = 10


class Marker:
    """An object that can be referred to weakly."""


def fail(marker):
    """Raise an error whose traceback refers to the argument."""
    raise ValueError("wrong")


@pytest.fixture(autouse=True)
def _no_records(caplog):
    """Disable logging: pytest keeps the records, and the records keep the failures."""
    caplog.set_level(logging.CRITICAL, logger="bgtasks")


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_ended_functions_are_freed(make_manager, fails):
    """A function's argument, result, failure and future are freed after their last use, the executor after its exit."""
    executor = BackgroundExecutor(manager=make_manager())
    with executor as submit:
        marker = Marker()
        future = submit(fail if fails else lambda given: given, marker, __reraise_on_exit__=False)
        assert (future.exception(WAIT) is not None) is fails
        watched = [weakref.ref(marker), weakref.ref(future)]
        del marker, future
    watched.append(weakref.ref(executor))
    del submit, executor
    gc.collect()
    assert [reference() for reference in watched] == [None] * 3


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
async def test_ended_coroutines_are_freed(make_manager, fails):
    """A coroutine's argument, result, failure and task are freed after their last use, the executor after its exit."""

    async def work(given):
        return fail(given) if fails else given

    executor = AsyncBackgroundExecutor(manager=make_manager())
    async with executor as submit:
        marker = Marker()
        task = submit(work, marker, __reraise_on_exit__=False)
        await asyncio.wait([task])
        assert (task.exception() is not None) is fails
        watched = [weakref.ref(marker), weakref.ref(task)]
        del marker, task
    watched.append(weakref.ref(executor))
    del submit, executor
    await asyncio.sleep(0)
    gc.collect()
    assert [reference() for reference in watched] == [None] * 3
