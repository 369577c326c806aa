"""Functions that run again and again: without drift, never early, never two at once."""

from __future__ import annotations

import asyncio
import logging
import math
from datetime import datetime, timedelta

import pytest
from loops import VirtualLoop
from requirements import need

from bgtasks import (
    InvalidContextError,
    InvalidFunctionError,
    InvalidOptionError,
    InvalidTimeoutError,
    ManagerClosedError,
    NoRunningLoopError,
)
from bgtasks.policies import _schedules


def virtually(main):
    """Run a coroutine function on a loop with a virtual clock; it gets the loop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        return runner.run(main(loop))


def clock(loop, seconds=0.0, error=None):
    """Return a coroutine function that notes when it runs, in seconds from now, and takes its time."""
    begun = loop.time()
    times = []

    async def work():
        times.append(round(loop.time() - begun, 6))
        await asyncio.sleep(seconds)
        if error is not None:
            raise error

    work.times = times
    return work


@pytest.mark.parametrize(("first", "times"), [("now", [0, 10, 20, 30]), ("later", [10, 20, 30])])
def test_it_runs_without_drift(make_manager, first, times):
    """The time that a run takes does not move the next one."""

    async def main(loop):
        manager = make_manager()
        work = clock(loop, 3)
        schedule = manager.every(10, work, first=first)
        await asyncio.sleep(35)
        assert work.times == times
        assert schedule.runs == len(times)
        assert schedule.next_run_seconds == pytest.approx(5)
        assert [outcome.outcome for outcome in schedule.outcomes] == ["completed"] * len(times)
        await manager.shutdown()

    virtually(main)


def test_a_late_tick_is_dropped_and_counted(make_manager):
    """A loop that is blocked for 35 seconds runs the function once, then on the grid again."""

    async def main(loop):
        manager = make_manager()
        work = clock(loop)
        schedule = manager.every(10, work)
        await asyncio.sleep(5)
        loop.now += 40
        await asyncio.sleep(10)
        assert work.times == [0, 45, 50]
        assert (schedule.runs, schedule.late, schedule.skipped) == (3, 3, 0)
        await manager.shutdown()

    virtually(main)


def test_a_tick_skips_a_run_that_has_not_ended(make_manager):
    """By default."""

    async def main(loop):
        manager = make_manager()
        work = clock(loop, 15)
        schedule = manager.every(10, work)
        await asyncio.sleep(45)
        assert work.times == [0, 20, 40]
        assert schedule.skipped == 2
        await manager.shutdown()

    virtually(main)


def test_a_tick_queues_one_run(make_manager):
    """It begins at the end of the last one."""

    async def main(loop):
        manager = make_manager()
        work = clock(loop, 25)
        schedule = manager.every(10, work, overlap="queue")
        await asyncio.sleep(60)
        assert work.times == [0, 25, 50]
        assert schedule.runs == 3
        await manager.shutdown()

    virtually(main)


def test_a_tick_cancels_the_last_run(make_manager):
    """The next one begins when it has ended, its cleanup included."""

    async def main(loop):
        manager = make_manager()
        begun = loop.time()
        times = []

        async def work():
            times.append(loop.time() - begun)
            try:
                await asyncio.sleep(100)
            finally:
                await asyncio.sleep(2)

        schedule = manager.every(10, work, overlap="cancel")
        await asyncio.sleep(35)
        assert times == [0, 12, 22, 32]
        assert [outcome.outcome for outcome in schedule.outcomes] == ["cancelled"] * 3
        await manager.shutdown()

    virtually(main)


@pytest.mark.parametrize("on_error", ["continue", "stop"])
def test_a_failed_run_is_logged_and_continues_or_stops(make_manager, caplog, on_error):
    """Once per failure."""

    async def main(loop):
        manager = make_manager()
        work = clock(loop, error=ValueError("no"))
        schedule = manager.every(10, work, on_error=on_error)
        await asyncio.sleep(25)
        count = 3 if on_error == "continue" else 1
        assert len(work.times) == count
        assert schedule.state == ("active" if on_error == "continue" else "stopped")
        assert schedule.outcomes[0].error == "ValueError: no"
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == count
        assert manager.schedules() == ([schedule] if on_error == "continue" else [])
        await manager.shutdown()

    virtually(main)


def test_a_run_that_times_out_counts_as_an_error(make_manager):
    """Each run has the timeout."""

    async def main(loop):
        manager = make_manager()
        schedule = manager.every(10, clock(loop, 100), timeout=4.0, on_error="stop")
        await asyncio.sleep(25)
        assert schedule.state == "stopped"
        assert [outcome.outcome for outcome in schedule.outcomes] == ["timed_out"]

    virtually(main)


def test_pause_resume_and_run_now(make_manager):
    """Ticks of a pause are not made up, and the grid stays."""

    async def main(loop):
        manager = make_manager()
        work = clock(loop)
        schedule = manager.every(10, work)
        await asyncio.sleep(12)
        schedule.pause()
        schedule.pause()
        assert (schedule.state, schedule.next_run_seconds) == ("paused", None)
        await asyncio.sleep(20)
        schedule.run_now()
        await asyncio.sleep(3)
        schedule.resume()
        assert schedule.next_run_seconds == pytest.approx(5)
        await asyncio.sleep(10)
        assert work.times == [0, 10, 32, 40]
        assert schedule.late == 0
        schedule.cancel()
        schedule.resume()
        await asyncio.sleep(50)
        assert len(work.times) == 4
        assert schedule.state == "stopped"

    virtually(main)


def test_jitter_delays_and_does_not_add_up(make_manager):
    """Each tick is at most that late on its grid."""

    async def main(loop):
        manager = make_manager()
        work = clock(loop)
        manager.every(10, work, jitter=3)
        await asyncio.sleep(1000)
        assert all(0 <= when - 10 * number <= 3.002 for number, when in enumerate(work.times))
        assert len({when - 10 * number for number, when in enumerate(work.times)}) > 50
        await manager.shutdown()

    virtually(main)


def test_shutdown_stops_schedules_first_and_drains_their_runs(make_manager):
    """No tick begins a run while it drains."""

    async def main(loop):
        manager = make_manager()
        work = clock(loop, 25)
        schedule = manager.every(10, work, overlap="queue")
        await asyncio.sleep(5)
        stats = await manager.shutdown(drain=60)
        assert loop.time() - 1000 == pytest.approx(25, abs=0.1)
        assert (stats["status"], work.times, schedule.state) == ("completed", [0], "stopped")
        assert [outcome.outcome for outcome in schedule.outcomes] == ["completed"]
        with pytest.raises(ManagerClosedError):
            manager.every(10, work)

    virtually(main)


def test_wait_for_all_waits_for_runs_not_for_schedules(make_manager):
    """A schedule is no task."""

    async def main(loop):
        manager = make_manager()
        work = clock(loop, 3)
        manager.every(10, work)
        await asyncio.sleep(1)
        await manager.wait_for_all()
        assert loop.time() - 1000 == pytest.approx(3, abs=0.1)
        await manager.shutdown()

    virtually(main)


def test_many_schedules_have_one_timer(make_manager):
    """Also after some were paused and cancelled."""

    async def main(loop):
        manager = make_manager()
        count = 0

        async def work():
            nonlocal count
            count += 1

        schedules = [manager.every(1 + number % 7, work, first="later") for number in range(2000)]
        for schedule in schedules[::2]:
            schedule.pause()
        for schedule in schedules[::4]:
            schedule.resume()
        assert len([timer for timer in loop._scheduled if not timer.cancelled()]) == 1
        await asyncio.sleep(7.5)
        expected = sum(int(7.5 // (1 + number % 7)) for number in range(2000) if number % 2 or number % 4 == 0)
        assert count == expected
        for schedule in schedules:
            schedule.cancel()
        assert not [timer for timer in loop._scheduled if not timer.cancelled()]
        assert manager.schedules() == []

    virtually(main)


def test_a_function_gives_the_next_time(make_manager, monkeypatch):
    """Of a wall clock, which may be set meanwhile: never early."""

    async def main(loop):
        manager = make_manager()
        start = datetime(2030, 1, 1, 12, 0, 30).astimezone()
        shift = timedelta()

        class Wall(datetime):
            @classmethod
            def now(cls, zone=None):
                return (start + timedelta(seconds=loop.time() - 1000) + shift).astimezone(zone)

        monkeypatch.setattr(_schedules, "datetime", Wall)

        def each_minute(now):
            return now.replace(second=0, microsecond=0) + timedelta(minutes=5)

        work = clock(loop)
        schedule = manager.every(None, work, next_time=each_minute, first="later")
        await asyncio.sleep(271)
        assert work.times == [270]
        shift = timedelta(minutes=-2)
        await asyncio.sleep(300)
        assert work.times == [270]
        await asyncio.sleep(120)
        assert work.times == [270, pytest.approx(690)]
        assert schedule.late == 0
        await manager.shutdown()

    virtually(main)


@pytest.mark.parametrize("package", ["croniter", "cronsim"])
def test_cron_expressions(make_manager, package):
    """By the packages that parse them."""
    module = need(package)

    async def main(loop):
        if package == "croniter":

            def following(now):
                return module.croniter("*/5 * * * *", now).get_next(datetime)
        else:

            def following(now):
                return next(module.CronSim("*/5 * * * *", now))

        manager = make_manager()
        schedule = manager.every(None, clock(loop), next_time=following, first="later")
        due = datetime.now().astimezone() + timedelta(seconds=schedule.next_run_seconds)
        assert schedule.next_run_seconds <= 60 or due.minute % 5 == 0
        await manager.shutdown()

    virtually(main)


def test_a_next_time_that_fails_stops_the_schedule(make_manager, caplog):
    """And is logged."""

    async def main(loop):
        manager = make_manager()
        schedule = manager.every(None, clock(loop), next_time=lambda now: now)
        await asyncio.sleep(1)
        assert (schedule.state, schedule.runs) == ("stopped", 1)

    virtually(main)
    assert "its next_time failed" in caplog.text


def test_what_stops_the_loop_takes_no_tick_from_other_schedules(make_manager):
    """The ticks of the same moment come when the loop goes on."""
    loop = VirtualLoop()
    is_first = True

    def following(now):
        nonlocal is_first
        if is_first:
            is_first = False
            raise KeyboardInterrupt
        return now + timedelta(days=1)

    manager = make_manager()
    others = []

    async def main():
        manager.every(None, clock(loop), next_time=following)
        others.extend(manager.every(10, clock(loop)) for _ in range(3))
        await asyncio.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(main())
    assert [other.runs for other in others] == [0, 0, 0]
    loop.run_until_complete(asyncio.sleep(11))
    assert [other.runs for other in others] == [2, 2, 2]
    loop.run_until_complete(manager.shutdown())
    loop.close()


@pytest.mark.parametrize("start", [0.1, 1000.0, 123456.789, 1e7 / 3])
def test_a_tick_is_never_early_and_late_by_a_millisecond_at_most(make_manager, start):
    """Of intervals that are no multiples of a millisecond, of many at once, and wherever the clock stands."""

    async def main(loop):
        manager = make_manager()
        loop.now = start
        intervals = [0.0301 + number * 0.00007 for number in range(500)]
        late = []

        def tick(begun, seconds):
            # Called by the tick itself, before its task begins.
            passed = loop.time() - begun
            late.append(passed - round(passed / seconds) * seconds)
            return asyncio.sleep(0)

        for seconds in intervals:
            manager.every(seconds, tick, loop.time(), seconds, first="later")
        await asyncio.sleep(0.5)
        assert len(late) > 4000
        assert min(late) >= -1e-8
        assert max(late) < 0.00151
        await manager.shutdown()

    virtually(main)


def test_runs_begin_in_the_order_of_their_ticks_with_what_they_fire(make_manager):
    """One batch for all ticks of a moment; ``create_task`` in between changes nothing for those before it."""

    async def main(loop):
        manager = make_manager()
        order = []

        async def note(number):
            order.append(number)

        def tick(number):
            if number == 2:
                manager.fire(note("fired"))
                manager.create_task(note("created"))
            return note(number)

        schedules = [manager.every(10, tick, number) for number in range(5)]
        await asyncio.sleep(1)
        assert sorted(order, key=str) == [0, 1, 2, 3, 4, "created", "fired"]
        assert [each for each in order if each in range(5)] == [0, 1, 2, 3, 4]
        assert [each.runs for each in schedules] == [1] * 5
        assert manager.get_task_count() == 0
        await manager.shutdown()

    virtually(main)


def test_a_lock_lets_one_in(make_manager):
    """The runs of others do nothing, and are counted."""

    async def main(loop):
        manager = make_manager()
        held = False

        async def lock():
            nonlocal held
            held, was_held = True, held
            return not was_held

        work = clock(loop)
        schedules = [manager.every(10, work, lock=lock) for _ in range(3)]
        await asyncio.sleep(1)
        assert work.times == [0]
        assert [schedule.locked_out for schedule in schedules] == [0, 1, 1]
        await manager.shutdown()

    virtually(main)


def test_a_full_manager_drops_a_run(make_manager, caplog):
    """With a warning; the schedule goes on."""

    async def main(loop):
        manager = make_manager(max_pending_tasks=1)
        task = manager.create_task(asyncio.sleep(15))
        work = clock(loop)
        manager.every(10, work)
        await asyncio.sleep(25)
        await task
        assert work.times == [20]
        await manager.shutdown()

    virtually(main)
    assert caplog.text.count("could not begin") == 2


async def test_a_schedule_runs_on_every_loop(make_manager):
    """In real time."""
    manager = make_manager()
    done = asyncio.Event()
    count = 0

    async def work():
        nonlocal count
        count += 1
        if count == 3:
            done.set()

    schedule = manager.every(0.002, work)
    async with asyncio.timeout(10):
        await done.wait()
    schedule.cancel()
    await manager.wait_for_all()
    assert count >= 3


WRONG = [
    (0, {}, InvalidOptionError),
    (-1, {}, InvalidOptionError),
    (math.inf, {}, InvalidOptionError),
    (math.nan, {}, InvalidOptionError),
    ("1", {}, InvalidOptionError),
    (None, {}, InvalidOptionError),
    (1, {"next_time": max}, InvalidOptionError),
    (1, {"first": "soon"}, InvalidOptionError),
    (1, {"jitter": -1}, InvalidOptionError),
    (1, {"overlap": "both"}, InvalidOptionError),
    (1, {"on_error": "raise"}, InvalidOptionError),
    (1, {"lock": 1}, InvalidOptionError),
    (1, {"timeout": 0}, InvalidTimeoutError),
    (1, {"context": 5}, InvalidContextError),
]


@pytest.mark.parametrize(("seconds", "options", "error"), WRONG, ids=repr)
def test_wrong_arguments_are_refused(make_manager, seconds, options, error):
    """Nothing is started."""

    async def main(loop):
        manager = make_manager()
        with pytest.raises(error):
            manager.every(seconds, clock(loop), **options)
        assert manager.schedules() == []

    virtually(main)


def test_a_wrong_function_is_refused(make_manager):
    """A coroutine object is closed."""

    async def main(loop):
        manager = make_manager()
        for wrong in (None, clock(loop)()):
            with pytest.raises(InvalidFunctionError):
                manager.every(1, wrong)

    virtually(main)
    with pytest.raises(NoRunningLoopError):
        make_manager().every(1, asyncio.sleep, 1)
