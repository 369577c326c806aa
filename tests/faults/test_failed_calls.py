"""What fails half-way, or is interrupted there, harms nothing that comes later."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import threading
import weakref

import anyio
import anyio.to_thread
import pytest
from event_tools import assert_counters_add_up, scripted, until
from loops import LOOPS
from work import forever, value, wait_until

from bgtasks.events import Publisher
from bgtasks.events.sinks.memory import MemorySink
from bgtasks.executor import BackgroundExecutor


class Refusing:
    """A loop whose ``call_soon`` fails while that is switched on; the calls of tasks do not come here."""

    def __init__(self, monkeypatch, kind):
        self.monkeypatch = monkeypatch
        self.loop = LOOPS[kind]()

    @contextlib.contextmanager
    def refusing(self):
        """Have ``call_soon`` raise."""

        def call_soon(*args, **kwargs):
            raise MemoryError

        with self.monkeypatch.context() as patch:
            patch.setattr(self.loop, "call_soon", call_soon)
            yield


@pytest.fixture
def refusing(monkeypatch):
    """Give a loop that can be told to refuse callbacks."""
    made = Refusing(monkeypatch, "asyncio")
    yield made
    made.loop.close()


def test_fire_whose_batch_cannot_be_scheduled_leaves_later_ones_alone(make_manager, refusing):
    """The call raises and closes its coroutine; the next batch is scheduled as if nothing had been."""
    manager, ran = make_manager(), []

    async def work():
        ran.append(True)

    async def main():
        manager.fire(work())
        await manager.wait_for_all()
        coro = work()
        with refusing.refusing(), pytest.raises(MemoryError):
            manager.fire(coro)
        assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
        assert manager.get_task_count() == 0
        for _ in range(3):
            manager.fire(work())
        await manager.wait_for_all()

    refusing.loop.run_until_complete(main())
    assert len(ran) == 4
    assert manager.stats()["started"] == 4


def test_a_timeout_that_cannot_be_armed_takes_the_task_back(make_manager, refusing):
    """The call raises, and the next timeout comes."""
    manager = make_manager()

    async def main():
        coro = forever()
        with refusing.refusing(), pytest.raises(MemoryError):
            manager.create_task(coro, timeout=3600)
        assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
        task = manager.create_task(forever(), timeout=0.001)
        await asyncio.wait([task], timeout=20)
        assert task.cancelled()

    refusing.loop.run_until_complete(main())
    assert manager.stats()["timed_out"] == 1


# -- closed loops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(LOOPS))
def test_a_closed_loop_without_live_tasks_is_let_go_of(make_manager, kind):
    """Anyio's own test of that, with the manager's factory on its loops; and the counters stay."""
    manager = make_manager()

    def make_loop():
        loop = LOOPS[kind]()
        loop.set_task_factory(manager.task_factory)
        return loop

    async def main():
        await anyio.to_thread.run_sync(lambda: None)
        await manager.create_task(value(1), timeout=3600)
        manager.fire(value(2), timeout=3600)
        await manager.wait_for_all()
        return weakref.ref(asyncio.get_running_loop())

    loops = [anyio.run(main, backend_options={"loop_factory": make_loop}) for _ in range(3)]
    # Anyio's thread may still be letting go of the last one.
    released = wait_until(lambda: gc.collect() >= 0 and not any(loop() for loop in loops))
    assert released, gc.get_referrers(*[loop() for loop in loops])
    # Before and after another loop is used.
    assert manager.stats()["completed"] >= 6
    counted = manager.stats()["completed"]
    asyncio.run(use(manager))
    assert manager.stats()["completed"] == counted + 1
    gc.collect()


async def use(manager):
    """Run a task."""
    await manager.create_task(value(3))


def test_a_loop_is_kept_while_a_task_lives(make_manager):
    """Nobody else refers to the loop: its task must not vanish with it."""
    manager = make_manager()

    async def start():
        manager.create_task(forever(), name="left")

    loop = asyncio.new_event_loop()
    loop.run_until_complete(start())
    gone = weakref.ref(loop)
    del loop
    gc.collect()
    assert gone() is not None
    (info,) = manager.get_task_info()
    assert info["name"] == "left"
    gone().close()


# -- shutdown -------------------------------------------------------------------------------------------------------


async def test_a_shutdown_without_time_lets_tasks_take_their_cancellation(make_manager, caplog):
    """timeout=0: one iteration of the loop, and no warning of tasks that end in it."""
    manager = make_manager()
    tasks = [manager.create_task(forever()) for _ in range(3)]
    manager.fire(forever())
    await asyncio.sleep(0)
    stats = await manager.shutdown(timeout=0)
    assert (stats["status"], stats["remaining_tasks"]) == ("completed", 0)
    assert all(task.cancelled() for task in tasks)
    assert not caplog.records


# -- executors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError(), KeyboardInterrupt()])
def test_a_thread_that_could_not_start_is_not_joined(make_manager, monkeypatch, error):
    """The submission raises, and leaves nothing for the end of the block to wait for or to join."""
    manager = make_manager()
    start = threading.Thread.start

    def failing_start(thread):
        if thread.name == "bgtasks-worker":
            raise error
        start(thread)

    with BackgroundExecutor(manager=manager) as submit:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", failing_start)
            with pytest.raises(type(error)):
                submit(pow, 2, 3)
        assert submit(pow, 2, 4).result(20) == 16
    assert manager.get_task_count() == 0
    assert (manager.stats()["started"], manager.stats()["cancelled"]) == (2, 1)


def test_an_interrupt_between_enrolment_and_queue_leaves_nothing_behind(make_manager, monkeypatch):
    """The call is cancelled, and the block ends."""
    manager = make_manager()
    executor = BackgroundExecutor(manager=manager)

    class Interrupting(dict):
        def __setitem__(self, key, item):
            raise KeyboardInterrupt

    with executor as submit:
        with monkeypatch.context() as patch:
            patch.setattr(executor, "_live", Interrupting())
            with pytest.raises(KeyboardInterrupt):
                submit(pow, 2, 3)
        assert submit(pow, 2, 4).result(20) == 16
    assert manager.get_task_count() == 0


# -- events ---------------------------------------------------------------------------------------------------------


class Model:
    """An event with a serializer of its own, as pydantic's models have."""

    def __init__(self, errors):
        self.errors = errors

    def model_dump_json(self):
        """Raise, the first time."""
        if self.errors:
            raise self.errors.pop()
        return '{"stop":true}'


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_while_the_flusher_encodes_loses_no_event(queue_of_twin, error):
    """The events of that batch are encoded again by the next flusher; a flush does not wait in vain."""
    publisher = Publisher(MemorySink(), linger=0.001)

    async def emit():
        for number in range(100):
            publisher.emit({"n": number})
        publisher.emit(Model([error()]))
        await publisher.flush(20)

    async def go_on():
        report = await publisher.flush(20)
        await publisher.close()
        return report

    with pytest.raises(error):
        asyncio.run(emit())
    report = asyncio.run(go_on())
    assert report["status"] == "flushed"
    stats = publisher.stats()
    assert_counters_add_up(stats)
    assert stats["delivered"] == len(publisher.sink.events) == 101
    assert publisher.sink.events[-1] == b'{"stop":true}'


