"""What the registry measures and notes of tasks: durations, waits, errors, parents, origins, progress."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest
from loops import VirtualLoop
from work import failing, forever, until, value

from bgtasks import BUCKET_EDGES, BackgroundExecutor, InvalidOptionError, progress


class OddError(Exception):
    """An error with a module of its own."""


def run_virtually(coro):
    """Run a coroutine on a loop whose clock jumps."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coro)


def test_edges_are_those_of_the_buckets(make_manager):
    """Every duration is in the bucket below whose edge it is, and not below the edge before."""
    manager = make_manager()
    durations = [1.37**exponent for exponent in range(-30, 45)]

    async def main():
        for number, seconds in enumerate(durations):
            manager.create_task(asyncio.sleep(seconds), name=str(number))
        await manager.wait_for_all()

    run_virtually(main())
    histograms = manager.histograms()
    for number, seconds in enumerate(durations):
        duration = histograms[str(number)]["duration"]
        ((bucket, count),) = duration["buckets"]
        assert count == duration["count"] == 1
        assert duration["sum_seconds"] == duration["max_seconds"]
        assert duration["sum_seconds"] == pytest.approx(seconds, rel=0.01, abs=1e-3)
        assert bucket == 0 or BUCKET_EDGES[bucket - 1] <= duration["sum_seconds"]
        assert duration["sum_seconds"] < BUCKET_EDGES[bucket]
    assert list(BUCKET_EDGES) == sorted(set(BUCKET_EDGES))
    json.dumps(histograms)


def test_no_percentile_is_above_the_maximum(make_manager):
    """One second is in the lower half of its bucket, whose middle is above it."""
    manager = make_manager(max_concurrency=1)

    async def main():
        for _ in range(2):
            manager.create_task(asyncio.sleep(1), name="a")
        await manager.wait_for_all()

    run_virtually(main())
    stats = manager.stats()["names"]["a"]
    for figure in ("p50", "p90", "p99"):
        assert stats[f"{figure}_seconds"] == stats["max_seconds"] == pytest.approx(1, abs=0.002)
    assert stats["wait_p99_seconds"] == stats["wait_max_seconds"] == pytest.approx(1, abs=0.002)


def test_powers_of_two_are_edges():
    """Exporters can choose exact powers of two of a microsecond."""
    assert len(BUCKET_EDGES) == 329
    assert {2.0**power * 1e-6 for power in range(42)} <= set(BUCKET_EDGES)


def test_a_wait_for_a_slot_is_measured_apart_from_the_duration(make_manager):
    """With one slot, the third of three tasks of 10 s waits 20 s and lasts 10 s."""
    manager = make_manager(max_concurrency=1)

    async def main():
        for _ in range(3):
            manager.create_task(asyncio.sleep(10), name="a")
        await manager.wait_for_all()

    run_virtually(main())
    stats = manager.stats()["names"]["a"]
    assert stats["max_seconds"] == pytest.approx(10)
    assert stats["wait_max_seconds"] == pytest.approx(20)
    wait = manager.histograms()["a"]["wait"]
    assert wait["count"] == 3
    assert wait["sum_seconds"] == pytest.approx(30)


@pytest.mark.parametrize("method", ["create_task", "fire"])
async def test_a_wait_for_the_loop_is_measured(make_manager, method):
    """The time from the creation to the first step counts, once per task, and no wait is negative."""
    manager = make_manager()
    for _ in range(3):
        getattr(manager, method)(value(), name="a")
    manager.create_task(asyncio.sleep(0), name="a")
    time.sleep(0.02)
    await manager.wait_for_all()
    manager.create_task(value(), name="b")
    await manager.wait_for_all()
    wait = manager.histograms()["a"]["wait"]
    assert wait["count"] == 4
    # On a loop with eager tasks, those of create_task do not wait.
    is_eager = asyncio.get_running_loop().get_task_factory() is not None
    waited = 4 - (is_eager and 1) - 3 * (is_eager and method == "create_task")
    assert waited * 0.02 <= wait["sum_seconds"]
    assert manager.stats()["names"]["b"]["wait_max_seconds"] >= 0


