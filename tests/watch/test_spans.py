"""The spans of traced managers, read from the SDK's exporters."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from requirements import need
from work import failing, failing_later, forever, until, value

from bgtasks import InvalidOptionError, ManagerClosedError, TaskRejectedError

need("opentelemetry.sdk")
from opentelemetry import baggage  # noqa: E402
from opentelemetry import trace as otel  # noqa: E402
from opentelemetry.context import attach, detach  # noqa: E402
from opentelemetry.sdk.resources import Resource  # noqa: E402
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402
from opentelemetry.trace import StatusCode  # noqa: E402

from bgtasks.watch.opentelemetry import trace  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:opentelemetry")


class Traced:
    """An SDK with an exporter in memory."""

    def __init__(self):
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("test")

    def trace(self, manager, **options):
        """Trace a manager."""
        trace(manager, tracer=self.tracer, **options)

    @property
    def spans(self):
        """The ended spans in the order of their ends."""
        return self.exporter.get_finished_spans()

    def outcomes(self):
        """Return name and outcome of each span."""
        return [(span.name, span.attributes["bgtasks.task.outcome"]) for span in self.spans]


@pytest.fixture
def traced():
    """Give an SDK with an exporter in memory."""
    traced = Traced()
    yield traced
    traced.provider.shutdown()


async def current():
    """Return the current span."""
    await asyncio.sleep(0)
    return otel.get_current_span().get_span_context()


async def test_a_span_is_a_new_root_linked_to_the_caller(make_manager, traced):
    """The trace of the caller ends with the caller; in the task its own span is the current one."""
    manager = make_manager()
    traced.trace(manager, name="mails")
    token = attach(baggage.set_baggage("tenant", "a"))
    with traced.tracer.start_as_current_span("request") as request:
        task = manager.create_task(current(), name="send", context={"order": 1})
        carried = manager.create_task(_baggage(), name="baggage")
        assert manager.get_task_info()[0]["context"] == {"order": 1}
    detach(token)
    inside = await task
    assert await carried == "a"
    (span,) = [span for span in traced.spans if span.name == "send"]
    assert span.context == inside
    assert span.parent is None
    assert span.context.trace_id != request.context.trace_id
    assert [link.context for link in span.links] == [request.context]
    assert span.status.status_code is StatusCode.UNSET
    task_id = span.attributes["bgtasks.task.id"]
    assert isinstance(task_id, int)
    assert span.attributes == {
        "bgtasks.manager": "mails",
        "bgtasks.task.name": "send",
        "bgtasks.task.coroutine": "current",
        "bgtasks.task.id": task_id,
        "bgtasks.task.outcome": "completed",
    }
    await manager.shutdown()


async def _baggage():
    return baggage.get_baggage("tenant")


@pytest.mark.parametrize("start", ["create_task", "fire", "spawn", "threadsafe", "eager", "given"])
async def test_a_span_can_be_a_child(make_manager, traced, start):
    """Every way to start a task makes a child of the caller's span, and a task in a task a grandchild."""
    manager = make_manager()
    traced.trace(manager, parent="child")
    with traced.tracer.start_as_current_span("request") as request:
        match start:
            case "create_task":
                manager.create_task(_nesting(manager), name="outer")
            case "fire":
                assert manager.fire(_nesting(manager), name="outer")
            case "spawn":
                await manager.spawn(_nesting(manager), name="outer")
            case "threadsafe":
                loop = asyncio.get_running_loop()
                await asyncio.to_thread(
                    lambda: manager.create_task_threadsafe(_nesting(manager), name="outer", loop=loop)
                )
                await until(lambda: len(traced.spans) == 2)
            case "eager":
                manager.create_task(_nesting(manager), name="outer", eager_start=True)
            case "given":
                manager.create_task(_nesting(manager), name="outer", contextvars_context=contextvars.Context())
    await manager.wait_for_all()
    spans = {span.name: span for span in traced.spans}
    assert spans["outer"].parent == request.context
    assert spans["outer"].context.trace_id == request.context.trace_id
    assert spans["inner"].parent == spans["outer"].context
    assert spans["outer"].links == ()
    await manager.shutdown()


