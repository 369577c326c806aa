"""Starting tasks, keeping them alive, and freeing them after their end."""

import asyncio
import collections.abc
import contextvars
import gc
import logging
import threading
import weakref

import pytest
from work import after, failing, failing_later, forever, until, value

from bgtasks import InvalidContextError

variable = contextvars.ContextVar("variable", default="unset")


async def read_variable():
    """Return the context variable after one suspension."""
    await asyncio.sleep(0)
    return variable.get()


async def test_returns_a_real_task_with_the_result(make_manager):
    """create_task returns an asyncio.Task; awaiting it gives the coroutine's result."""
    manager = make_manager()
    task = manager.create_task(value(42), name="answer")
    assert isinstance(task, asyncio.Task)
    assert task.get_name() == "answer"
    assert await task == 42
    assert manager.get_task_count() == 0


async def test_the_count_is_right_as_soon_as_the_task_was_awaited(make_manager):
    """The record of a task ends in the same iteration of the loop as the task."""
    manager = make_manager()
    await asyncio.gather(*(manager.create_task(value(), name=f"n{i}") for i in range(100)))
    assert manager.get_task_count() == 0
    assert manager.stats()["completed"] == 100


async def test_tasks_of_one_name_do_not_evict_each_other(make_manager):
    """A hundred live tasks of one name count as a hundred; when one ends, ninety-nine are left."""
    manager = make_manager()
    first, others = asyncio.Event(), asyncio.Event()
    task = manager.create_task(after(first), name="same")
    for _ in range(99):
        manager.create_task(after(others), name="same")
    assert manager.get_task_count() == 100
    first.set()
    await task
    assert manager.get_task_count() == 99
    assert len({info["task_id"] for info in manager.get_task_info()}) == 99
    others.set()
    await manager.wait_for_all()


async def test_info_shows_the_given_options(make_manager):
    """get_task_info has the keys of the reference, and id, state and coroutine name."""
    manager = make_manager()
    task = manager.create_task(forever(), name="waits", timeout=30, context={"user": "alice"})
    manager.create_task(forever())
    (info, plain) = manager.get_task_info()
    assert info.pop("age_seconds") >= 0
    assert 29 < info.pop("time_left_seconds") <= 30
    assert info.pop("loop") == plain["loop"]
    assert info == {
        "task_id": manager.get_task_id(task),
        "name": "waits",
        "coroutine": "forever",
        "state": "running",
        "timeout": 30.0,
        "context": {"user": "alice"},
        "attempt": 1,
        "next_attempt_seconds": None,
        "done": False,
        "cancelled": False,
        "service": False,
        "parent_id": None,
        "thread": threading.current_thread().name,
        "origin": None,
        "progress": None,
    }
    assert (plain["name"], plain["timeout"], plain["context"]) == ("forever", None, {})
    assert manager.get_task(info["task_id"]) is task
    await manager.shutdown()


async def test_a_task_without_other_references_is_not_collected(make_manager):
    """A task that waits for a future without other references survives the collector, and so does its manager."""
    manager = make_manager()
    seen = []

    async def waits():
        future = asyncio.get_running_loop().create_future()
        seen.append(weakref.ref(future))
        seen.append(await future)

    manager.create_task(waits())
    fired = weakref.ref(manager)
    await until(lambda: seen)
    gc.collect()
    assert fired() is not None
    seen[0]().set_result("done")
    await manager.wait_for_all()
    assert seen[1] == "done"


@pytest.mark.parametrize("ending", ["result", "error", "cancelled", "cancelled before the start", "timeout"])
async def test_a_finished_task_is_freed(make_manager, ending, caplog):
    """After every kind of end the registry is empty, and the task, its coroutine's locals and its context are freed."""
    manager = make_manager()

    class Local:
        pass

    async def work():
        local = Local()
        kept.append(weakref.ref(local))
        await asyncio.sleep(0)
        if ending == "error":
            raise ValueError("expected")
        if ending in ("cancelled", "timeout"):
            await asyncio.Event().wait()

    class Mapping(dict):
        pass

    kept = []
    context = Mapping()
    kept.append(weakref.ref(context))
    task = manager.create_task(work(), timeout=0.001 if ending == "timeout" else None, context=context)
    kept.append(weakref.ref(task))
    del context
    if ending == "cancelled before the start":
        task.cancel()
    elif ending == "cancelled":
        await asyncio.sleep(0)
        task.cancel()
    with caplog.at_level(logging.CRITICAL):
        await manager.wait_for_all(return_exceptions=True)
    assert manager.get_task_count() == 0
    del task
    caplog.clear()
    # asyncio itself keeps a cancelled task in a cycle with the traceback of its CancelledError.
    gc.collect()
    await asyncio.sleep(0)
    assert [reference() for reference in kept] == [None] * len(kept)


