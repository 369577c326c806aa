"""Publishers that pass the events of agentflow and 10xGraph on, and a ``publish_event`` that needs no task for them."""

from __future__ import annotations

import asyncio
import functools
import importlib
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, ClassVar

from bgtasks.errors import InvalidOptionError, describe
from bgtasks.events import BasePublisher, EncodeError, Publisher
from bgtasks.events._encoding import JsonEncoder

__all__ = ["FrameworkPublisher", "publisher_of", "straight"]

# Tasks that sync_close started: a running loop itself holds only weak references.
_closing: set[asyncio.Task[object]] = set()


class FrameworkPublisher:
    """Passes a framework's events on; ``publisher_of`` derives a class from it and from the framework's base.

    Args:
        target: the publisher that gets the events; closed with this one.

    """

    # The framework's class of events, and the default time of its events.
    _events: ClassVar[type]
    _import_time: ClassVar[float | None]

    def __init__(self, target: BasePublisher) -> None:
        super().__init__({})  # type: ignore[call-arg]  # the framework's base takes its configuration
        self.target = target
        self._encoder = JsonEncoder()
        self._is_closed = False

    def emit(self, event: Any) -> bool:
        """Queue an event as it is now; from any thread. See ``Publisher.emit_encoded``."""
        return self.target.emit_encoded(self._dated(event))

    async def publish(self, event: Any) -> bool:
        """Queue an event as it is now; wait for capacity if the publisher does."""
        event = self._dated(event)
        try:
            event = self._encoder.encode(event)
        except EncodeError:
            # emit_encoded() counts the event as refused.
            return self.target.emit_encoded(event)
        return await self.target.publish(event)

    async def close(self) -> None:
        """Close the publisher that gets the events, too; a second call does nothing."""
        self._is_closed = True
        await self.target.close()

    def sync_close(self) -> None:
        """Do as ``close`` and wait for it; if a loop runs in this thread, only start it on that loop."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(self.close())
            return
        task = loop.create_task(self.close(), name=f"close {self.target!r}")
        _closing.add(task)
        task.add_done_callback(_closing.discard)

    def _dated(self, event: Any) -> Any:
        """Return an event with a time of its own."""
        if isinstance(event, self._events) and event.timestamp == self._import_time:  # type: ignore[attr-defined]
            # A copy: the frameworks make one event per run and change it from one call to the next.
            event = event.model_copy(update={"timestamp": time.time()})  # type: ignore[attr-defined]
        return event


def publisher_of(framework: str, target: object) -> FrameworkPublisher:
    """Return a publisher of a framework that passes events on to ``target``.

    Raises:
        InvalidOptionError: ``target`` is not a publisher of ``bgtasks.events``, or its sink takes events unencoded.

    """
    if not isinstance(target, BasePublisher) or (isinstance(target, Publisher) and not target.sink.takes_bytes):
        raise InvalidOptionError(
            "publisher() takes a publisher of bgtasks.events whose sink takes bytes, such as "
            f"Publisher(RedisSink(...)); got {describe(target)}. Pass a publisher of the framework to StateGraph itself"
        )
    return _class_for(framework)(target)


@functools.cache
def _class_for(framework: str) -> type[FrameworkPublisher]:
    base = importlib.import_module(f"{framework}.runtime.publisher.base_publisher").BasePublisher
    events = importlib.import_module(f"{framework}.runtime.publisher.events").EventModel
    space = {
        "__doc__": FrameworkPublisher.__doc__,
        "__module__": __name__,
        "_events": events,
        "_import_time": _import_time(events),
    }
    return type("Publisher", (FrameworkPublisher, base), space)


def _import_time(events: Any) -> float | None:
    """Return the default time of the framework's events: it comes from a method of one ``datetime``."""
    default = events.model_fields["timestamp"].default_factory
    bound = getattr(default, "__self__", None)
    return bound.timestamp() if isinstance(bound, datetime) else None


def straight(by_task: Callable[..., None], fresh: Callable[[Any], Any]) -> Callable[..., None]:
    """Return a ``publish_event`` for a framework, which starts no task for a ``FrameworkPublisher``.

    Args:
        by_task: the framework's own, for other publishers.
        fresh: the framework's function that resolves an ``Inject`` default.

    """

    @functools.wraps(by_task)
    def publish_event(event: Any, publisher: Any, task_manager: Any) -> None:
        found = fresh(publisher)
        if isinstance(found, FrameworkPublisher):
            found.emit(event)
        else:
            by_task(event, publisher, task_manager)

    # The same objects: install() and uninstall() change what they resolve to.
    publish_event.__defaults__ = by_task.__defaults__  # type: ignore[attr-defined]
    return publish_event
