"""fire(): the cheapest way to start a task, with the promises of create_task."""

import asyncio
import contextvars
import logging
import weakref

import pytest
from work import failing, forever, until, value

variable = contextvars.ContextVar("variable", default="unset")


async def test_starts_in_the_next_iteration_in_order(make_manager, loop_kind):
    """No task runs inside fire; tasks start in the order of the calls, those of create_task included."""
    manager = make_manager()
    seen = []

    async def work(number):
        seen.append(number)
        await asyncio.sleep(0)

    for number in range(6):
        if number in (2, 3):
            manager.create_task(work(number))
        else:
            manager.fire(work(number))
    assert not {0, 1, 4, 5} & set(seen)
    assert manager.get_task_count() == 6
    await manager.wait_for_all()
    # On a loop with eager tasks, create_task starts its task inside the call.
    assert seen == ([2, 3, 0, 1, 4, 5] if loop_kind == "eager" else [0, 1, 2, 3, 4, 5])


async def test_a_fired_task_is_shown_at_once(make_manager):
    """get_task_info shows a fired task, with name, timeout and context, before it has started."""
    manager = make_manager()
    assert manager.fire(forever(), name="fired", timeout=5, context={"a": 1}) is True
    (info,) = manager.get_task_info()
    assert (info["name"], info["timeout"], info["context"], info["state"]) == ("fired", 5.0, {"a": 1}, "running")
    assert info["age_seconds"] >= 0
    await manager.shutdown()


async def test_sees_the_context_variables_of_its_call(make_manager):
    """Each fired task runs in a copy of the context of its own call."""
    manager = make_manager()
    seen = []

    async def work():
        seen.append(variable.get())
        variable.set("changed inside")

    for text in ("a", "b"):
        token = variable.set(text)
        manager.fire(work())
        variable.reset(token)
    manager.fire(work())
    await manager.wait_for_all()
    assert seen == ["a", "b", "unset"]
    assert variable.get() == "unset"


async def test_the_context_is_free_after_the_end(make_manager):
    """The value of a context variable in a fired task is freed after the end of the task."""
    manager = make_manager()

    class Held:
        pass

    held = Held()
    gone = weakref.ref(held)
    context = contextvars.copy_context()
    context.run(variable.set, held)
    context.run(manager.fire, value())
    del context, held
    await manager.wait_for_all()
    assert gone() is None


async def test_can_be_cancelled_before_it_starts(make_manager):
    """A fired task that is cancelled before its start never runs and counts as cancelled."""
    manager = make_manager()
    manager.fire(failing(AssertionError("must not run")), name="fired")
    assert manager.cancel("fired") == 1
    await manager.wait_for_all()
    assert manager.stats()["cancelled"] == 1


async def test_a_cancel_all_in_the_same_iteration_reaches_it(make_manager):
    """cancel_all right after fire leaves no task running."""
    manager = make_manager()
    manager.fire(forever())
    await manager.cancel_all()
    await until(lambda: manager.get_task_count() == 0)


async def test_its_timeout_is_kept(make_manager, caplog):
    """A fired task that outlasts its timeout is cancelled and counted as timed out."""
    manager = make_manager()
    with caplog.at_level(logging.CRITICAL):
        manager.fire(forever(), timeout=0.002)
        await manager.wait_for_all(return_exceptions=True)
    assert manager.stats()["timed_out"] == 1


async def test_a_failure_is_logged_once(make_manager, caplog):
    """The failure of a fired task is one ERROR record with its traceback."""
    manager = make_manager()
    manager.fire(failing(ValueError("expected")), name="fired")
    await manager.wait_for_all(return_exceptions=True)
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info[1].args == ("expected",)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_does_not_lose_the_batch(make_manager, error):
    """After a KeyboardInterrupt in one fired task, the others start when the loop runs again."""
    manager = make_manager()
    seen = []

    async def work(number):
        seen.append(number)
        if number == 1:
            raise error

    async def main():
        for number in range(4):
            manager.fire(work(number))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    try:
        main_task = loop.create_task(main())
        with pytest.raises(error):
            loop.run_until_complete(main_task)
        loop.run_until_complete(main_task)
        loop.run_until_complete(manager.wait_for_all(return_exceptions=True))
    finally:
        loop.close()
    assert sorted(seen) == [0, 1, 2, 3]
    assert manager.stats()["failed"] == 1


async def test_a_foreign_factory_is_honoured(make_manager):
    """If the loop has a task factory, fire calls it at once."""
    manager = make_manager()
    loop = asyncio.get_running_loop()
    made = []

    def factory(loop, coro, **kwargs):
        made.append(coro)
        return asyncio.Task(coro, loop=loop, **kwargs)

    usual = loop.get_task_factory()
    loop.set_task_factory(factory)
    manager.fire(value())
    loop.set_task_factory(usual)
    assert len(made) == 1
    await manager.wait_for_all()
    assert manager.stats()["completed"] == 1
