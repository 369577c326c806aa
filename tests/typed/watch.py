"""Uses of bgtasks.watch."""

from __future__ import annotations

from typing import Any, assert_type

from aiohttp import web
from opentelemetry.metrics import get_meter
from opentelemetry.trace import get_tracer
from prometheus_client import REGISTRY, CollectorRegistry

import bgtasks
from bgtasks import WatchError
from bgtasks.events import Fanout, Publisher
from bgtasks.integrations.aiohttp import add_page
from bgtasks.watch import Auth, Page, app, listen, opentelemetry, stop
from bgtasks.watch.opentelemetry import Counted, SpanParent, instrument, trace
from bgtasks.watch.prometheus import OCTAVES, Collector, Managed, Published, metrics_app, render


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


def exporting(manager: bgtasks.BackgroundTaskManager, publisher: Publisher, fanout: Fanout) -> None:
    """A collector takes managers and publishers, and is one for prometheus_client."""
    managed: Managed = manager
    published: Published = publisher
    assert_type(OCTAVES, tuple[float, ...])
    collector = Collector(managed, manager="mails", publishers=[published, fanout], buckets=OCTAVES[:3])
    assert_type(render(collector, registry=CollectorRegistry()), bytes)
    metrics_app(collector, registry=None)
    metrics_app(manager)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    REGISTRY.register(collector)
    Collector(publisher)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    counted: Counted = manager
    sent: opentelemetry.Published = publisher
    assert_type(instrument(counted, publishers=[sent, fanout], meter=get_meter("app"), name="mails"), None)
    instrument(publisher)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    parent: SpanParent = "child"
    assert_type(trace(manager, parent=parent, names={"send"}, tracer=get_tracer("app"), name="mails"), None)
    trace(manager, parent="root")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def showing(manager: bgtasks.BackgroundTaskManager, scope: dict[str, Any]) -> None:
    """A page is an ASGI application; ``auth`` may be a function or a coroutine function."""

    async def decide(scope: object) -> bool:
        return bool(scope)

    auth: Auth = decide
    page = app(manager, auth=auth, token="a secret of some length", allow_cancel=True, show_context=["order"])
    assert_type(page, Page)
    app(auth=lambda scope: "client" in scope, hosts=("app.example",))
    app(token=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(add_page(web.Application(), "/tasks", page), None)
    assert_type(page.close(), None)
