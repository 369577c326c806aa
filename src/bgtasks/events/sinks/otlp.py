"""Events into OpenTelemetry: a log record each, handed to a log exporter of its SDK."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from bgtasks.errors import missing_extra
from bgtasks.events._thread import OwnThread
from bgtasks.events.errors import SinkError
from bgtasks.events.publisher import BasePublisher
from bgtasks.events.sinks._inherited import keep_inherited
from bgtasks.events.sinks._options import check_seconds

__all__ = ["OtlpPublisher"]

NANOSECONDS: Final = 1_000_000_000
SCOPE: Final = "bgtasks.events"


class OtlpPublisher(BasePublisher):
    """Hands events to a log exporter of the OpenTelemetry SDK, by default the one for OTLP over HTTP.

    An event becomes a log record: its ``event`` is the event's name, its ``timestamp`` (seconds since 1970) the time,
    and all of it the body; an event that is no JSON object is the body as text. A batch counts as delivered when the
    exporter says so. Queue, batches and retries are ours, so no processor of the SDK stands in between. The exporter
    runs in a thread. OTLP knows no ids for batches: one whose answer was lost arrives twice.

    Args:
        endpoint: where a collector listens, ``http://localhost:4318/v1/logs`` for one; None to follow the environment
            (``OTEL_EXPORTER_OTLP_ENDPOINT``).
        headers: for each request.
        timeout: seconds for each export; the exporter tries again by itself within them.
        resource: who speaks, as attributes: ``{"service.name": "shop"}``; None for the SDK's own detection.
        exporter: a ``LogRecordExporter`` to use instead of ``endpoint``; whoever made it shuts it down.
        **options: those of ``BasePublisher``.

    Raises:
        MissingExtraError: the OpenTelemetry SDK or its exporter is not installed.

    Example:
        >>> publisher = OtlpPublisher("http://localhost:4318/v1/logs", resource={"service.name": "shop"})
        >>> publisher.emit({"event": "order_paid", "order": 42})
        True
        >>> await publisher.close()

    """

    # One thread.
    max_inflight = 1

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 10.0,
        resource: Mapping[str, Any] | None = None,
        exporter: Any = None,
        **options: Any,
    ) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        except ModuleNotFoundError as error:
            raise missing_extra("otlp", "the OpenTelemetry SDK with its OTLP exporter", "publish over OTLP") from error
        check_seconds("timeout", timeout)
        super().__init__(**options)
        self._given = exporter
        self._make_exporter = OTLPLogExporter
        self._arguments: dict[str, Any] = {"endpoint": endpoint, "headers": dict(headers or {}), "timeout": timeout}
        self._server = "OTLP exporter" if exporter is not None else f"OTLP at {endpoint or 'the default endpoint'}"
        self._resource = Resource.create(resource)
        self._scope = InstrumentationScope(SCOPE)
        self._exporter_thread = OwnThread(f"{self.name}-otlp")
        self._exporter: Any = None
        self._pid = 0

    async def open(self) -> None:
        """Make an exporter; it connects when it exports."""
        if self._exporter is not None and self._pid != os.getpid():
            keep_inherited(self._exporter)
            self._exporter = None
            self._exporter_thread.forget()
        await self.release()
        self._pid = os.getpid()
        self._exporter = self._given or self._make_exporter(**self._arguments)

    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Export a batch."""
        from opentelemetry.sdk._logs.export import LogRecordExportResult

        result = await self._exporter_thread.run(self._export, self._exporter, batch)
        if result is not LogRecordExportResult.SUCCESS:
            raise SinkError(f"{self._server}: the export failed; the exporter's log says why")

    async def release(self) -> None:
        """Shut our exporter down; one that waits to try again stops waiting."""
        exporter, self._exporter = self._exporter, None
        if exporter is not None and exporter is not self._given:
            exporter.shutdown()
        self._exporter_thread.stop()

    def _export(self, exporter: Any, batch: Sequence[bytes]) -> Any:
        from opentelemetry import context

        # Traces of the exporter's own requests would be events of the next batch, and so on.
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
