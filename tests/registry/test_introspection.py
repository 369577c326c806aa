"""What users see of tasks: frames, repr, names, counters, percentiles, history."""

import asyncio
import inspect
import io
import json
import logging
import os
import subprocess
import sys
import time
from functools import partial

import pytest
from loops import VirtualLoop
from work import failing, forever, value


async def inner():
    """Wait for ever, one frame down."""
    await asyncio.Event().wait()


async def outer():
    """Wait for ever in another coroutine."""
    await inner()


@pytest.mark.parametrize("way", ["create_task", "fire", "factory", "queued"])
async def test_stacks_show_the_users_frames(make_manager, way):
    """get_stack and print_stack show the same for a tracked task as for a bare one."""
    manager = make_manager(max_concurrency=5 if way == "queued" else None)
    loop = asyncio.get_running_loop()
    if way == "fire":
        manager.fire(outer())
    elif way == "factory":
        manager.task_factory(loop, outer())
    else:
        manager.create_task(outer())
    bare = asyncio.Task(outer(), loop=loop)
    await asyncio.sleep(0)
    task = manager.get_task(manager.get_task_info()[0]["task_id"])
    frames = [(frame.f_code.co_name, frame.f_lineno) for frame in task.get_stack()]
    assert frames == [(frame.f_code.co_name, frame.f_lineno) for frame in bare.get_stack()]
    assert frames[0][0] == "outer"
    texts = []
    for each in (task, bare):
        file = io.StringIO()
        each.print_stack(file=file)
        texts.append(file.getvalue().splitlines()[1:])
    assert texts[0] == texts[1]
    assert inspect.iscoroutine(task.get_coro())
    assert task.get_coro().cr_code is outer.__code__
    for each in (task, bare):
        each.cancel()
    await asyncio.wait([task, bare])


async def test_repr_shows_the_users_coroutine(make_manager):
    """The repr of a tracked task names the user's coroutine and line, while it runs and afterwards."""
    manager = make_manager()
    task = manager.create_task(outer(), name="shown")
    await asyncio.sleep(0)
    assert "name='shown' coro=<outer() running at " + __file__ in repr(task)
    task.cancel()
    await asyncio.wait([task])
    assert "coro=<outer() done, defined at " + __file__ in repr(task)


async def test_an_eager_task_knows_itself_in_its_first_step(make_manager):
    """Inside its first step, an eager task has its coroutine, frames and id."""
    manager = make_manager()
    seen = []

    async def work():
        task = asyncio.current_task()
        seen.append((task.get_coro().cr_code.co_name, manager.get_task_id(task)))

    await manager.create_task(work(), eager_start=True)
    assert seen == [("work", 1)]


async def test_all_tasks_and_current_task_know_it(make_manager):
    """asyncio.all_tasks lists a tracked task, which is the current one inside its coroutine."""
    manager = make_manager()
    task = manager.create_task(forever())
    await asyncio.sleep(0)
    assert task in asyncio.all_tasks()
    await manager.cancel_all()
    assert task not in asyncio.all_tasks()


@pytest.mark.skipif(not hasattr(asyncio, "print_call_graph"), reason="the interpreter has no call graphs before 3.14")
async def test_the_call_graph_shows_the_users_frames(make_manager):
    """asyncio.print_call_graph of a tracked task ends where the task waits."""
    manager = make_manager()
    task = manager.create_task(outer())
    await asyncio.sleep(0)
    text = asyncio.format_call_graph(task)
    assert "outer" in text
    assert "inner" in text
    await manager.cancel_all()


@pytest.mark.skipif(sys.version_info < (3, 14), reason="the interpreter has no pstree before 3.14")
@pytest.mark.loops("asyncio", "eager")
async def test_pstree_shows_the_users_frames(request, make_manager):
    """The output of ``python -m asyncio pstree`` ends where a tracked task waits."""
    manager = make_manager()
    if steps_records(request, manager):
        core = sys.modules["bgtasks._registry"]
        request.addfinalizer(partial(core.use_wrapper, "record"))
        core.use_wrapper("native")
    manager.create_task(outer(), name="mine")
    await asyncio.sleep(0)
    tracked = await pstree_of("mine")
    assert tracked.index("outer ") < tracked.index("inner ")
    await manager.cancel_all()


