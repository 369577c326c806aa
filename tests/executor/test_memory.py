"""What an executor keeps of functions and coroutines that have ended: nothing."""

import asyncio
import gc
import logging
import weakref

import pytest

from bgtasks.executor import AsyncBackgroundExecutor, BackgroundExecutor

WAIT = 10


class Marker:
    """An object that can be watched by a weak reference."""


def fail(marker):
    """Raise, with the argument in the frame of the traceback."""
    raise ValueError("wrong")


@pytest.fixture(autouse=True)
def _no_records(caplog):
    """Log nothing: pytest keeps the records, and they the failures."""
    caplog.set_level(logging.CRITICAL, logger="bgtasks")


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_ended_functions_are_let_go(make_manager, fails):
    """A function's argument, result, failure and future go with their last user, and the executor after its exit."""
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
async def test_ended_coroutines_are_let_go(make_manager, fails):
    """A coroutine's argument, result, failure and task go with their last user, and the executor after its exit."""

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
