"""``publish_event``: an event into the publisher of the program, from anywhere in it."""

from __future__ import annotations

from typing import Any, cast

from bgtasks.errors import MissingExtraError
from bgtasks.events.publisher import BasePublisher
from bgtasks.events.workers import PublishesOne, worker_publisher_of
from bgtasks.manager import BackgroundTaskManager

__all__ = ["publish_event"]


class _NotInjected:
    """Stands where InjectQ would put an object; whoever needs that object is told how to have InjectQ."""

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
    _publisher_default = injection.Inject[BasePublisher]  # type: ignore[type-abstract]
    _manager_default = injection.Inject[BackgroundTaskManager]
    # InjectQ's own, too: agentflow's functions pass theirs on.
    _STAND_INS = tuple(kind for kind in injection.Inject.__mro__ if kind.__name__ == "Inject")


def publish_event(
    event: Any,
    publisher: BasePublisher | PublishesOne | None = _publisher_default,
    task_manager: BackgroundTaskManager = _manager_default,
) -> bool:
    """Queue an event for the publisher; never waits and never raises because of load.

    The publisher's flusher becomes a task of the manager at the first event: it is shown there, and the manager's
    ``shutdown`` flushes and closes the publisher. A publisher that only defines ``async publish(event)`` is put behind
    a queue and eight workers.

    Args:
        event: as for ``BasePublisher.emit``.
        publisher: a publisher; that of the active InjectQ container by default. None publishes nothing.
        task_manager: a manager; that of the active InjectQ container by default.

    Returns:
        Whether the event was accepted.

    Raises:
        MissingExtraError: an argument was left out, and InjectQ is not installed.
        ManagerNotBoundError: ``task_manager`` was left out, and the active container holds none.

    Example:
        >>> publish_event({"event": "started"}, JsonlPublisher("events.jsonl"), manager)
        True

    """
    # By exact type first: an injected stand-in passes itself off as what it stands for.
    if type(publisher) in _STAND_INS or not isinstance(publisher, BasePublisher):
        found = _publisher_of(publisher)
        if found is None:
            return False
        publisher = found
    if not publisher.is_attached:
        _attach(publisher, task_manager)
    return publisher.emit(event)


def _publisher_of(publisher: Any) -> BasePublisher | None:
    found = _resolved(publisher, "publisher")
    if found is None or isinstance(found, BasePublisher):
        return found
    return worker_publisher_of(cast("PublishesOne", found))


def _attach(publisher: BasePublisher, manager: Any) -> None:
    found = _resolved(manager, "task_manager")
    # Another package's manager knows nothing of publishers: the flusher then is a task of the loop alone.
    if hasattr(found, "attach"):
        publisher.attach(found)


def _resolved(value: Any, argument: str) -> Any:
    """Return what stands behind an ``Inject[...]``; None where a publisher is wanted and none was bound."""
    if type(value) not in _STAND_INS:
        return value
    if isinstance(value, _NotInjected):
        raise value.missing(argument)
    return injection.lookup(value.service_type, optional=argument == "publisher")