@pytest.mark.loops("asyncio", "uvloop")
async def test_a_first_step_that_blocks_is_in_the_waits_behind_it(make_manager):
    """In a burst of tasks that suspend, each wait has all first steps before it, however long the one before was."""
    manager = make_manager()

    async def work(seconds):
        time.sleep(seconds)
        await asyncio.sleep(0.05)

    for number, seconds in enumerate((0, 0, 0.02, 0, 0.03, 0, 0)):
        manager.create_task(work(seconds), name=str(number))
    # Longer than what may be read as the time of a neighbour.
    time.sleep(0.01)
    await manager.wait_for_all()
    waits = [stats["wait_max_seconds"] for _, stats in sorted(manager.stats()["names"].items())]
    for wait, least in zip(waits, (0.01, 0.01, 0.01, 0.03, 0.03, 0.06, 0.06), strict=True):
        assert wait >= least * 0.97


async def test_a_task_that_never_began_has_no_wait(make_manager):
    """A task that is cancelled before its first step has waited for nothing."""
    manager = make_manager(max_concurrency=1)
    manager.create_task(forever(), name="a")
    manager.create_task(forever(), name="b").cancel()
    await asyncio.sleep(0)
    assert manager.stats()["names"]["b"]["wait_max_seconds"] is None
    await manager.shutdown()


async def test_the_last_error_of_a_name_is_kept_by_type(make_manager):
    """Builtin errors by name, others with their module; cancellations are none."""
    manager = make_manager()
    manager.create_task(failing(ValueError("1")), name="a")
    manager.create_task(failing(OddError()), name="b")
    manager.create_task(forever(), name="c").cancel()
    await manager.wait_for_all(return_exceptions=True)
    names = manager.stats()["names"]
    assert [names[name]["last_error"] for name in "abc"] == ["ValueError", f"{__name__}.OddError", None]


async def test_info_names_the_parent(make_manager):
    """A task created in a task of the manager has that one's id as its parent, also in its cleanup and when eager."""
    manager = make_manager()
    children = []

    async def parent():
        children.append(manager.create_task(forever()))
        children.append(manager.create_task(forever(), eager_start=True))
        try:
            await asyncio.sleep(0)
            children.append(manager.create_task(forever()))
            await forever()
        finally:
            children.append(manager.create_task(forever()))

    task = manager.create_task(parent(), name="parent")
    await until(lambda: len(children) == 3)
    outsider = manager.create_task(forever())
    task_id = manager.get_task_id(task)
    task.cancel()
    await until(task.done)
    parents = {info["task_id"]: info["parent_id"] for info in manager.get_task_info()}
    assert [parents[manager.get_task_id(child)] for child in children] == [task_id] * 4
    assert parents[manager.get_task_id(outsider)] is None
    await manager.shutdown()


async def test_tasks_of_a_foreign_factory_are_parents(make_manager):
    """A task that another factory built is found as the parent, too."""
    loop = asyncio.get_running_loop()
    manager = make_manager()
    before = loop.get_task_factory()
    loop.set_task_factory(lambda loop, coro, **options: asyncio.Task(coro, loop=loop, **options))

    async def parent():
        progress(1, 2)
        manager.create_task(forever(), name="child")
        await forever()

    manager.create_task(parent(), name="parent")
    await until(lambda: manager.get_task_count() == 2)
    first, second = manager.get_task_info()
    assert second["parent_id"] == first["task_id"]
    assert first["progress"] == {"done": 1, "total": 2, "text": None}
    await manager.shutdown()
    loop.set_task_factory(before)


