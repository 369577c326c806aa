"""Timeouts of any length and order: never early, at most a tick late, and leaving nothing behind."""

import asyncio
import logging
import time
from collections.abc import Coroutine

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import LOOPS, VirtualLoop
from twins import MODULES, manager_module
from work import forever, value

TICK = 0.001

LENGTHS = st.one_of(
    st.floats(min_value=1e-9, max_value=0.1),
    st.floats(min_value=0.1, max_value=100.0),
    st.floats(min_value=100.0, max_value=1e5),
    st.integers(min_value=1, max_value=1000).map(lambda tenths: tenths / 10),
    st.sampled_from([0.001, 0.064, 4.096, 262.144, 0.064001, 16777.216]),
)
# (pause before the start, timeout, time of its own end as a share of the timeout, None for never)
TASKS = st.lists(
    st.tuples(
        st.one_of(st.just(0.0), st.floats(min_value=0.0, max_value=3e3)),
        LENGTHS,
        st.one_of(st.none(), st.floats(min_value=0.01, max_value=0.9)),
    ),
    min_size=1,
    max_size=20,
)


@pytest.fixture(autouse=True)
def _quiet():
    """Do not format the warnings of thousands of timeouts."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("twin_name", list(MODULES))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(tasks=TASKS)
def test_never_early_and_at_most_a_tick_late(request, twin_name, tasks):
    """A task that outlasts its timeout ends within a tick after it; other tasks end by themselves."""
    if request.config.option.twin not in ("both", twin_name):
        return
    manager = manager_module(twin_name).BackgroundTaskManager()

    async def main():
        loop = asyncio.get_running_loop()

        async def work(begun, timeout, ends):
            try:
                if ends is None:
                    await asyncio.Event().wait()
                await asyncio.sleep(timeout * ends)
            except asyncio.CancelledError:
                late = loop.time() - (begun + timeout)
                assert -1e-6 <= late <= TICK + 2e-6, (timeout, late)
                raise

        timed_out = 0
        for pause, timeout, ends in tasks:
            await asyncio.sleep(pause)
            manager.create_task(work(loop.time(), timeout, ends), timeout=timeout)
            timed_out += ends is None
        await manager.wait_for_all(return_exceptions=True)
        await asyncio.sleep(0)
        assert not [handle for handle in loop._scheduled if not handle.cancelled()]
        return timed_out

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        timed_out = runner.run(main())
    stats = manager.stats()
    assert (stats["timed_out"], stats["completed"]) == (timed_out, len(tasks) - timed_out)


@pytest.mark.parametrize("timeout", [1073741.824, 7e7, 2.0**36 / 1000, 2.0**36 / 1000 + 1, 1e9])
def test_timeouts_of_years_are_exact(make_manager, timeout):
    """Timeouts beyond the wheel's span are as exact as short ones."""

    async def main():
        loop = asyncio.get_running_loop()
        manager = make_manager()
        begun = loop.time()
        task = manager.create_task(forever(), timeout=timeout)
        await asyncio.wait([task])
        return loop.time() - begun - timeout

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert -1e-6 <= runner.run(main()) <= TICK + 1e-5


def test_quick_tasks_leave_nothing_behind(make_manager):
    """A thousand tasks that end long before their timeouts leave no task, no timer and no handle in the loop."""

    async def main():
        loop = asyncio.get_running_loop()
        manager = make_manager()
        tasks, scheduled = len(asyncio.all_tasks()), len(loop._scheduled)
        for _ in range(1000):
            manager.create_task(asyncio.sleep(0.001), timeout=30)
        await manager.wait_for_all(return_exceptions=True)
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == tasks
        assert len(loop._scheduled) == scheduled

    with asyncio.Runner(loop_factory=LOOPS["asyncio"]) as runner:
        runner.run(main())


def test_one_loop_timer_stands_for_all(make_manager):
    """Ten thousand different timeouts, in descending order, need one timer of the loop at a time."""

    async def main():
        loop = asyncio.get_running_loop()
        manager = make_manager()
        for number in range(10_000):
            manager.create_task(forever(), timeout=3600 - number * 0.11)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len([handle for handle in loop._scheduled if not handle.cancelled()]) == 1
        await manager.shutdown()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


def test_a_reused_record_keeps_no_timeout(make_manager):
    """The timeout of a finished task does not touch the task that uses its record next."""

    async def main():
        manager = make_manager()
        for _ in range(600):
            await manager.create_task(value(), timeout=0.5)
            await manager.create_task(asyncio.sleep(0.0001), timeout=0.5)
        survivors = [manager.create_task(asyncio.sleep(10, "alive"), timeout=20) for _ in range(600)]
        assert await asyncio.gather(*survivors) == ["alive"] * 600

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


