"""manager.task_factory: every task of a program is counted and shown, and behaves as without it."""

import asyncio
import gc
import logging

import pytest
from work import failing_later, forever, value


@pytest.fixture
def observing(make_manager):
    """Give a manager, and a context manager that sets its factory on the running loop."""

    class Observing:
        manager = make_manager()

        def __enter__(self):
            self.loop = asyncio.get_running_loop()
            self.usual = self.loop.get_task_factory()
            self.loop.set_task_factory(self.manager.task_factory)
            return self.manager

        def __exit__(self, *error):
            self.loop.set_task_factory(self.usual)

    return Observing()


async def test_tasks_of_others_are_seen(observing):
    """Tasks that know nothing of the manager have the name they were given, or else that of their coroutine."""
    with observing as manager:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(asyncio.sleep(0.001), name="other")
            group.create_task(value())
            group.create_task(asyncio.sleep(0.001))
            await asyncio.sleep(0)
            info, other = manager.get_task_info()
            assert other["name"] == "sleep"
            assert (info["name"], info["coroutine"], info["state"]) == ("other", "sleep", "running")
            assert manager.get_task(info["task_id"]) is task
    stats = manager.stats()
    assert (stats["started"], stats["completed"]) == (3, 3)
    assert {name: counters["completed"] for name, counters in stats["names"].items()} == {
        "other": 1,
        "value": 1,
        "sleep": 1,
    }


@pytest.mark.parametrize("late", [False, True], ids=["given", "set"])
async def test_a_task_has_one_name(observing, late):
    """Info, history, statistics and cancel know a task by the same name, whenever the loop gave it."""
    with observing as manager:
        loop = asyncio.get_running_loop()
        task = loop.create_task(forever(), **({} if late else {"name": "given"}))
        if late:
            task.set_name("given")
        assert [info["name"] for info in manager.get_task_info()] == ["given"]
        assert list(manager.stats()["names"]) == ["given"]
        await asyncio.sleep(0)
        assert manager.cancel("given") == 1
        await asyncio.wait([task])
    stats = manager.stats()["names"]
    assert {name: counters["cancelled"] for name, counters in stats.items()} == {"given": 1}
    assert task.get_name() == "given"


async def test_the_loop_reports_errors_of_observed_tasks(observing, caplog, loop_errors):
    """The manager does not log an exception of an observed task; the loop reports it once if it is not retrieved."""
    with observing as manager:
        with pytest.raises(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                group.create_task(failing_later(ValueError("handled")))
        task = asyncio.get_running_loop().create_task(failing_later(ValueError("not retrieved")))
        await asyncio.wait([task])
        del task
        gc.collect()
    assert not [record for record in caplog.records if record.name == "bgtasks"]
    assert [context["message"] for context in loop_errors] == ["Task exception was never retrieved"]
    loop_errors.clear()
    assert manager.stats()["failed"] == 2


async def test_shutdown_and_caps_ignore_observed_tasks(observing):
    """Shutdown neither waits for observed tasks nor cancels them; they may start after it. cancel() reaches them."""
    with observing as manager:
        task = asyncio.get_running_loop().create_task(forever(), name="other")
        await asyncio.sleep(0)
        await manager.wait_for_all()
        await manager.shutdown()
        later = asyncio.get_running_loop().create_task(value(3))
        assert await later == 3
        assert not task.done()
        assert manager.cancel("other") == 1
        await asyncio.wait([task])
    assert task.cancelled()


async def test_the_managers_own_tasks_are_tracked_once(observing):
    """create_task and fire on a loop with the manager's own factory make one record each, of an owned task."""
    with observing as manager:
        assert await manager.create_task(value(1), name="own") == 1
        manager.fire(value(2), name="own")
        await manager.wait_for_all()
    assert manager.stats()["started"] == 2
    assert manager.stats()["names"]["own"]["completed"] == 2


async def test_an_object_that_is_no_coroutine_is_refused_as_by_asyncio(observing):
    """For a wrong argument, asyncio raises its own error."""
    with observing as manager, pytest.raises(TypeError, match="a coroutine was expected"):
        manager.task_factory(asyncio.get_running_loop(), 7)


def test_a_whole_program_runs_under_the_factory(make_manager, caplog):
    """asyncio.run with the factory set gives the right results, cleanup and counters."""
    manager = make_manager()

    async def main():
        asyncio.get_running_loop().set_task_factory(manager.task_factory)
        left = asyncio.ensure_future(forever())
        queue = asyncio.Queue()
        producer = asyncio.ensure_future(queue.put(5))
        async with asyncio.timeout(5):
            assert await queue.get() == 5
        await producer
        return left

    with caplog.at_level(logging.DEBUG):
        assert asyncio.run(main()).cancelled()
    stats = manager.stats()
    assert stats["in_flight"] == 0
    assert stats["cancelled"] == 1


async def test_renamed_tasks_are_counted_when_the_names_are_full(make_manager):
    """A name that a rename leaves empty makes room for another, and takes no counter with it."""
    manager = make_manager()
    loop = asyncio.get_running_loop()
    for number in range(999):
        manager.create_task(value(), name=str(number))
    first, other = (manager.task_factory(loop, value(), name=name) for name in ("first", "other"))
    # The only task of this name, which is then free; the new name is known.
    first.set_name("0")
    tasks = [manager.task_factory(loop, value(), name="other")]
    # It was counted with all names beyond the limit, not with the task of its name.
    other.set_name("1")
    assert manager.stats()["names"]["other"]["started"] == 1
    name = tasks[0].get_name()
    tasks[0].set_name("one too many")
    tasks.append(manager.task_factory(loop, value(), name=name))
    await asyncio.wait([first, other, *tasks])
    await manager.wait_for_all()
    assert manager.stats()["started"] == manager.stats()["completed"] == 1003
