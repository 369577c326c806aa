"""``fire_function``: the volume form of ``submit``."""

from __future__ import annotations

import asyncio

import pytest

from bgtasks import InvalidFunctionError, InvalidOptionError, ManagerClosedError, NoRunningLoopError, Retry

RETRY = Retry(on=ValueError, attempts=3, wait=0.001, jitter=0)


async def test_functions_run_in_order(make_manager):
    """With their arguments, as tasks that are counted at once."""
    manager = make_manager()
    seen = []

    async def work(number, *, more=0):
        seen.append((number, more))

    assert manager.fire_function(work, 1) is True
    assert manager.fire_function(work, 2, more=3, name="named", timeout=5.0, context={"user": "a"}) is True
    assert [info["name"].rpartition(".")[2] for info in manager.get_task_info()] == ["work", "named"]
    assert seen == []
    await manager.wait_for_all()
    assert seen == [(1, 0), (2, 3)]


async def test_a_failure_is_retried(make_manager):
    """As one task."""
    manager = make_manager()
    calls = []

    async def work():
        calls.append(1)
        if len(calls) < 3:
            raise ValueError

    manager.fire_function(work, retry=RETRY)
    await manager.wait_for_all()
    stats = manager.stats()
    assert (len(calls), stats["started"], stats["completed"], stats["retried"]) == (3, 1, 1, 2)


async def test_a_full_manager_drops_it(make_manager):
    """As ``fire`` does."""
    manager = make_manager(max_pending_tasks=1, overflow="drop_newest")
    assert manager.fire_function(asyncio.sleep, 0) is True
    assert manager.fire_function(asyncio.sleep, 0) is False
    assert manager.stats()["dropped"] == 1
    await manager.wait_for_all()


async def test_wrong_arguments_are_refused(make_manager):
    """Nothing is started."""
    manager = make_manager()
    with pytest.raises(InvalidFunctionError):
        manager.fire_function(None)
    with pytest.raises(InvalidFunctionError):
        manager.fire_function(asyncio.sleep(0))
    with pytest.raises(InvalidFunctionError, match="fire_function runs coroutine functions"):
        manager.fire_function(len, [])
    with pytest.raises(InvalidOptionError, match="retry must be"):
        manager.fire_function(asyncio.sleep, 0, retry=3)
    assert manager.stats()["started"] == 0
    await manager.shutdown()
    with pytest.raises(ManagerClosedError):
        manager.fire_function(asyncio.sleep, 0)


def test_it_needs_a_loop(make_manager):
    """The function is not called."""
    called = []
    with pytest.raises(NoRunningLoopError):
        make_manager().fire_function(called.append, 1)
    assert called == []