@pytest.mark.parametrize("cancelled_at", [0.9, 0.9999, 1.0, 1.0001])
def test_a_cancellation_wins_over_a_timeout_at_the_same_time(make_manager, cancelled_at):
    """The external cancellation wins, whichever comes first in the iteration of the loop."""

    async def main():
        loop = asyncio.get_running_loop()
        manager = make_manager()
        task = manager.create_task(forever(), timeout=1.0)
        await asyncio.sleep(0)
        loop.call_later(cancelled_at, task.cancel, "outside")
        # The clock leaps past both times: they are due in one iteration, in their order.
        loop.now += 2
        with pytest.raises(asyncio.CancelledError):
            await task
        return manager.stats()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        stats = runner.run(main())
    assert (stats["cancelled"], stats["timed_out"]) == (1, 0)


def test_a_result_before_the_timeout_stands(make_manager):
    """A task that ends in the iteration before its timeout counts as completed."""

    async def main():
        loop = asyncio.get_running_loop()
        manager = make_manager()
        future = loop.create_future()

        async def work():
            return await future

        task = manager.create_task(work(), timeout=1.0)
        await asyncio.sleep(0.9999)
        future.set_result("result")
        loop.call_soon(lambda: setattr(loop, "now", loop.now + 1))
        assert await task == "result"
        await asyncio.sleep(5)
        return manager.stats()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        stats = runner.run(main())
    assert (stats["completed"], stats["timed_out"]) == (1, 0)


def test_the_wall_clock_may_jump(make_manager, monkeypatch):
    """Timeouts follow only the clock of the loop."""

    async def main():
        manager = make_manager()
        task = manager.create_task(forever(), timeout=5)
        for jump in (-1e9, 1e12):
            monkeypatch.setattr(time, "time", lambda jump=jump: jump)
            await asyncio.sleep(2)
            assert not task.done()
        await asyncio.sleep(1.1)
        assert task.cancelled()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


async def test_real_clocks_are_never_early(make_manager):
    """On a real loop, also with uvloop's millisecond clock, no timeout is early."""
    manager = make_manager()

    async def work(begun, timeout):
        try:
            await asyncio.Event().wait()
        finally:
            assert time.monotonic() - begun >= timeout

    for timeout in (0.0004, 0.001, 0.0023, 0.005, 0.01):
        manager.create_task(work(time.monotonic(), timeout), timeout=timeout)
    await manager.wait_for_all(return_exceptions=True)
    assert manager.stats()["timed_out"] == 5


class CountingLoop(asyncio.SelectorEventLoop):
    """A loop that counts its callbacks."""

    calls = 0

    def call_soon(self, *args, **kwargs):
        """Count, and schedule."""
        self.calls += 1
        return super().call_soon(*args, **kwargs)


def test_a_task_that_ends_at_once_costs_the_loop_nothing_for_its_timeout(request, make_manager):
    """A task that steps its record has the timer set only once its coroutine suspends."""
    if "cython" not in request.node.name or request.config.option.native:
        pytest.skip("native coroutines do not see a suspension")
    manager = make_manager()

    async def main(timeout):
        before = loop.calls
        for _ in range(10):
            await manager.create_task(value(1), timeout=timeout)
        return loop.calls - before

    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        loop = runner.get_loop()
        assert runner.run(main(30.0)) == runner.run(main(None))


class Stubborn(Coroutine):
    """A coroutine object that answers the first exception with one more suspension."""

    def __init__(self):
        self.errors = []

    def send(self, value):
        """Suspend."""

    def throw(self, error, *rest):
        """Suspend once more, then raise."""
        self.errors.append(error)
        if len(self.errors) > 1:
            raise error
        future = asyncio.get_running_loop().create_future()
        return next(future.__await__())

    def close(self):
        """Have nothing to close."""

    def __await__(self):
        return self


async def test_a_coroutine_that_suspends_after_an_early_cancellation_has_its_timeout(make_manager):
    """A cancellation before the first step does not undo the timeout of a coroutine that absorbs it."""
    manager = make_manager()
    coro = Stubborn()
    task = manager.create_task(coro, timeout=0.01)
    task.cancel()
    # A native coroutine around it raises at once; a record passes the cancellation on, and the timeout comes second.
    await asyncio.wait([task], timeout=5)
    assert task.cancelled()