async def _nesting(manager):
    await manager.create_task(value(), name="inner")


async def test_the_callers_span_stays_current(make_manager, traced):
    """Starting a task changes no variable of the caller, nor a context that was passed."""
    manager = make_manager()
    traced.trace(manager)
    given = contextvars.Context()
    before = otel.get_current_span()
    manager.create_task(value(), eager_start=True)
    manager.fire(value())
    manager.create_task(value(), contextvars_context=given)
    assert otel.get_current_span() is before
    assert list(given) == []
    await manager.wait_for_all()
    await manager.shutdown()


async def test_every_outcome_ends_the_span(make_manager, traced):
    """Failures are recorded with their tracebacks; whatever ends a task ends its span, once."""
    manager = make_manager(max_concurrency=4)
    traced.trace(manager)
    tasks = [
        manager.create_task(failing(ValueError("bad")), name="fails"),
        manager.create_task(failing_later(KeyError("late")), name="fails later", eager_start=True),
        manager.create_task(forever(), name="expires", timeout=0.01),
    ]
    running = manager.create_task(forever(), name="cancelled")
    queued = manager.create_task(forever(), name="cancelled in the queue")
    await asyncio.sleep(0)
    unstarted = manager.create_task(forever(), name="cancelled before the first step")
    manager.fire(forever(), name="fired and cancelled")
    for task in (running, queued, unstarted):
        task.cancel()
    manager.cancel("fired and cancelled")
    await asyncio.gather(*tasks, running, queued, unstarted, return_exceptions=True)
    await manager.wait_for_all(return_exceptions=True)
    assert sorted(traced.outcomes()) == [
        ("cancelled", "cancelled"),
        ("cancelled before the first step", "cancelled"),
        ("cancelled in the queue", "cancelled"),
        ("expires", "timed_out"),
        ("fails", "failed"),
        ("fails later", "failed"),
        ("fired and cancelled", "cancelled"),
    ]
    spans = {span.name: span for span in traced.spans}
    (event,) = spans["fails"].events
    assert event.name == "exception"
    assert event.attributes["exception.type"] == "ValueError"
    assert "in failing" in event.attributes["exception.stacktrace"]
    assert spans["fails"].attributes["error.type"] == "ValueError"
    assert (spans["fails"].status.status_code, spans["fails"].status.description) == (
        StatusCode.ERROR,
        "ValueError: bad",
    )
    assert spans["expires"].status.status_code is StatusCode.ERROR
    assert spans["cancelled"].status.status_code is StatusCode.UNSET
    await manager.shutdown()


async def test_refused_and_dropped_coroutines_have_spans(make_manager, traced):
    """What did not start is seen, too."""
    manager = make_manager(max_pending_tasks=1, overflow="drop_newest")
    traced.trace(manager)
    task = manager.create_task(forever(), name="first")
    with pytest.raises(TaskRejectedError):
        manager.create_task(forever(), name="second")
    assert not manager.fire(forever(), name="third")
    assert traced.outcomes() == [("second", "rejected"), ("third", "dropped")]
    assert [span.status.status_code for span in traced.spans] == [StatusCode.ERROR, StatusCode.ERROR]
    task.cancel()
    await manager.shutdown()
    with pytest.raises(ManagerClosedError):
        manager.fire(forever(), name="late")
    assert traced.outcomes()[2:] == [("first", "cancelled"), ("late", "rejected")]


async def test_bad_arguments_raise_as_without_traces(make_manager, traced):
    """No span hides an error."""
    manager = make_manager()
    traced.trace(manager)
    for options in ({"context": 1}, {"contextvars_context": 1}, {"timeout": -1}):
        with pytest.raises((TypeError, ValueError)):
            manager.create_task(forever(), **options)
    with pytest.raises(TypeError):
        manager.create_task(forever)
    await manager.shutdown()


def test_tasks_of_a_closed_loop_are_abandoned(make_manager, traced):
    """Their spans end when the manager finds that the loop was closed."""
    manager = make_manager()
    traced.trace(manager)

    async def leave():
        manager.create_task(forever(), name="left")
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    asyncio.run(manager.shutdown())
    assert traced.outcomes() == [("left", "abandoned")]


