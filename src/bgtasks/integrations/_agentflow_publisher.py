"""A publisher of ours in the place of agentflow's and 10xGraph's, and a ``publish_event`` that needs no task for it."""

from __future__ import annotations

import asyncio
import functools
import importlib
import time
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar

from bgtasks.errors import InvalidOptionError, describe

if TYPE_CHECKING:
    from bgtasks.events import BasePublisher

__all__ = ["FrameworkPublisher", "publisher_of", "straight"]

# Closings that sync_close began on a running loop, which itself holds only weak references.
_closing: set[asyncio.Task[object]] = set()


class FrameworkPublisher:
    """Passes a framework's events on; ``publisher_of`` derives a class from it and from the framework's base.

    Args:
        ours: where the events go; closed with this one.

    """

    # The framework's events, and the time that each of them carries which was given none.
    _events: ClassVar[type]
    _import_time: ClassVar[float | None]

    def __init__(self, ours: BasePublisher) -> None:
        super().__init__({})  # type: ignore[call-arg]  # the framework's base takes its configuration
        self.ours = ours
        self._is_closed = False

    def emit(self, event: Any) -> bool:
        """Queue an event as it is now; from any thread. See ``BasePublisher.emit``."""
        payload = self._payload(event)
        return payload is not None and self.ours.emit(payload)

    async def publish(self, event: Any) -> bool:
        """Queue an event as it is now; where ours waits for room, wait."""
        payload = self._payload(event)
        return payload is not None and await self.ours.publish(payload)

    async def close(self) -> None:
        """Close ours. Again does nothing."""
        self._is_closed = True
        await self.ours.close()

    def sync_close(self) -> None:
        """Close ours, and wait for that; where a loop runs in this thread, begin to, and leave the rest to the loop."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(self.close())
            return
        task = loop.create_task(self.close(), name=f"close {self.ours.name}")
        _closing.add(task)
        task.add_done_callback(_closing.discard)

    def _payload(self, event: Any) -> bytes | None:
        # At once: the frameworks make one event a run and change it from one call to the next.
        if isinstance(event, self._events) and event.timestamp == self._import_time:  # type: ignore[attr-defined]
            # In a copy: the next time that it passes it is to have another.
            event = event.model_copy(update={"timestamp": time.time()})  # type: ignore[attr-defined]
        return self.ours.encoded(event)


def publisher_of(framework: str, ours: object) -> FrameworkPublisher:
    """Return a publisher of a framework around one of ours.

    Raises:
        InvalidOptionError: it is none of ours, or one that needs the events themselves.

    """
    from bgtasks.events import BasePublisher
    from bgtasks.events.workers import WorkerPublisher

    if not isinstance(ours, BasePublisher) or isinstance(ours, WorkerPublisher):
        raise InvalidOptionError(
            "publisher() takes a publisher of bgtasks.events that takes bytes, RedisPublisher for one; "
            f"got {describe(ours)}. A publisher of the framework goes to StateGraph as it is"
        )
    return _class_for(framework)(ours)


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
    """Return the time that the framework gives every event: its default is the method of one ``datetime``."""
    default = events.model_fields["timestamp"].default_factory
    bound = getattr(default, "__self__", None)
    return bound.timestamp() if isinstance(bound, datetime) else None


def straight(by_task: Callable[..., None], fresh: Callable[[Any], Any]) -> Callable[..., None]:
    """Return a ``publish_event`` for a framework that starts no task where the publisher is ours.

    Args:
        by_task: the framework's own, for other publishers.
        fresh: the framework's function that finds what an ``Inject`` default stands for.

    """

    @functools.wraps(by_task)
    def publish_event(event: Any, publisher: Any, task_manager: Any) -> None:
        found = fresh(publisher)
        if isinstance(found, FrameworkPublisher):
            found.emit(event)
        else:
            by_task(event, publisher, task_manager)

    # The very same objects: install() and uninstall() change what they stand for.
    publish_event.__defaults__ = by_task.__defaults__  # type: ignore[attr-defined]
    return publish_event
