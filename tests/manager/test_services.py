"""Services: tasks that run as long as the program, which nothing waits for and nobody warns of."""

import asyncio
import logging

import pytest
from work import after, failing, forever, stubborn, until, value


async def beat(beats):
    """Beat until cancelled, and take one more step then."""
    try:
        while True:
            beats.append("beat")
            await asyncio.sleep(0.001)
    finally:
        await asyncio.sleep(0)
        beats.append("end")


async def test_neither_waiting_nor_draining_waits_for_a_service(make_manager, caplog):
    """It is cancelled at the end, after all others had their time, and the shutdown awaits its last steps."""
    manager = make_manager(drain_timeout=60.0)
    beats, release = [], asyncio.Event()
    service = manager.create_task(beat(beats), name="beat", service=True)
    await manager.wait_for_all()
    manager.create_task(after(release), name="work").add_done_callback(lambda _: beats.append("work"))
    asyncio.get_running_loop().call_later(0.005, release.set)
    stats = await manager.shutdown()
    assert beats[-2:] == ["work", "end"]
    assert service.cancelled()
    assert (stats["status"], stats["initial_tasks"], stats["remaining_tasks"]) == ("completed", 1, 0)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("eager", [False, True])
async def test_a_service_is_outside_the_limits(make_manager, eager):
    """It takes no slot and no place under the cap, and gets in where that is reached."""
    manager = make_manager(max_concurrency=1, max_pending_tasks=1)
    services = [manager.create_task(forever(), name="service", service=True, eager_start=eager) for _ in range(3)]
    assert await manager.create_task(value(7)) == 7
    counts = manager.stats()
    assert (counts["running"], counts["queued"]) == (3, 0)
    assert manager.get_task_count() == 3
    assert manager.cancel("service") == 3
    await asyncio.wait(services)
    assert manager.stats()["cancelled"] == 3


async def test_a_service_that_fails_is_reported_as_any_task(make_manager, caplog):
    """What it is excused from is waiting, not failing; and after it has ended nothing is left."""
    reported = []
    manager = make_manager(on_error=lambda info, error: reported.append(info["name"]))
    manager.create_task(failing(ValueError("service")), name="service", service=True)
    await until(lambda: not manager.get_task_count())
    assert reported == ["service"]
    assert "Background task 'service' failed" in caplog.text


async def test_a_service_that_swallows_its_cancellation_is_named(make_manager, caplog):
    """A clean end needs no word; this one does."""
    manager = make_manager()
    release = asyncio.Event()
    task = manager.create_task(stubborn(10**9, release), name="service", service=True)
    await asyncio.sleep(0)
    stats = await manager.shutdown(timeout=0.01)
    assert stats["remaining_names"] == ["service"]
    assert "'service' still runs at the end of shutdown" in caplog.text
    release.set()
    await asyncio.wait([task])


async def test_a_service_may_wait_for_all_and_shut_down(make_manager):
    """From inside a service the others are waited for, and it does not wait for itself."""
    manager = make_manager()
    order = []

    async def supervise():
        await manager.wait_for_all()
        order.append("waited")
        return await manager.shutdown()

    manager.create_task(value()).add_done_callback(lambda _: order.append("work"))
    task = manager.create_task(supervise(), service=True)
    assert (await task)["status"] == "completed"
    assert order == ["work", "waited"]


async def test_another_thread_starts_a_service(make_manager):
    """create_task_threadsafe takes the option, too, and info shows which tasks are services."""
    manager = make_manager()
    async with manager:
        future = await asyncio.to_thread(manager.create_task_threadsafe, forever(), name="beat", service=True)
        task = manager.create_task(forever(), name="work")
        await until(lambda: manager.get_task_count() == 2)
        assert {info["name"]: info["service"] for info in manager.get_task_info()} == {"beat": True, "work": False}
        task.cancel()
        await manager.wait_for_all()
        assert not future.done()
    await until(future.cancelled)


@pytest.mark.parametrize("start", ["spawn", "fire"])
async def test_only_create_task_starts_services(make_manager, start):
    """A service needs no capacity to wait for, and whoever starts one wants its task."""
    coro = value()
    with pytest.raises(TypeError):
        await getattr(make_manager(), start)(coro, service=True)
    coro.close()


async def test_a_cancelled_shutdown_awaits_services_too(make_manager, caplog):
    """A service that takes a moment to end after its cancellation is no straggler."""
    ended = []

    async def beat():
        try:
            await forever()
        finally:
            await asyncio.sleep(0.005)
            ended.append("beat")

    manager = make_manager(drain_timeout=60.0)
    manager.create_task(beat(), name="beat", service=True)
    manager.create_task(forever(), name="work")
    shutdown = asyncio.ensure_future(manager.shutdown())
    await until(lambda: manager._shutdown.phase == "draining")
    await asyncio.sleep(0)
    shutdown.cancel()
    await asyncio.wait([shutdown])
    assert shutdown.cancelled()
    assert ended == ["beat"]
    assert "still runs" not in caplog.text
