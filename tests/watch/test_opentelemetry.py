"""The instruments, read by the SDK's own reader."""

from __future__ import annotations

import asyncio

import pytest
from requirements import need
from watched import Swallow, run_everything
from work import forever, value

from bgtasks import InvalidOptionError, Retry
from bgtasks.events import Fanout, Publisher

need("opentelemetry.sdk")
from opentelemetry.sdk.metrics import MeterProvider  # noqa: E402
from opentelemetry.sdk.metrics.export import InMemoryMetricReader  # noqa: E402

from bgtasks.watch.opentelemetry import instrument  # noqa: E402


def collected(reader):
    """Return the points: (name, sorted attribute values) -> value."""
    found = {}
    for resource in reader.get_metrics_data().resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    found[metric.name, *(str(value) for _, value in sorted(point.attributes.items()))] = point.value
    return found


async def test_a_reader_collects_the_figures(make_manager):
    """Counters by name and outcome, live tasks, events by reason; each collection reads them anew."""
    manager = make_manager()
    publisher = await run_everything(manager)
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    instrument(manager, publishers=[publisher], meter=provider.get_meter("test"), name="mails")
    found = collected(reader)
    assert found["bgtasks.task.started", "mails", "ok"] == 1
    assert found["bgtasks.task.finished", "mails", "bad", "failed"] == 1
    assert found["bgtasks.task.finished", "mails", "bad", "completed"] == 0
    assert found["bgtasks.task.dropped", "mails"] == found["bgtasks.loop.blocks", "mails"] == 0
    assert found["bgtasks.event.delivered", "orders"] == 1
    histograms = manager.histograms()["ok"]
    assert found["bgtasks.task.duration.sum", "mails", "ok"] == histograms["duration"]["sum_seconds"]
    assert found["bgtasks.task.wait.sum", "mails", "ok"] == histograms["wait"]["sum_seconds"]
    assert found["bgtasks.event.lag.sum", "orders"] == publisher.stats()["lag"]["sum_seconds"]
    assert found["bgtasks.event.refused", "closed", "orders"] == 1
    manager.create_task(forever(), name="live")
    await asyncio.sleep(0)
    assert collected(reader)["bgtasks.task.active", "mails", "live"] == 1
    provider.shutdown()
    await manager.shutdown()


async def test_any_name_can_be_sent(make_manager):
    """A lone surrogate in one would keep the exporter from sending all figures."""
    manager = make_manager()
    manager.create_task(value(), name="file \udcff")
    await manager.wait_for_all()
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    instrument(manager, meter=provider.get_meter("test"))
    found = collected(reader)
    for name in ("started", "duration.sum"):
        assert (f"bgtasks.task.{name}", "default", r"file \udcff") in found
    provider.shutdown()
    await manager.shutdown()


async def test_attempts_have_figures(make_manager):
    """A gauge of the tasks between two attempts, and a counter of attempts."""

    async def fails():
        raise ValueError

    manager = make_manager()
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    instrument(manager, meter=provider.get_meter("test"), name="mails")
    manager.submit(fails, retry=Retry(on=ValueError, wait=100, jitter=0))
    while not manager.stats()["waiting"]:
        await asyncio.sleep(0)
    found = collected(reader)
    assert found["bgtasks.task.waiting", "mails"] == found["bgtasks.task.retried", "mails"] == 1
    assert found["bgtasks.service.given_up", "mails"] == 0
    provider.shutdown()
    await manager.shutdown()


def test_arguments_are_checked(make_manager):
    """Before an instrument is made."""
    with pytest.raises(InvalidOptionError, match="manager must be a BackgroundTaskManager; got 5"):
        instrument(5)
    with pytest.raises(InvalidOptionError, match=r"publishers must be a list such as \[publisher\]"):
        instrument(make_manager(), publishers=Publisher(Swallow()))


async def test_a_fanout_has_figures_for_each_of_its_publishers(make_manager):
    """Two of one name are told apart."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    async with Fanout([Publisher(Swallow(), name="orders"), Publisher(Swallow(), name="orders")]) as fanout:
        instrument(make_manager(), publishers=[fanout], meter=provider.get_meter("test"))
        fanout.emit({"number": 1})
        await fanout.flush()
    fanout.emit({"number": 2})
    found = collected(reader)
    for name in ("orders", "orders (2)"):
        assert found["bgtasks.event.delivered", name] == 1
        assert found["bgtasks.event.refused", "closed", name] == 1
    provider.shutdown()