def test_a_close_after_such_an_end_accounts_for_every_event(queue_of_twin):
    """Also where the sink is down: dropped, and not lost."""
    publisher = scripted([OSError("down")] * 1000, batch=200)

    async def emit():
        publisher.emit({"n": 1})
        publisher.emit(Model([KeyboardInterrupt()]))
        await publisher.flush(20)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(emit())
    asyncio.run(publisher.close(0.05))
    stats = publisher.stats()
    assert_counters_add_up(stats)
    assert stats["dropped"] == {"timeout": 2}


def test_an_event_whose_notification_fails_is_delivered(queue_of_twin, monkeypatch):
    """Emit says that it was accepted; nothing else need come after it."""
    publisher = Publisher(MemorySink(), linger=0.001)

    async def main():
        publisher.emit({"n": 0})
        await publisher.flush()
        linger = publisher._flusher._linger

        def failing_notify():
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(linger, "notify", failing_notify)
            assert publisher.emit({"n": 1})
        await until(lambda: publisher.stats()["delivered"] == 2)
        await publisher.close()

    asyncio.run(main())
    assert len(publisher.sink.events) == 2


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_the_queue_calls_again_at_the_next_event_if_its_call_failed(queue_of_twin, error):
    """Both twins: what raised is raised, the event is in the queue, and the next one calls."""
    calls = []

    def on_due():
        calls.append(len(calls))
        if len(calls) == 1:
            raise error

    queue = queue_of_twin.EventQueue(100, 1 << 20, 1 << 20, False, on_due, lambda: None, lambda _: 0)
    with pytest.raises(error):
        queue.emit(b"one")
    assert len(queue) == 1
    assert queue.emit(b"two")
    assert queue.emit(b"three")
    assert calls == [0, 1]
