"""How many tasks of a name or a key run at once, and how many begin in a time."""

from __future__ import annotations

import asyncio
import threading

import pytest
from loops import VirtualLoop
from work import forever

from bgtasks import InvalidOptionError, Limit, Rate, Retry


def virtually(main):
    """Run a coroutine function on a loop with a virtual clock; it gets the loop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main(runner.get_loop()))


def noting(loop, seconds=0.0):
    """Return a coroutine function that notes the times at which it begins, since now."""
    begun = loop.time()
    times = []

    async def work(number=None):
        times.append((number, round(loop.time() - begun, 3)))
        await asyncio.sleep(seconds)

    work.times = times
    return work


def starts(work):
    """Return the times."""
    return [time for _, time in work.times]


@pytest.mark.parametrize("start", ["create_task", "fire", "submit", "fire_function"])
def test_tasks_begin_at_the_rate(make_manager, start):
    """Evenly, in order, after the burst; the others are shown as queued."""

    async def main(loop):
        manager = make_manager(rate=Rate(10, per=1.0, burst=3))
        work = noting(loop)
        for number in range(6):
            if start in ("create_task", "fire"):
                getattr(manager, start)(work(number))
            else:
                getattr(manager, start)(work, number)
        await asyncio.sleep(0.05)
        assert [info["state"] for info in manager.get_task_info()] == ["queued"] * 3
        await manager.wait_for_all()
        assert [number for number, _ in work.times] == list(range(6))
        assert starts(work) == pytest.approx([0, 0, 0, 0.1, 0.2, 0.3], abs=0.002)
        # After a pause a burst is allowed again.
        await asyncio.sleep(10)
        late = noting(loop)
        for _ in range(4):
            manager.create_task(late())
        await manager.wait_for_all()
        assert starts(late) == pytest.approx([0, 0, 0, 0.1], abs=0.002)

    virtually(main)


def test_a_rate_holds_in_every_window(make_manager):
    """However the tasks come: ``burst + t * rate`` at most in ``t`` seconds."""

    async def main(loop):
        manager = make_manager(rate=Rate(5, burst=4))
        work = noting(loop)
        for pause in [0, 0, 0.05, 0.3, 2, 0, 0, 0, 0, 0, 0, 0.1, 0.1, 0.1, 3, 0, 0, 0, 0, 0]:
            await asyncio.sleep(pause)
            manager.create_task(work())
        await manager.wait_for_all()
        times = starts(work)
        assert len(times) == 20
        for first, begin in enumerate(times):
            for last in range(first, len(times)):
                assert last - first + 1 <= 4 + (times[last] - begin) * 5 + 0.02

    virtually(main)


def test_a_cancelled_task_leaves_its_place_to_the_next_one(make_manager):
    """The rate is used although tasks of the queue are cancelled."""

    async def main(loop):
        manager = make_manager(rate=Rate(1))
        work = noting(loop)
        tasks = [manager.create_task(work(number)) for number in range(5)]
        await asyncio.sleep(0.5)
        for task in tasks[1:4]:
            task.cancel()
        await manager.wait_for_all()
        assert work.times == [(0, 0.0), (4, pytest.approx(1.0, abs=0.002))]

    virtually(main)


def test_limits_by_name(make_manager):
    """They hold beside each other; other names have none."""

    async def main(loop):
        manager = make_manager(limits={"mail": Limit(concurrency=2), "webhook": Limit(rate=Rate(2))})
        mails, hooks, others = (noting(loop, 1) for _ in range(3))
        for _ in range(5):
            manager.create_task(mails(), name="mail")
            manager.fire(hooks(), name="webhook")
            manager.create_task(others(), name="other")
        await manager.wait_for_all()
        assert starts(mails) == pytest.approx([0, 0, 1, 1, 2], abs=0.01)
        assert starts(hooks) == pytest.approx([0, 0.5, 1, 1.5, 2], abs=0.01)
        assert starts(others) == [0] * 5

    virtually(main)


def test_limits_by_key(make_manager):
    """The limit of the key comes before that of the name."""

    async def main(loop):
        manager = make_manager(limits={("user", 1): Limit(rate=Rate(1)), "work": Limit(rate=Rate(100))})
        work = noting(loop)
        for _ in range(3):
            await manager.submit(work, key=("user", 1), name="work")
        assert starts(work) == pytest.approx([0, 1, 2], abs=0.01)
        other = noting(loop)
        for _ in range(3):
            await manager.submit(other, key=("user", 2), name="work")
        assert starts(other) == pytest.approx([0, 0.01, 0.02], abs=0.005)

    virtually(main)


def test_limits_and_those_of_the_manager(make_manager):
    """Both hold."""

    async def main(loop):
        manager = make_manager(max_concurrency=3, limits={"mail": Limit(concurrency=2, rate=Rate(4))})
        mails, others = noting(loop, 1), noting(loop, 1)
        for _ in range(3):
            manager.create_task(mails(), name="mail")
        for _ in range(3):
            manager.create_task(others())
        await manager.wait_for_all()
        # Two others had the slots of the manager when the second mail was due.
        assert starts(mails) == pytest.approx([0, 1, 1], abs=0.01)
        assert starts(others) == pytest.approx([0, 0, 1], abs=0.01)

    virtually(main)


def test_every_attempt_waits_for_the_rate(make_manager):
    """A retry is a start."""

    async def main(loop):
        manager = make_manager(rate=Rate(1))
        work = noting(loop)

        async def fail():
            await work()
            raise ValueError

        task = manager.submit(fail, retry=Retry(on=ValueError, attempts=3, wait=0, jitter=0))
        await asyncio.wait([task])
        assert starts(work) == pytest.approx([0, 1, 2], abs=0.01)

    virtually(main)


def test_shutdown_ends_queued_tasks(make_manager):
    """None of them begins, and no timer is left."""

    async def main(loop):
        manager = make_manager(rate=Rate(0.001))
        work = noting(loop)
        for number in range(3):
            manager.create_task(work(number))
        await asyncio.sleep(0)
        stats = await manager.shutdown()
        assert (stats["status"], manager.stats()["cancelled"], starts(work)) == ("completed", 3, [0])
        assert [timer for timer in loop._scheduled if not timer.cancelled()] == []

    virtually(main)


async def test_a_rate_on_every_loop(make_manager):
    """In real time."""
    manager = make_manager(rate=Rate(200))
    loop = asyncio.get_running_loop()
    work = noting(loop)
    for _ in range(5):
        manager.create_task(work())
    await manager.wait_for_all()
    assert all(time >= number * 0.005 - 0.001 for number, time in enumerate(starts(work)))


def test_a_rate_over_two_loops(make_manager):
    """It is one rate; the end of a loop whose tasks wait does not stop those of the other."""
    manager = make_manager(rate=Rate(20))
    begun = threading.Barrier(2)
    ended = []

    def abandon():
        async def main():
            begun.wait()
            for _ in range(3):
                manager.create_task(forever())

        asyncio.run(main())

    async def main():
        begun.wait()
        for _ in range(5):
            manager.create_task(asyncio.sleep(0))
        await manager.wait_for_all(timeout=20)
        ended.append(manager.stats()["completed"])

    other = threading.Thread(target=abandon)
    other.start()
    asyncio.run(main())
    other.join()
    assert ended == [5]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0,), "count"),
        ((-1,), "count"),
        ((float("inf"),), "count"),
        ((float("nan"),), "count"),
        (("many",), "count"),
        ((1, 0), "per"),
        ((1, float("nan")), "per"),
        ((1, 1.0, 0), "burst"),
        ((1, 1.0, 1.5), "burst"),
        ((1, 1.0, None), "burst"),
    ],
    ids=repr,
)
def test_a_wrong_rate_is_refused(arguments, text):
    """With the named error."""
    with pytest.raises(InvalidOptionError, match=text):
        Rate(*arguments)


def test_wrong_limits_are_refused(make_manager):
    """Before there is a manager."""
    with pytest.raises(InvalidOptionError, match="pass concurrency="):
        Limit()
    with pytest.raises(InvalidOptionError, match="concurrency"):
        Limit(concurrency=0)
    with pytest.raises(InvalidOptionError, match="rate must be a"):
        Limit(rate=5)
    with pytest.raises(InvalidOptionError, match="rate must be a"):
        make_manager(rate=5)
    with pytest.raises(InvalidOptionError, match="limits must be a mapping"):
        make_manager(limits=[Limit(concurrency=1)])
    with pytest.raises(InvalidOptionError, match=r"limits\['mail'\] must be a bgtasks.Limit; got 5"):
        make_manager(limits={"mail": 5})
