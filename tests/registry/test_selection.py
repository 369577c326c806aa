"""get_task_info: which tasks it returns, how many, and in which order."""

import asyncio

import pytest
from work import forever, until

from bgtasks import InvalidOptionError


async def started(make_manager):
    """Return a manager with two running tasks and two queued ones, made one after another."""
    manager = make_manager(max_concurrency=2)
    for name in ("send", "load", "send", "ask"):
        manager.create_task(forever(), name=name)
        await asyncio.sleep(0.002)
    return manager


def names(infos):
    """Return the names of tasks."""
    return [info["name"] for info in infos]


async def test_tasks_by_name_and_by_state(make_manager):
    """Every given argument has to match."""
    manager = await started(make_manager)
    assert names(manager.get_task_info()) == ["send", "load", "send", "ask"]
    assert [info["state"] for info in manager.get_task_info(name="send")] == ["running", "queued"]
    assert names(manager.get_task_info(state="queued")) == ["send", "ask"]
    assert names(manager.get_task_info(name="send", state="queued")) == ["send"]
    assert manager.get_task_info(name="none") == []
    await manager.shutdown()
    assert manager.get_task_info(name="send") == []


async def test_tasks_by_age(make_manager):
    """Only tasks that are older."""
    manager = make_manager()
    manager.create_task(forever(), name="old")
    await until(lambda: manager.get_task_info(older_than=0.01))
    manager.create_task(forever(), name="new")
    assert names(manager.get_task_info(older_than=0.01)) == ["old"]
    assert manager.get_task_info(older_than=3600) == []
    assert names(manager.get_task_info(older_than=0)) == ["old", "new"]
    await manager.shutdown()


async def test_some_tasks_in_order(make_manager):
    """The limit counts after sorting; the names that are equal keep their order."""
    manager = await started(make_manager)
    infos = manager.get_task_info(sort="newest")
    assert names(infos) == ["ask", "send", "load", "send"]
    assert names(manager.get_task_info(sort="oldest")) == names(reversed(infos))
    assert names(manager.get_task_info(sort="name")) == ["ask", "load", "send", "send"]
    assert [info["task_id"] for info in manager.get_task_info(name="send", sort="newest", limit=1)] == [3]
    assert names(manager.get_task_info(limit=2)) == ["send", "load"]
    assert len(manager.get_task_info(limit=100)) == 4
    await manager.shutdown()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"name": 5}, "name must be a name of tasks"),
        ({"state": "completed"}, r"state must be one of 'queued', 'waiting', 'running'.*get_history\(\)"),
        ({"older_than": -1}, "older_than must be a finite number of seconds"),
        ({"limit": 0}, "limit must be a whole number, 1 or more"),
        ({"sort": "age"}, "sort must be one of 'oldest', 'newest', 'name'"),
    ],
)
def test_invalid_arguments_are_named(make_manager, arguments, text):
    """The error says what is wrong with which argument, although there is no task."""
    with pytest.raises(InvalidOptionError, match=text):
        make_manager().get_task_info(**arguments)