async def test_contextvars_are_those_of_the_caller(make_manager):
    """A task sees a copy of the caller's context variables, or the contextvars.Context passed in."""
    manager = make_manager()
    token = variable.set("outer")
    inherited = manager.create_task(read_variable())
    context = contextvars.copy_context()
    context.run(variable.set, "given")
    given = manager.create_task(read_variable(), contextvars_context=context)
    variable.reset(token)
    assert (await inherited, await given, variable.get()) == ("outer", "given", "unset")


async def test_one_context_serves_several_tasks(make_manager):
    """Tasks may share a contextvars.Context; an eager start in one that is entered raises and loses nothing."""
    manager = make_manager()
    context = contextvars.copy_context()
    tasks = [manager.create_task(read_variable(), contextvars_context=context) for _ in range(3)]
    assert await asyncio.gather(*tasks) == ["unset"] * 3
    assert manager.stats()["completed"] == 3


async def test_a_context_of_the_wrong_kind_is_refused(make_manager):
    """A contextvars.Context as context, or a dict as contextvars_context, is refused; the error names the right one."""
    manager = make_manager()
    with pytest.raises(InvalidContextError, match="contextvars_context="):
        manager.create_task(value(), context=contextvars.copy_context())
    with pytest.raises(InvalidContextError, match="context="):
        manager.create_task(value(), contextvars_context={"user": "alice"})
    with pytest.raises(TypeError, match="mapping"):
        manager.create_task(value(), context="user")
    assert manager.stats()["started"] == 0


async def test_eager_start_runs_to_the_first_suspension(make_manager, loop_kind):
    """With eager_start the coroutine starts inside create_task if the interpreter can, else in the next iteration."""
    manager = make_manager()
    seen = []

    async def work():
        seen.append("started")
        assert manager.get_task_count() == 1
        await asyncio.sleep(0)
        seen.append("ended")

    task = manager.create_task(work(), eager_start=True, timeout=30)
    if hasattr(asyncio, "eager_task_factory"):
        assert seen == ["started"]
    await task
    assert seen == ["started", "ended"]


async def test_an_eager_task_that_ends_at_once_leaves_no_record(make_manager, caplog):
    """Eager coroutines that return, raise or cancel themselves inside create_task are finished and counted."""
    manager = make_manager()

    async def cancels_itself():
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    async def spawns():
        return await manager.create_task(value(1), eager_start=True)

    with caplog.at_level(logging.CRITICAL):
        returned = manager.create_task(value(7), eager_start=True, timeout=5)
        raised = manager.create_task(failing(ValueError("expected")), eager_start=True)
        cancelled = manager.create_task(cancels_itself(), eager_start=True)
        nested = manager.create_task(spawns(), eager_start=True)
        await asyncio.wait([returned, raised, cancelled, nested])
    assert returned.result() == 7
    assert isinstance(raised.exception(), ValueError)
    assert cancelled.cancelled()
    assert nested.result() == 1
    stats = manager.stats()
    assert (stats["completed"], stats["failed"], stats["cancelled"], stats["in_flight"]) == (3, 1, 1, 0)


async def test_coroutine_like_objects_are_accepted(make_manager):
    """An object with send, throw and close runs, suspends, is cancelled and fails like a native coroutine."""

    class Like(collections.abc.Coroutine):
        def __init__(self, coro):
            self.coro = coro

        def send(self, value):
            return self.coro.send(value)

        def throw(self, *error):
            return self.coro.throw(*error)

        def close(self):
            self.coro.close()

        def __await__(self):
            return self

    manager = make_manager()
    task = manager.create_task(Like(asyncio.sleep(0.001, "slept")))
    stopped = [manager.create_task(Like(forever())) for _ in range(2)]
    stopped[0].cancel()
    await asyncio.sleep(0)
    stopped[1].cancel()
    assert await task == "slept"
    await asyncio.wait(stopped)
    assert [task.cancelled() for task in stopped] == [True, True]


@pytest.mark.parametrize("name", [None, 7, "x"])
async def test_names_of_any_kind_become_text(make_manager, name):
    """A name that is no string is converted, as in asyncio; None gives the coroutine function's."""
    manager = make_manager()
    task = manager.create_task(value(), name=name)
    assert task.get_name() == ("value" if name is None else str(name))
    await task


class Oddly(collections.abc.Coroutine):
    """A coroutine of a user's class, whose qualified name is no string."""

    def __init__(self, qualname):
        self.__dict__["__qualname__"] = qualname

    def send(self, value):
        raise StopIteration

    def throw(self, *error):
        raise error[0]

    def __await__(self):
        yield


@pytest.mark.parametrize("start", ["create_task", "fire", "spawn", "create_task_threadsafe"])
async def test_a_task_without_a_name_has_the_coroutine_functions(make_manager, start):
    """Counters, info, history and the task itself tell the tasks of two functions apart, however they were started."""
    manager = make_manager(history=3)

    release = asyncio.Event()

    async def send_mail():
        await release.wait()

    await manager.create_task(value())
    own = send_mail.__qualname__
    started = getattr(manager, start)(send_mail())
    if start == "spawn":
        await started
    await until(lambda: [info["name"] for info in manager.get_task_info()] == [own])
    release.set()
    await manager.wait_for_all()
    assert set(manager.stats()["names"]) == {"value", own}
    assert [each["name"] for each in manager.get_history()] == ["value", own]


