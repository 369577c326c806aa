"""OTLP: log records at a collector, and a collector that does not answer."""

from __future__ import annotations

import pytest
from arrivals import arrived, emit_numbers
from requirements import need
from servers import free_port

from bgtasks.events import Publisher, SinkError
from bgtasks.events.sinks.otlp import OtlpSink

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
    """Each event is a record with its name, its time and its content; the resource names the source."""
    publisher = Publisher(OtlpSink(collector.url, resource={"service.name": "shop"}))
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
    publisher = Publisher(OtlpSink(collector.url))
    await emit_numbers(publisher, 1200, rate=1_000_000)
    await publisher.close(30)
    numbers = [
        pair.value.int_value
        for record in records_of(collector)
        for pair in record.body.kvlist_value.values
        if pair.key == "number"
    ]
    assert arrived(numbers, 1200) == (0, 0, True)


async def test_a_sink_alone_writes_and_can_be_opened_again(collector):
    """``write`` returns when the exporter has succeeded; after ``close``, ``open`` makes a new exporter."""
    sink = OtlpSink(collector.url)
    for number in range(2):
        await sink.open()
        await sink.write([b'{"event":"counted"}', b"no JSON"], f"id-{number}")
        assert len(records_of(collector)) == 2 * (number + 1)
        await sink.close()
    assert [record.event_name for record in records_of(collector)] == ["counted", ""] * 2


async def test_a_failed_export_is_an_error_that_names_the_endpoint():
    """``write`` raises once the exporter has given up within its timeout."""
    url = f"http://127.0.0.1:{free_port()}/v1/logs"
    async with OtlpSink(url, timeout=0.1) as sink:
        with pytest.raises(SinkError, match=f"OTLP at {url}: the export failed"):
            await sink.write([b'{"event":"lost"}'], "id")


async def test_a_given_exporter_is_used_and_left_open(collector):
    """Its maker shuts it down."""
    from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter

    exporter = InMemoryLogRecordExporter()
    publisher = Publisher(OtlpSink(exporter=exporter))
    publisher.emit({"event": "order_paid"})
    await publisher.close(30)
    (found,) = exporter.get_finished_logs()
    assert found.log_record.event_name == "order_paid"


async def test_close_does_not_wait_for_the_exporters_own_tries():
    """With a collector that does not answer, the event is dropped within the timeout of ``close``."""
    url = f"http://127.0.0.1:{free_port()}/v1/logs"
    publisher = Publisher(OtlpSink(url, timeout=30))
    publisher.emit({"event": "lost"})
    report = await publisher.close(1)
    assert (report["status"], report["dropped"]) == ("timeout", 1)
