"""Publishers in a manager: shown, flushed before tasks are cancelled, closed at the end; and publish_event."""

from __future__ import annotations

import asyncio
import inspect
import time

import msgspec
import pytest
from event_tools import assert_counters_add_up, scripted, until
from requirements import need

from bgtasks import BackgroundTaskManager, BgtasksError
from bgtasks.events import BasePublisher, Publisher, publish_event
from bgtasks.events.model import EventModel
from bgtasks.events.sinks.memory import MemorySink

pytestmark = pytest.mark.usefixtures("queue_of_twin")

FOREVER = 1000.0


async def test_the_flusher_is_shown_but_not_waited_for(make_manager):
    """Each publisher has one task; wait_for_all does not wait for it."""
    manager = make_manager()
    publisher = Publisher(MemorySink(), manager=manager, name="audit")
    for number in range(10):
        publisher.emit({"n": number})
    (info,) = manager.get_task_info()
    assert info["name"] == "publisher audit"
    await manager.wait_for_all(timeout=20)
    stats = await manager.shutdown()
    assert stats["status"] == "completed"
    assert stats["initial_tasks"] == 0
    assert len(publisher.sink.events) == 10
    assert publisher.stats()["state"] == "closed"


async def test_shutdown_flushes_before_it_cancels_and_closes_after(make_manager):
    """Events of cancelled tasks arrive, those before their end and those during it."""
    manager = make_manager()
    publisher = Publisher(MemorySink(), manager=manager, linger=FOREVER)

    async def work():
        publisher.emit({"n": "begun"})
        try:
            await asyncio.sleep(FOREVER)
        finally:
            publisher.emit({"n": "cancelled"})
            # Events that were emitted before had been flushed by then.
            assert len(publisher.sink.events) >= 1

    task = manager.create_task(work())
    await asyncio.sleep(0)
    stats = await manager.shutdown()
    assert stats["status"] == "completed"
    assert task.cancelled()
    assert publisher.sink.events == [b'{"n":"begun"}', b'{"n":"cancelled"}']
    assert publisher.stats()["refused"] == {}


async def test_draining_tasks_still_publish(make_manager):
    """With drain, events of draining tasks arrive."""
    manager = make_manager()
    publisher = Publisher(MemorySink(), manager=manager)

    async def work():
        for number in range(50):
            await asyncio.sleep(0)
            publisher.emit({"n": number})

    manager.create_task(work())
    await manager.shutdown(drain=20)
    assert len(publisher.sink.events) == 50


async def test_a_sink_that_hangs_does_not_hold_shutdown_up(make_manager):
    """Shutdown ends in time, and the counters add up."""

    async def hang(batch, batch_id):
        await asyncio.sleep(FOREVER)

    manager = make_manager()
    publisher = scripted([hang] * 10, manager=manager)
    publisher.emit({"n": 1})
    begun = time.monotonic()
    await manager.shutdown(timeout=0.4)
    assert time.monotonic() - begun < 5
    assert publisher.stats()["dropped"] == {"timeout": 1}
    assert_counters_add_up(publisher.stats())


async def test_a_cancelled_shutdown_closes_publishers_all_the_same(make_manager):
    """The publishers are closed, and the cancellation propagates."""
    manager = make_manager()
    publisher = Publisher(MemorySink(), manager=manager, linger=FOREVER)
    manager.create_task(asyncio.sleep(FOREVER))
    publisher.emit({"n": 1})
    closing = asyncio.create_task(manager.shutdown(drain=FOREVER))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert publisher.sink.events == [b'{"n":1}']
    assert publisher.stats()["state"] == "closed"


async def test_closed_publishers_are_detached_and_failures_are_logged(make_manager, caplog):
    """A publisher that is closed is detached; errors of attached objects are logged."""

    class Failing:
        def attached(self, manager):
            self.manager = manager

        async def flush(self, timeout):
            raise RuntimeError("cannot flush")

        async def close(self, timeout):
            raise RuntimeError("cannot close")

    manager = make_manager()
    publisher = Publisher(MemorySink(), manager=manager)
    await publisher.close()
    assert manager._attached == {}
    manager.detach(publisher)
    manager.attach(Failing())
    await manager.shutdown()
    assert "could not flush" in caplog.text
    assert "could not close" in caplog.text


async def test_cancel_all_does_not_end_a_publisher(make_manager):
    """cancel_all does not cancel the flusher."""
    manager = make_manager()
    publisher = Publisher(MemorySink(), manager=manager)
    publisher.emit({"n": 1})
    await manager.cancel_all()
    publisher.emit({"n": 2})
    await manager.shutdown()
    assert len(publisher.sink.events) == 2


