"""OTLP: log records at a collector, and a collector that does not answer."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from arrivals import arrived, emit_numbers
from requirements import need
from servers import free_port

from bgtasks.events import Publisher, Retry, SinkError
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


class Answering:
    """Answers requests with given statuses and headers, then with success; keeps the numbers of events."""

    def __init__(self, answers):
        self.answers = list(answers)
        self.sizes = []

    def __enter__(self):
        from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = ExportLogsServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
                records = request.resource_logs[0].scope_logs[0].log_records
                outer.sizes.append(len(records))
                status, headers = outer.answers.pop(0) if outer.answers else (200, {})
                if callable(status):
                    status = status([record.body.string_value for record in records])
                self.send_response(status)
                for name, value in {"Content-Length": "0", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/logs"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


async def test_a_bad_event_is_found_by_halves(tmp_path):
    """Status 400 refuses a batch; it is halved until the bad event is alone."""

    def judge(texts):
        return 400 if "bad" in texts else 200

    with Answering([(judge, {})] * 20) as collector:
        publisher = Publisher(OtlpSink(collector.url), dead_letters=tmp_path / "dead")
        for number in range(8):
            publisher.emit(b"bad" if number == 5 else b"good")
        report = await publisher.close(30)
    assert report["status"] == "flushed"
    stats = publisher.stats()
    assert (stats["delivered"], stats["dropped"], stats["retried"]) == (7, {"rejected": 1}, 0)
    assert "status 400" in (tmp_path / "dead").read_text()


async def test_a_wrong_path_is_a_refusal_of_all_events():
    """Status 404 comes from a wrong endpoint: trying again, or with fewer events, would change nothing."""
    with Answering([(404, {})]) as collector:
        publisher = Publisher(OtlpSink(collector.url))
        for _ in range(8):
            publisher.emit(b"event")
        await publisher.flush(30)
        assert publisher.stats()["dropped"] == {"rejected": 8}
        assert "status 404" in publisher.stats()["last_error"]
        assert "is the endpoint right?" in publisher.stats()["last_error"]
        await publisher.close()
    assert collector.sizes == [8]


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_counts(status):
    """The publisher waits as long as the collector says; the exporter itself does not try again."""
    with Answering([(status, {"Retry-After": "1"})]) as collector:
        async with OtlpSink(collector.url) as sink:
            with pytest.raises(Retry, match=f"status {status}") as caught:
                await sink.write([b"event"], "1")
            assert caught.value.after == 1.0
            await sink.write([b"event"], "1")
    assert collector.sizes == [1, 1]


async def test_a_retry_after_may_be_a_date():
    """A date in the past means at once; what cannot be read means the usual back-off."""
    dates = {"Wed, 21 Oct 2015 07:28:00 GMT": 0.0, "soon": None}
    with Answering([(503, {"Retry-After": date}) for date in dates]) as collector:
        async with OtlpSink(collector.url) as sink:
            for after in dates.values():
                with pytest.raises(Retry) as caught:
                    await sink.write([b"event"], "1")
                assert caught.value.after == after


async def test_a_redirect_is_an_error_and_is_not_followed(collector):
    """It may lead to plain text; and the SDK would take it for success."""
    with Answering([(307, {"Location": collector.url})]) as redirecting:
        async with OtlpSink(redirecting.url) as sink:
            with pytest.raises(SinkError, match=f"redirects to {collector.url}, which is not followed"):
                await sink.write([b"event"], "1")
    assert collector.requests == []
