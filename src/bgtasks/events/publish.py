"""``publish_event``: queue an event for the program's publisher, from anywhere in the program."""

from __future__ import annotations

import weakref
from typing import Any, cast

from bgtasks.errors import MissingExtraError
from bgtasks.events._base import BasePublisher, PublishesOne
from bgtasks.events.publisher import Publisher
from bgtasks.events.sinks.publish import PublishSink
from bgtasks.manager import BackgroundTaskManager

__all__ = ["publish_event"]


class _NotInjected:
    """A default where InjectQ would inject an object; its use raises an error that says how to install InjectQ."""

    def __init__(self, error: MissingExtraError) -> None:
        self._text = str(error)

    def missing(self, argument: str) -> MissingExtraError:
        """Return the error for an argument that was neither passed nor injected."""
        return MissingExtraError(f"publish_event() was called without {argument}=, and {self._text}")


try:
    from bgtasks import injection
except MissingExtraError as _error:
    _publisher_default: Any = _NotInjected(_error)
    _manager_default: Any = _publisher_default
    _STAND_INS: tuple[type, ...] = (_NotInjected,)
else:
    _publisher_default = injection.Inject[BasePublisher]  # type: ignore[type-abstract, unused-ignore]
    _manager_default = injection.Inject[BackgroundTaskManager]
    # InjectQ's own class as well: agentflow's functions pass their unresolved defaults on.
    _STAND_INS = tuple(kind for kind in injection.Inject.__mro__ if kind.__name__ == "Inject")


def publish_event(
    event: object,
    publisher: BasePublisher | PublishesOne | None = _publisher_default,
    task_manager: BackgroundTaskManager = _manager_default,
) -> bool:
    """Queue an event for the publisher; never wait, and never raise because of load.

    The first event attaches the publisher to the manager, which shows its flusher, and flushes and closes it in
    ``shutdown``. A publisher of another package, which only has ``async publish(event)``, gets a queue and eight
    workers: see ``PublishSink``.

    Args:
        event: as for ``Publisher.emit``.
        publisher: by default that of the active InjectQ container. None publishes nothing.
        task_manager: by default that of the active InjectQ container.

    Returns:
        Whether the event was accepted.

    Raises:
        MissingExtraError: an argument was left out, and InjectQ is not installed.
        ManagerNotBoundError: ``task_manager`` was left out, and the active container holds none.

    Example:
        >>> async def main():
        ...     publisher = Publisher(JsonlSink("events.jsonl"))
        ...     async with BackgroundTaskManager() as manager:
        ...         print(publish_event({"event": "started"}, publisher, manager))
        ...     print(publisher.stats()["delivered"])
        >>> asyncio.run(main())
        True
        1

    """
    # By exact type first: an injected stand-in imitates the class that it stands for.
    if type(publisher) in _STAND_INS or not isinstance(publisher, BasePublisher):
        found = _publisher_of(publisher)
        if found is None:
            return False
        publisher = found
    if publisher.manager is None:
        _attach(publisher, task_manager)
    return publisher.emit(event)


def _publisher_of(publisher: Any) -> BasePublisher | None:
    found = _resolved(publisher, "publisher")
    if found is None or isinstance(found, BasePublisher):
        return found
    return _publisher_before(cast("PublishesOne", found))


_made: weakref.WeakKeyDictionary[Any, Publisher] = weakref.WeakKeyDictionary()


def _publisher_before(other: PublishesOne) -> Publisher:
    """Return the ``Publisher`` that wraps a publisher of another package; made at the first call."""
    found = _made.get(other)
    if found is None:
        found = _made[other] = Publisher(PublishSink(other), name=type(other).__name__)
    return found


def _attach(publisher: BasePublisher, manager: Any) -> None:
    found = _resolved(manager, "task_manager")
    # A manager of another package cannot attach publishers: the flusher is then a plain task of the loop.
    if hasattr(found, "attach"):
        publisher.attach(found)


def _resolved(value: Any, argument: str) -> Any:
    """Return the object behind an ``Inject[...]``; None if a publisher is wanted and none is bound."""
    if type(value) not in _STAND_INS:
        return value
    if isinstance(value, _NotInjected):
        raise value.missing(argument)
    return injection.lookup(value.service_type, optional=argument == "publisher")