async def test_a_coroutine_without_a_text_as_its_name(make_manager):
    """The name of its class is used instead."""
    manager = make_manager()
    await manager.create_task(Oddly(5))
    assert set(manager.stats()["names"]) == {"Oddly"}


async def test_debug_mode_remembers_the_users_line(make_manager):
    """In debug mode the source traceback of a task begins where create_task was called."""
    manager = make_manager()
    task = manager.create_task(value())
    created = "created at " + __file__
    assert created in repr(task) or task.done()
    await task


async def test_an_await_in_a_task_sees_its_own_task(make_manager):
    """Inside the coroutine current_task() is the tracked task; asyncio.timeout and cancellation work as usual."""
    manager = make_manager()

    async def work():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await asyncio.Event().wait()
        return asyncio.current_task()

    task = manager.create_task(work())
    assert await task is task


async def test_every_end_is_counted_once(make_manager, caplog):
    """The outcomes add up to the started tasks, by name and in total."""
    manager = make_manager(history=10)
    with caplog.at_level(logging.CRITICAL):
        manager.create_task(value(), name="fine")
        manager.create_task(failing_later(ValueError("expected")), name="fails")
        manager.create_task(forever(), name="late", timeout=0.001)
        manager.create_task(forever(), name="stopped").cancel()
        await manager.wait_for_all(return_exceptions=True)
    stats = manager.stats()
    assert [stats[key] for key in ("started", "completed", "failed", "timed_out", "cancelled")] == [4, 1, 1, 1, 1]
    assert stats["names"]["late"]["timed_out"] == 1
    assert {entry["name"]: entry["outcome"] for entry in manager.get_history()} == {
        "fine": "completed",
        "fails": "failed",
        "late": "timed_out",
        "stopped": "cancelled",
    }


async def test_a_manager_is_true_when_empty_and_made_without_a_loop(make_manager):
    """A manager without tasks is true."""
    manager = make_manager()
    assert manager
    assert manager.get_task_count() == 0
    assert "open, 0 tasks" in repr(manager)


@pytest.mark.parametrize("queued", [False, True])
async def test_a_task_cancelled_before_its_first_step_is_counted_when_its_awaiter_wakes(make_manager, queued):
    """Its coroutine is never entered; it is no longer counted when a coroutine that awaits it wakes up."""
    manager = make_manager(max_concurrency=1 if queued else None)
    entered = []

    async def work():
        entered.append(1)

    async def watch():
        with pytest.raises(asyncio.CancelledError, match="at once"):
            await task
        return manager.stats()["cancelled"], [each["name"] for each in manager.get_task_info()]

    async def cancel():
        task.cancel("at once")

    # An eager factory would run the task before it can be cancelled.
    asyncio.get_running_loop().set_task_factory(None)
    if queued:
        manager.create_task(forever(), name="holds the slot")
    # Built without the loop's factory, so that all three take their first steps in the next iteration, in this order.
    watcher = asyncio.Task(watch(), loop=asyncio.get_running_loop())
    canceller = asyncio.Task(cancel(), loop=asyncio.get_running_loop())
    task = manager.create_task(work())
    assert await watcher == (1, ["holds the slot"] * queued)
    assert task.cancelled()
    assert not entered
    await canceller
    await manager.cancel_all()


async def test_a_task_runs_if_its_cancellation_is_undone_before_the_first_step(make_manager):
    """From Python 3.13 on, after uncancel() before the first step the task runs as usual."""
    manager = make_manager()
    task = manager.create_task(value(7))
    bare = asyncio.get_running_loop().create_task(value(7))
    for each in (task, bare):
        each.cancel()
        each.uncancel()
    outcomes = await asyncio.gather(task, bare, return_exceptions=True)
    assert repr(outcomes[0]) == repr(outcomes[1])
    assert manager.stats()["completed" if outcomes[0] == 7 else "cancelled"] == 1


async def test_an_eager_task_cancels_the_one_that_starts_it(make_manager):
    """A task inside its constructor can be cancelled by a task that it starts, which is not itself cancelled."""
    manager = make_manager()
    cancelled = []

    async def inner():
        cancelled.append(manager.cancel("outer"))
        await asyncio.sleep(0)
        return "goes on"

    async def outer():
        started.append(manager.create_task(inner(), name="inner", eager_start=True))
        await forever()

    started = []
    task = manager.create_task(outer(), name="outer", eager_start=True)
    await asyncio.wait([task], timeout=2)
    assert task.cancelled()
    assert await started[0] == "goes on"
    assert cancelled == [1]
