"""Uses of bgtasks.watch."""

from __future__ import annotations

from typing import assert_type

from opentelemetry.metrics import get_meter
from opentelemetry.trace import get_tracer
from prometheus_client import REGISTRY

import bgtasks
from bgtasks import WatchError
from bgtasks.events import Publisher
from bgtasks.watch import listen, opentelemetry, stop
from bgtasks.watch.opentelemetry import Counted, SpanParent, instrument, trace
from bgtasks.watch.prometheus import OCTAVES, Collector, Managed, Published


def watching() -> None:
    """A process that answers viewers."""
    try:
        assert_type(listen(), None)
    except WatchError as error:
        caught: RuntimeError = error
        print(caught)
    assert_type(stop(), None)
    bgtasks.BackgroundTaskManager(watch=True)
    bgtasks.BackgroundTaskManager(watch="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def exporting(manager: bgtasks.BackgroundTaskManager, publisher: Publisher) -> None:
    """A collector takes managers and publishers, and is one for prometheus_client."""
    managed: Managed = manager
    published: Published = publisher
    assert_type(OCTAVES, tuple[float, ...])
    collector = Collector(managed, manager="mails", publishers=[published], buckets=OCTAVES[:3])
    assert_type(collector.render(), bytes)
    REGISTRY.register(collector)
    Collector(publisher)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    counted: Counted = manager
    sent: opentelemetry.Published = publisher
    assert_type(instrument(counted, publishers=[sent], meter=get_meter("app"), name="mails"), None)
    instrument(publisher)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    parent: SpanParent = "child"
    assert_type(trace(manager, parent=parent, names={"send"}, tracer=get_tracer("app"), name="mails"), None)
    trace(manager, parent="root")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
