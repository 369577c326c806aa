"""Functions that are kept running, and the order of their starts and ends."""

from __future__ import annotations

import asyncio
import logging

import pytest
from loops import VirtualLoop
from work import forever, stubborn, until

from bgtasks import InvalidFunctionError, InvalidOptionError, ManagerClosedError, Restart, started


def virtually(main):
    """Run a coroutine function on a loop with a virtual clock; it gets the loop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        return runner.run(main(loop))


def crashing(loop, runs):
    """Return a service that runs so many seconds and crashes, run by run; then for ever."""
    begun = loop.time()
    times = []

    async def work():
        times.append(round(loop.time() - begun, 1))
        if len(times) > len(runs):
            await asyncio.Event().wait()
        await asyncio.sleep(runs[len(times) - 1])
        raise ConnectionError(f"crash {len(times)}")

    work.times = times
    return work


def test_a_service_is_restarted_with_doubling_waits(make_manager):
    """As one task with one id."""

    async def main(loop):
        manager = make_manager()
        work = crashing(loop, [0, 0, 0, 0])
        service = manager.service(work, restart=Restart(wait=1, max_wait=4))
        task_id = manager.get_task_info()[0]["task_id"]
        await asyncio.sleep(0.5)
        assert (service.state, manager.get_task_info()[0]["state"]) == ("waiting", "waiting")
        await asyncio.sleep(100)
        assert work.times == pytest.approx([0, 1, 3, 7, 11], abs=0.1)
        assert (service.restarts, manager.stats()["retried"]) == (4, 4)
        assert [info["task_id"] for info in manager.get_task_info()] == [task_id]
        await manager.shutdown()
        assert service.state == "stopped"

    virtually(main)


def test_a_healthy_run_makes_failures_forgotten(make_manager):
    """The waits begin anew, and so does the count."""

    async def main(loop):
        manager = make_manager()
        work = crashing(loop, [0, 0, 50, 0])
        manager.service(work, restart=Restart(max=2, within=1000, wait=1, reset_after=30))
        await asyncio.sleep(100)
        assert work.times == pytest.approx([0, 1, 3, 54, 56], abs=0.1)
        await manager.shutdown()

    virtually(main)


def test_a_service_is_given_up(make_manager, caplog):
    """ERROR once, state, counter and hook."""
    seen = []

    async def main(loop):
        manager = make_manager()
        work = crashing(loop, [0] * 10)
        service = manager.service(
            work,
            name="consumer",
            restart=Restart(max=2, within=60, wait=1),
            on_give_up=lambda service, error: seen.append((service.name, service.state, str(error))),
        )
        await asyncio.sleep(60)
        assert (service.state, service.restarts) == ("given_up", 2)
        assert manager.stats()["given_up"] == 1
        assert manager.services() == []
        assert await service.wait_started(5) is False

    virtually(main)
    assert seen == [("consumer", "given_up", "crash 3")]
    assert [record.levelno for record in caplog.records if record.name == "bgtasks"] == [
        logging.WARNING,
        logging.WARNING,
        logging.ERROR,
    ]


def test_restarts_count_only_within_their_time(make_manager):
    """Rare crashes go on for ever."""

    async def main(loop):
        manager = make_manager()
        work = crashing(loop, [20] * 10)
        service = manager.service(work, restart=Restart(max=2, within=30, wait=0, reset_after=1000))
        await asyncio.sleep(190)
        assert (service.restarts, service.state) == (9, "starting")
        await manager.shutdown()

    virtually(main)


def test_a_service_that_returns_has_ended(make_manager):
    """It is not restarted."""

    async def main(loop):
        manager = make_manager()
        service = manager.service(asyncio.sleep, 1)
        await asyncio.sleep(5)
        assert (service.state, manager.services()) == ("stopped", [])

    virtually(main)


def test_services_begin_in_order_and_end_in_the_opposite_one(make_manager):
    """One after those that it needs are started; ordinary tasks end before all of them."""
    order = []

    async def main(loop):
        manager = make_manager()

        async def run(name, seconds):
            order.append(f"{name} begins")
            await asyncio.sleep(seconds)
            started()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(1)
                order.append(f"{name} ends")

        async def task():
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(1)
                order.append("task ends")

        database = manager.service(run, "database", 2)
        cache = manager.service(run, "cache", 1)
        web = manager.service(run, "web", 0, after=[database, cache])
        manager.create_task(task())
        assert await web.wait_started(1) is False
        assert web.state == "starting"
        assert await web.wait_started() is True
        assert loop.time() - 1000 == pytest.approx(2, abs=0.1)
        assert (web.state, manager.services()) == ("running", [database, cache, web])
        stats = await manager.shutdown(drain=10)
        assert stats["status"] == "completed"

    virtually(main)
    assert order[:2] == ["database begins", "cache begins"]
    assert order[2:] == ["web begins", "task ends", "web ends", "database ends", "cache ends"]


def test_waits_and_drains_leave_services_out(make_manager):
    """They never end by themselves."""

    async def main(loop):
        manager = make_manager()
        manager.service(forever)
        task = manager.create_task(asyncio.sleep(3))
        await manager.wait_for_all()
        assert task.done()
        manager.create_task(asyncio.sleep(3))
        await manager.shutdown(drain=60)
        assert loop.time() - 1000 == pytest.approx(6, abs=0.1)

    virtually(main)


def test_a_waiting_service_ends_with_the_shutdown(make_manager):
    """Quietly: it was not given up."""
    seen = []

    async def main(loop):
        manager = make_manager()
        work = crashing(loop, [0])
        service = manager.service(
            work, restart=Restart(wait=50, max_wait=50), on_give_up=lambda *given: seen.append(given)
        )
        await asyncio.sleep(1)
        stats = await manager.shutdown(drain=10)
        assert (service.state, stats["status"], loop.time()) == ("stopped", "completed", 1001)

    virtually(main)
    assert seen == []


async def test_a_stubborn_service_does_not_hold_up_the_shutdown(make_manager, caplog):
    """It is named in the log, as any other task."""
    manager = make_manager()
    release = asyncio.Event()
    service = manager.service(stubborn, 10, release, name="stubborn")
    await asyncio.sleep(0)
    stats = await manager.shutdown(timeout=0.05)
    assert (stats["status"], stats["remaining_names"]) == ("timeout", ["stubborn"])
    assert "'stubborn' still runs at the end of shutdown" in caplog.text
    release.set()
    await until(lambda: service.state == "stopped")


def test_a_cancelled_shutdown_ends_the_services(make_manager):
    """None is left."""

    async def main(loop):
        manager = make_manager()
        service = manager.service(forever)
        manager.create_task(asyncio.sleep(100))
        closing = asyncio.ensure_future(manager.shutdown(drain=50))
        await asyncio.sleep(1)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert service.state == "stopped"

    virtually(main)


def test_a_service_may_shut_the_manager_down(make_manager):
    """It does not cancel itself."""

    async def main(loop):
        manager = make_manager()
        seen = []

        async def supervisor():
            manager.create_task(forever())
            await asyncio.sleep(1)
            seen.append(await manager.shutdown())

        manager.service(supervisor)
        manager.service(forever)
        await asyncio.sleep(5)
        assert seen[0]["status"] == "completed"
        assert loop.time() - 1000 == 5

    virtually(main)


def test_cancel_ends_a_service(make_manager):
    """For good; also one that has not begun."""

    async def main(loop):
        manager = make_manager()
        first = manager.service(forever)
        second = manager.service(forever, after=[first])
        assert (second.cancel(), first.cancel()) == (True, True)
        await asyncio.sleep(1)
        assert (first.state, second.state) == ("stopped", "stopped")
        assert first.cancel() is False
        with pytest.raises(InvalidOptionError, match="has ended"):
            manager.service(forever, after=[first])

    virtually(main)


async def test_a_service_runs_on_every_loop(make_manager):
    """In real time."""
    manager = make_manager()
    runs = []

    async def work():
        runs.append(1)
        if len(runs) < 3:
            raise ValueError
        started()
        await asyncio.Event().wait()

    service = manager.service(work, restart=Restart(wait=0.001, max_wait=0.001))
    assert await service.wait_started(10)
    assert len(runs) == 3
    await manager.shutdown()


@pytest.mark.parametrize(
    "options",
    [{"max": 0}, {"max": -1}, {"within": 0}, {"wait": -1}, {"max_wait": float("nan")}, {"reset_after": 0}],
    ids=repr,
)
def test_a_wrong_rule_is_refused(options):
    """With the named error."""
    with pytest.raises(InvalidOptionError):
        Restart(**options)


async def test_wrong_arguments_are_refused(make_manager):
    """Nothing is started."""
    manager = make_manager()
    with pytest.raises(InvalidFunctionError):
        manager.service(None)
    with pytest.raises(InvalidFunctionError):
        manager.service(forever())
    with pytest.raises(InvalidOptionError, match="restart must be"):
        manager.service(forever, restart=5)
    with pytest.raises(InvalidOptionError, match="after must hold"):
        manager.service(forever, after=["other"])
    with pytest.raises(InvalidOptionError, match="on_give_up"):
        manager.service(forever, on_give_up=1)
    assert manager.stats()["started"] == 0
    await manager.shutdown()
    with pytest.raises(ManagerClosedError):
        manager.service(forever)


def test_started_elsewhere_is_ignored():
    """A function may run outside of a service."""

    async def main():
        started()

    started()
    asyncio.run(main())