async def test_only_some_names(make_manager, traced):
    """Tasks of other names have no span, and see that of their caller."""
    manager = make_manager()
    traced.trace(manager, names={"import"})
    with traced.tracer.start_as_current_span("request") as request:
        assert await manager.create_task(current(), name="other") == request.context
        manager.fire(value(), name="import")
        manager.fire(value(), name="other")
        await manager.wait_for_all()
    assert [span.name for span in traced.spans] == ["import", "request"]
    await manager.shutdown()


async def test_a_task_keeps_its_frames_and_nothing_is_kept(make_manager, traced):
    """The coroutine is not wrapped; an ended task leaves nothing in the manager."""
    manager = make_manager()
    traced.trace(manager)
    coro = forever()
    task = manager.create_task(coro)
    await asyncio.sleep(0)
    assert task.get_coro() is coro
    tracing = manager.create_task.__self__
    assert len(tracing._open) == 1
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert not tracing._open
    await manager.shutdown()


async def test_an_untraced_manager_is_untouched(make_manager, traced):
    """Its functions are those of the registry: no instruction more."""
    manager, other = make_manager(), make_manager()
    before = {name: getattr(other, name) for name in ("create_task", "fire", "_report")}
    traced.trace(manager)
    assert not {"create_task", "fire", "_report", "_on_abandoned"} & vars(other).keys()
    assert {name: getattr(other, name) for name in before} == before
    await other.create_task(value())
    assert traced.spans == ()
    await manager.shutdown()
    await other.shutdown()


async def test_errors_of_the_tracer_do_not_reach_the_work(make_manager, caplog):
    """The task runs, and the log says what failed."""

    class Broken(SpanProcessor):
        def on_start(self, span, parent_context=None):
            if span.name == "start":
                raise ValueError("no start")

        def on_end(self, span):
            raise ValueError("no end")

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Broken())
    manager = make_manager()
    trace(manager, tracer=provider.get_tracer("test"))
    with caplog.at_level(logging.ERROR, "bgtasks.watch"):
        assert await manager.create_task(value(1), name="start") == 1
        assert await manager.create_task(value(2), name="end") == 2
    assert [record.message for record in caplog.records] == [
        "The tracer failed; task 'start' has no span",
        "The tracer failed at the end of a span",
    ]
    await manager.shutdown()
    provider.shutdown()


async def test_invalid_options(make_manager, traced):
    """Each refusal says what is allowed."""
    manager = make_manager()
    with pytest.raises(InvalidOptionError, match="parent must be one of 'link', 'child'"):
        trace(manager, parent="root")
    with pytest.raises(InvalidOptionError, match="names must be a set of names"):
        trace(manager, names="import")
    with pytest.raises(InvalidOptionError, match="manager must be a BackgroundTaskManager"):
        trace(object())
    traced.trace(manager)
    with pytest.raises(InvalidOptionError, match="traced already"):
        traced.trace(manager)
    await manager.shutdown()


@pytest.mark.loops("asyncio")
async def test_spans_arrive_over_otlp(make_manager):
    """The SDK's own exporter sends them over HTTP; links and errors arrive."""
    need("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    requests = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    provider = TracerProvider(resource=Resource({"service.name": "shop"}), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(f"http://127.0.0.1:{server.server_port}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    manager = make_manager()
    trace(manager, tracer=provider.get_tracer("test"))
    with provider.get_tracer("test").start_as_current_span("request"):
        manager.fire(failing(ValueError("bad")), name="import")
    await manager.wait_for_all(return_exceptions=True)
    await asyncio.to_thread(provider.force_flush)
    await asyncio.to_thread(provider.shutdown)
    server.shutdown()
    thread.join()
    server.server_close()
    (request,) = requests
    spans = {span.name: span for span in request.resource_spans[0].scope_spans[0].spans}
    assert spans["import"].links[0].span_id == spans["request"].span_id
    assert spans["import"].events[0].name == "exception"
    assert spans["import"].status.message == "ValueError: bad"
    await manager.shutdown()