def steps_records(request, manager):
    """Return whether the tasks of a manager step their records by default."""
    return type(manager).__mro__[-3].__module__ == "bgtasks._registry" and not request.config.option.native


@pytest.mark.skipif(sys.version_info < (3, 14), reason="the interpreter has no pstree before 3.14")
@pytest.mark.loops("asyncio")
async def test_pstree_names_the_tasks_that_step_their_record(request, make_manager):
    """Such a task stands in the output of ``python -m asyncio pstree`` with its name, and without frames."""
    manager = make_manager()
    manager.create_task(outer(), name="mine")
    await asyncio.sleep(0)
    assert ("outer " in await pstree_of("mine")) is not steps_records(request, manager)
    await manager.cancel_all()


async def pstree_of(name):
    """Return the output of ``python -m asyncio pstree`` behind the name of a task."""
    command = [sys.executable, "-m", "asyncio", "pstree", str(os.getpid())]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode and "ermission" in done.stdout + done.stderr:
        pytest.skip("this machine does not allow a process to read another one")
    _, found, rest = done.stdout.partition(f"(T) {name}")
    assert found, done
    return rest


def test_public_coroutines_are_coroutine_functions(manager_of_twin):
    """inspect.iscoroutinefunction is true for the async methods of both twins."""
    manager = manager_of_twin.BackgroundTaskManager()
    for name in ("spawn", "cancel_all", "wait_for_all", "shutdown", "aclose", "__aenter__", "__aexit__"):
        assert inspect.iscoroutinefunction(getattr(manager, name))


def test_percentiles_match_the_durations(make_manager):
    """p50 and p99 of known durations are right within the width of a bucket, even if the wall clock jumps."""
    manager = make_manager()

    async def main():
        for milliseconds in range(1, 101):
            manager.create_task(asyncio.sleep(milliseconds / 1000), name="sleeps")
        await manager.wait_for_all()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())
    stats = manager.stats()["names"]["sleeps"]
    assert stats["p50_seconds"] == pytest.approx(0.050, rel=0.07)
    assert stats["p99_seconds"] == pytest.approx(0.099, rel=0.07)


def test_ages_do_not_follow_the_wall_clock(make_manager, monkeypatch):
    """Ages follow the monotonic clock: a jump of the wall clock does not change them."""
    manager = make_manager()

    async def main():
        manager.create_task(forever())
        monkeypatch.setattr(time, "time", lambda: -1e9)
        await asyncio.sleep(2)
        (info,) = manager.get_task_info()
        await manager.shutdown()
        return info["age_seconds"]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(main()) == pytest.approx(2)


async def test_names_are_counted_up_to_a_thousand(make_manager):
    """A thousand names have counters of their own; all further names share one entry."""
    manager = make_manager()
    for number in range(1005):
        manager.fire(value(), name=f"name {number}")
    await manager.wait_for_all()
    names = manager.stats()["names"]
    assert len(names) == 1001
    assert names["(other)"]["completed"] == 5
    assert manager.stats()["started"] == 1005


async def test_the_history_is_bounded_and_plain(make_manager, caplog):
    """The history keeps the last finished tasks, as values that json can write."""
    manager = make_manager(history=3)
    for number in range(5):
        manager.create_task(value(), name=f"n{number}", context={"object": object()})
    with caplog.at_level(logging.CRITICAL):
        manager.create_task(failing(ValueError("expected")), name="fails")
        await manager.wait_for_all(return_exceptions=True)
    history = manager.get_history()
    assert [entry["name"] for entry in history] == ["n3", "n4", "fails"]
    assert history[-1]["error"] == "ValueError: expected"
    assert history[-1]["outcome"] == "failed"
    assert json.loads(json.dumps(history)) == history
    assert abs(history[-1]["ended_at"] - time.time()) < 60
    assert make_manager().get_history() == []


async def test_info_and_statistics_can_be_written_as_json(make_manager):
    """Info and statistics are JSON-safe as far as the user's context is."""
    manager = make_manager()
    manager.create_task(forever(), context={"user": "alice"}, timeout=3)
    json.dumps([manager.get_task_info(), manager.stats(), await manager.shutdown()])
