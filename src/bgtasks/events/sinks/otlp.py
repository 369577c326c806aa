"""A sink for OpenTelemetry: a log record per event, passed to a log exporter of its SDK."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Final, Protocol

from bgtasks._checks import check_seconds
from bgtasks.errors import missing_extra
from bgtasks.events._thread import WorkerThread
from bgtasks.events.errors import SinkError
from bgtasks.events.sink import Sink
from bgtasks.events.sinks._inherited import keep_inherited

__all__ = ["LogExporter", "OtlpSink"]

NANOSECONDS: Final = 1_000_000_000
SCOPE: Final = "bgtasks.events"
# Environment variables that name a maker of the exporter's session.
PROVIDERS: Final = (
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_LOGS_CREDENTIAL_PROVIDER",
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER",
)


class LogExporter(Protocol):
    """What the sink uses of a ``LogRecordExporter``."""

    # Any: the record's class is named differently from one release of the SDK to the next.
    def export(self, batch: Sequence[Any], /) -> object:
        """Export a batch of log records; return a ``LogRecordExportResult``."""

    def shutdown(self) -> object:
        """Release what the exporter holds."""


class OtlpSink(Sink):
    """Passes events to a log exporter of the OpenTelemetry SDK, by default the one for OTLP over HTTP.

    An event becomes a log record: its ``event`` is the event name, its ``timestamp`` (seconds since 1970) the time, and
    the whole event the body; an event that is no JSON object becomes a body of text. A batch counts as delivered when
    the exporter reports success. The publisher does queueing, batching and retries: no processor of the SDK is needed.
    A request is sent once, and redirects are not followed: the publisher tries again, after ``Retry-After`` if the
    collector says so. Events that the collector refuses are rejected: by status 400, 413 or 422 one of a batch, by 404
    and the like all. The exporter runs in a thread. OTLP has no ids for batches: a batch whose answer was lost arrives
    twice.

    Args:
        endpoint: the URL of a collector, such as ``http://localhost:4318/v1/logs``; None to follow the environment
            (``OTEL_EXPORTER_OTLP_ENDPOINT``).
        headers: the headers of each request.
        timeout: seconds for each export.
        resource: the source, as attributes: ``{"service.name": "shop"}``; None for the SDK's own detection.
        exporter: a ``LogRecordExporter`` to use instead of ``endpoint``; the caller shuts it down. Its own retries and
            redirects are its own affair, as they are if a credential provider of the SDK makes the session.

    Raises:
        MissingExtraError: the OpenTelemetry SDK or its exporter is not installed.

    Example:
        >>> publisher = Publisher(OtlpSink("http://localhost:4318/v1/logs", resource={"service.name": "shop"}))

    """

    # One thread.
    max_inflight: ClassVar[int | None] = 1

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 10.0,
        resource: Mapping[str, object] | None = None,
        exporter: LogExporter | None = None,
    ) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        except ModuleNotFoundError as error:
            raise missing_extra("otlp", "the OpenTelemetry SDK with its OTLP exporter", "publish over OTLP") from error
        check_seconds("timeout", timeout, positive=True)
        self._given = exporter
        self._make_exporter = OTLPLogExporter
        self._arguments: dict[str, Any] = {"endpoint": endpoint, "headers": dict(headers or {}), "timeout": timeout}
        self._server = "OTLP exporter" if exporter is not None else f"OTLP at {endpoint or 'the default endpoint'}"
        self._resource = Resource.create(resource)
        self._scope = InstrumentationScope(SCOPE)
        self._exporter_thread = WorkerThread("OTLP sink")
        self._exporter: Any = None
        self._session: Any = None
        self._pid = 0

    async def open(self) -> None:
        """Make an exporter; it connects when it exports."""
        if self._exporter is not None and self._pid != os.getpid():
            keep_inherited(self._exporter)
            self._exporter = None
        await self.close()
        self._pid = os.getpid()
        self._exporter = self._given or self._make_own_exporter()

    def _make_own_exporter(self) -> Any:
        from bgtasks.events.sinks._otlp_session import OneTrySession

        if any(os.environ.get(name) for name in PROVIDERS):
            return self._make_exporter(**self._arguments)
        self._session = OneTrySession()
        return self._make_exporter(**self._arguments, session=self._session)

    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Export a batch."""
        from opentelemetry.sdk._logs.export import LogRecordExportResult

        result = await self._exporter_thread.run(self._export, self._exporter, batch)
        if result is not LogRecordExportResult.SUCCESS:
            if self._session is not None:
                raise self._session.outcome(self._server, len(batch))
            raise SinkError(f"{self._server}: the export failed; the exporter's log says why")

    async def close(self) -> None:
        """Shut the exporter down, unless the caller made it; this ends its wait between retries."""
        exporter, self._exporter = self._exporter, None
        if exporter is not None and exporter is not self._given:
            exporter.shutdown()
        self._exporter_thread.stop()

    def _export(self, exporter: LogExporter, batch: Sequence[bytes]) -> object:
        from opentelemetry import context

        # Traces of the exporter's own requests would become events of the next batch, without end.
        key = context._SUPPRESS_INSTRUMENTATION_KEY  # noqa: SLF001  the key has no public name
        token = context.attach(context.set_value(key, True))
        try:
            return exporter.export([self._record(event) for event in batch])
        finally:
            context.detach(token)

    def _record(self, event: bytes) -> Any:
        from opentelemetry._logs import LogRecord, SeverityNumber
        from opentelemetry.sdk._logs import ReadableLogRecord

        now = time.time_ns()
        body: Any = event.decode(errors="backslashreplace")
        name, timestamp = None, now
        with suppress(ValueError):
            content = json.loads(body)
            if isinstance(content, dict):
                body, name, timestamp = content, content.get("event"), _nanoseconds(content.get("timestamp"), now)
        record = LogRecord(
            timestamp=timestamp,
            observed_timestamp=now,
            severity_number=SeverityNumber.INFO,
            body=body,
            event_name=name if isinstance(name, str) else None,
        )
        return ReadableLogRecord(record, self._resource, self._scope)


def _nanoseconds(seconds: object, default: int) -> int:
    is_time = isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 < seconds < 1 << 33
    return int(seconds * NANOSECONDS) if is_time else default  # type: ignore[operator]
