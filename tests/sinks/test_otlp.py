"""OTLP: what a collector receives, and what a collector that is not there does."""

from __future__ import annotations

import pytest
from arrivals import arrived, emit_numbers
from requirements import need
from servers import free_port

from bgtasks.events.sinks.otlp import OtlpPublisher

need("opentelemetry.sdk")
need("opentelemetry.exporter.otlp.proto.http")
need("msgspec")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:opentelemetry")


def records_of(collector):
    """Return all log records that arrived."""
    return [
        record
        for request in collector.requests
        for resource in request.resource_logs
        for scope in resource.scope_logs
        for record in scope.log_records
    ]


async def test_events_are_log_records(collector):
    """Each event is a record with its name, its time and its content; the resource says who speaks."""
    publisher = OtlpPublisher(collector.url, resource={"service.name": "shop"})
    publisher.emit({"event": "order_paid", "timestamp": 1_700_000_000.5, "order": {"id": 42}})
    publisher.emit(b"no JSON")
    publisher.emit(b"[1]")
    report = await publisher.close(30)
    assert (report["delivered"], report["last_error"]) == (3, None)
    first, second, third = records_of(collector)
    assert first.event_name == "order_paid"
    assert first.time_unix_nano == 1_700_000_000_500_000_000
    content = {pair.key: pair.value for pair in first.body.kvlist_value.values}
    assert content["event"].string_value == "order_paid"
    assert content["order"].kvlist_value.values[0].value.int_value == 42
    assert (second.body.string_value, third.body.string_value) == ("no JSON", "[1]")
    attributes = collector.requests[0].resource_logs[0].resource.attributes
    assert {pair.key: pair.value.string_value for pair in attributes}["service.name"] == "shop"


async def test_all_events_arrive_in_order(collector):
    """Several batches arrive one after another."""
    publisher = OtlpPublisher(collector.url)
    await emit_numbers(publisher, 1200, rate=1_000_000)
    await publisher.close(30)
    numbers = [
        pair.value.int_value
        for record in records_of(collector)
        for pair in record.body.kvlist_value.values
        if pair.key == "number"
    ]
    assert arrived(numbers, 1200) == (0, 0, True)


async def test_an_exporter_of_the_users(collector):
    """A given exporter is used, and left open for whoever made it."""
    from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter

    exporter = InMemoryLogRecordExporter()
    publisher = OtlpPublisher(exporter=exporter)
    publisher.emit({"event": "order_paid"})
    await publisher.close(30)
    (found,) = exporter.get_finished_logs()
    assert found.log_record.event_name == "order_paid"


async def test_nobody_listens():
    """The report says that the export failed, and where; close does not wait for the exporter's own tries."""
    url = f"http://127.0.0.1:{free_port()}/v1/logs"
    publisher = OtlpPublisher(url, timeout=30)
    publisher.emit({"event": "lost"})
    report = await publisher.close(1)
    assert (report["status"], report["dropped"]) == ("deadline", 1)