async def test_publish_event_attaches_the_publisher_once(make_manager):
    """A publisher keeps its first manager."""
    manager = make_manager()
    publisher = Publisher(MemorySink())
    for number in range(100):
        assert publish_event({"n": number}, publisher, manager)
    assert len(manager.get_task_info()) == 1
    await manager.shutdown()
    assert len(publisher.sink.events) == 100
    assert not publish_event({"n": 1}, publisher, manager)


async def test_publish_event_without_a_publisher_publishes_nothing(make_manager):
    """With None, as in a graph without a publisher, publish_event returns False."""
    manager = make_manager()
    assert not publish_event({"n": 1}, None, manager)
    assert manager.get_task_info() == []


async def test_publish_event_wraps_a_publisher_of_single_events(make_manager):
    """An object that only has ``publish`` gets a queue and workers."""

    class OneByOne:
        def __init__(self):
            self.events = []

        async def publish(self, event):
            self.events.append(event)

    manager = make_manager()
    behind = OneByOne()
    for number in range(100):
        assert publish_event({"n": number}, behind, manager)
    (info,) = manager.get_task_info()
    assert info["name"] == "publisher OneByOne"
    await manager.shutdown()
    assert sorted(event["n"] for event in behind.events) == list(range(100))


def test_publish_event_has_the_signature_of_the_reference():
    """Its arguments have the names and the order of the reference."""
    assert list(inspect.signature(publish_event).parameters) == ["event", "publisher", "task_manager"]


async def test_publish_event_finds_both_in_the_active_container():
    """publish_event finds publisher and manager by InjectQ, and publishes nothing if no publisher is bound."""
    injectq = need("injectq")
    from bgtasks import injection

    container = injectq.InjectQ()
    with container.context():
        assert not publish_event({"n": 0})
        manager = injection.bind(container)
        publisher = Publisher(MemorySink())
        container.bind_instance(BasePublisher, publisher)
        assert publish_event({"n": 1})

        @injection.inject
        def handle(
            publisher: BasePublisher = injection.Inject[BasePublisher],
            task_manager: BackgroundTaskManager = injection.Inject[BackgroundTaskManager],
        ):
            return publish_event({"n": 2}, publisher, task_manager)

        def pass_on(publisher=injectq.Inject[BasePublisher], task_manager=injectq.Inject[BackgroundTaskManager]):
            return publish_event({"n": 3}, publisher, task_manager)

        assert handle()
        assert pass_on()
        assert len(manager.get_task_info()) == 1
        await manager.shutdown()
    assert publisher.sink.events == [b'{"n":1}', b'{"n":2}', b'{"n":3}']


async def test_an_unbound_manager_is_a_named_error():
    """If a publisher is bound and no manager is, the error is named."""
    injectq = need("injectq")
    container = injectq.InjectQ()
    with container.context():
        publisher = Publisher(MemorySink())
        container.bind_instance(BasePublisher, publisher)
        with pytest.raises(BgtasksError, match="bind"):
            publish_event({"n": 1})
    await publisher.close()


async def test_event_model_has_the_fields_of_the_reference_and_its_own_time():
    """Each event has its own timestamp and id."""
    first = EventModel(event="node_execution", event_type="start", thread_id="t", node_name="plan", data={"a": 1})
    await until(lambda: time.time() > first.timestamp)
    second = EventModel(event="node_execution", event_type="end", run_id="r", metadata={"b": 2})
    assert second.timestamp > first.timestamp
    assert first.event_id != second.event_id
    assert first.metadata is not EventModel(event="e", event_type="t").metadata
    publisher = Publisher(MemorySink())
    publisher.emit(first)
    publisher.emit(second)
    await publisher.close()
    one, other = map(msgspec.json.decode, publisher.sink.events)
    assert one["data"] == {"a": 1}
    assert other["metadata"] == {"b": 2}
    for name in ("event", "event_type", "thread_id", "run_id", "node_name", "data", "metadata", "timestamp"):
        assert name in one
    assert msgspec.json.decode(publisher.sink.events[0], type=EventModel) == first


@pytest.mark.parametrize("package", ["agentflow", "tenxgraph"])
async def test_the_event_model_of_a_framework_is_accepted(package):
    """A pydantic model is encoded by its own serializer; its fields are those of EventModel."""
    need(package)
    import importlib

    module = None
    for path in (f"{package}.runtime.publisher.events", f"{package}.publisher.events"):
        try:
            module = importlib.import_module(path)
            break
        except ModuleNotFoundError:
            continue
    assert module is not None
    event = module.EventModel(event="node_execution", event_type="start", thread_id="t", data={"a": 1})
    publisher = Publisher(MemorySink())
    publisher.emit(event)
    await publisher.close()
    decoded = msgspec.json.decode(publisher.sink.events[0])
    assert decoded["thread_id"] == "t"
    assert decoded["data"] == {"a": 1}
    fields = set(EventModel.__struct_fields__)
    assert set(decoded) <= fields
