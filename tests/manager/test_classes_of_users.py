"""Classes of users that derive from the manager or observe it: what they define must not harm the rest."""

from __future__ import annotations

import asyncio
import os

import pytest

from bgtasks import BackgroundTaskManager
from bgtasks._observers import Observer, observe_all, stop_observing_all


class Named(BackgroundTaskManager):
    """A manager that compares by value, and so has no hash."""

    __hash__ = None

    def __eq__(self, other):
        return isinstance(other, Named)


async def test_a_manager_may_compare_by_value():
    """Two managers that are equal are still two managers."""
    managers = [Named(), Named()]
    for manager in managers:
        manager.create_task(asyncio.sleep(0))
        await manager.shutdown()
        assert manager.stats()["started"] == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_equal_managers_are_both_renewed_in_the_child_of_a_fork():
    """A lock that a thread of the parent holds would stay locked there."""
    managers = [Named(), Named()]
    locks = [manager._lock for manager in managers]
    child = os.fork()
    if child == 0:
        os._exit(sum(manager._lock is lock for manager, lock in zip(managers, locks, strict=True)))
    assert os.waitpid(child, 0)[1] == 0


def test_an_observer_that_fails_does_not_hide_abandoned_tasks(caplog):
    """The tasks of a closed loop are logged, and so is the error of the observer."""

    class Broken(Observer):
        def tasks_abandoned(self, names):
            raise ValueError("broken observer")

    observer = Broken()
    observe_all(observer)
    try:
        manager = BackgroundTaskManager()
        loop = asyncio.new_event_loop()
        loop.run_until_complete(_leave_one(manager))
        loop.close()
        asyncio.run(manager.shutdown())
    finally:
        stop_observing_all(observer)
    assert "left behind" in caplog.text
    assert "broken observer" in caplog.text


async def _leave_one(manager):
    manager.create_task(asyncio.sleep(60), name="left behind")
