"""Hands events to an OpenTelemetry collector, as log records.

Start a collector, and install what the example needs::

    docker run --publish 4318:4318 otel/opentelemetry-collector
    pip install "bgtasks-registry[otlp]"
    python examples/publish_to_otlp.py http://localhost:4318/v1/logs

"""

from __future__ import annotations

import sys
from functools import partial

import bgtasks
from bgtasks import BackgroundTaskManager
from bgtasks.events import Publisher
from bgtasks.events.sinks.otlp import OtlpSink

EVENTS = 1_000


async def main(endpoint: str, manager: BackgroundTaskManager) -> None:
    """Publish; a record's body is the event, its name the event's ``event``."""
    publisher = Publisher(OtlpSink(endpoint, resource={"service.name": "shop"}), manager=manager)
    for number in range(EVENTS):
        publisher.emit({"event": "order_paid", "order": number})
    report = await publisher.close()
    print(f"{report['delivered']:,} of {EVENTS:,} events delivered, {report['dropped']:,} dropped")


if __name__ == "__main__":
    bgtasks.run(partial(main, sys.argv[1] if len(sys.argv) > 1 else "http://localhost:4318/v1/logs"))