async def test_track_origin_notes_the_line_of_the_creation(make_manager):
    """File and line of the caller, through spawn and fire; None without the option."""
    manager = make_manager(track_origin=True)
    line = test_track_origin_notes_the_line_of_the_creation.__code__.co_firstlineno
    manager.create_task(forever())
    manager.fire(forever())
    await manager.spawn(forever())
    assert [info["origin"] for info in manager.get_task_info()] == [f"{__file__}:{line + n}" for n in (4, 5, 6)]
    await manager.shutdown()
    assert all(records.notes == {} for records in manager._by_loop.values())


async def test_progress_is_shown_until_the_end(make_manager):
    """The last call counts, and nothing is left of it after the task."""
    manager = make_manager()
    said = []

    async def work():
        said.append(progress(1))
        said.append(progress(2.5, 10, "files"))
        await forever()

    assert not progress(1)
    manager.create_task(work())
    await until(lambda: len(said) == 2)
    (info,) = manager.get_task_info()
    assert info["progress"] == {"done": 2.5, "total": 10, "text": "files"}
    assert said == [True, True]
    await manager.shutdown()
    assert all(records.notes == {} for records in manager._by_loop.values())


def test_progress_without_a_loop_does_nothing():
    """A function that reports its progress can be called directly."""
    assert progress(1) is False


@pytest.mark.parametrize(
    "arguments", [("1",), (True,), (1, "2"), (1, 2, 3), (float("nan"),), (1, float("inf")), (10**400,), (-(10**5000),)]
)
def test_progress_refuses_what_it_cannot_show(arguments):
    """Wrong types are named, and so are numbers that JSON and terminals have not."""
    with pytest.raises(InvalidOptionError, match=r"must be a finite number|text must be a string"):
        progress(*arguments)


def test_track_origin_must_be_a_flag(make_manager):
    """The option is checked."""
    with pytest.raises(InvalidOptionError, match="track_origin must be True or False"):
        make_manager(track_origin="yes")


async def test_functions_have_no_parent_and_no_thread(make_manager):
    """Functions in threads are shown with the label of their executor."""
    manager = make_manager()
    release = threading.Event()
    executor = BackgroundExecutor(manager=manager)
    with executor as submit:
        future = submit(release.wait)
        await until(lambda: [info["state"] for info in manager.get_task_info()] == ["running"])
        (info,) = manager.get_task_info()
        release.set()
        future.result()
    assert (info["parent_id"], info["thread"]) == (None, None)
    assert info["loop"].startswith("ThreadsLoop-")
    (stats,) = manager.stats()["names"].values()
    assert stats["wait_max_seconds"] >= 0


def test_histograms_outlive_their_loops(make_manager):
    """The histograms of loops one after another are added up."""
    manager = make_manager()
    for seconds in (1, 5):
        run_virtually(manager_task(manager, seconds))
    duration = manager.histograms()["a"]["duration"]
    assert duration["count"] == 2
    assert (duration["sum_seconds"], duration["max_seconds"]) == (pytest.approx(6), pytest.approx(5))


async def manager_task(manager, seconds):
    """Run one task that sleeps."""
    manager.create_task(asyncio.sleep(seconds), name="a")
    await manager.wait_for_all()


async def test_parts_are_the_live_records_although_tasks_end_meanwhile(make_manager):
    """Ends of the last record of a part, of a whole part, and of records ahead lead to no gap and no repetition."""
    manager = make_manager()
    tasks = [manager.create_task(forever(), name=str(number)) for number in range(20)]
    (records,) = manager._by_loop.values()
    seen = []
    for part in records.parts(4):
        seen += [int(record.name) for record in part]
        for ending in {4: (3,), 8: (4, 5, 6, 7, 9), 11: (), 12: (0, 1, 2)}.get(len(seen), ()):
            tasks[ending].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert sorted(set(seen)) == seen
    assert set(seen) >= set(range(20)) - {9}
    assert [len(part) for part in records.parts(100)] == [manager.get_task_count()]
    await manager.shutdown()
    assert list(records.parts(4)) == []
