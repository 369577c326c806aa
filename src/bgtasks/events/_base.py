"""The base class of publishers, and the interface of agent frameworks' publishers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from bgtasks.events.info import FlushReport

if TYPE_CHECKING:
    from bgtasks.manager import BackgroundTaskManager

__all__ = ["BasePublisher", "PublishesOne"]


@runtime_checkable
class PublishesOne(Protocol):
    """A publisher of another package with an async ``publish``, such as those of agentflow and 10xGraph."""

    # Any: authors have event types of their own.
    async def publish(self, event: Any, /) -> object:
        """Publish one event."""


class BasePublisher(ABC):
    """The base class of ``Publisher`` and ``Fanout``, by which programs ask for a publisher in injection."""

    @abstractmethod
    def emit(self, event: object) -> bool:
        """Queue an event, from any thread; return whether it was accepted. See ``Publisher.emit``."""

    @abstractmethod
    def emit_encoded(self, event: object) -> bool:
        """Encode an event now, and queue it as ``emit`` does: for an event that is changed afterwards."""

    @abstractmethod
    async def publish(self, event: object, *, durable: bool = False) -> bool:
        """Queue an event as ``emit`` does, or wait for capacity first. See ``Publisher.publish``."""

    @abstractmethod
    async def start(self) -> Self:
        """Start on the running loop, before the first event."""

    @abstractmethod
    async def flush(self, timeout: float = 5.0) -> FlushReport:
        """Wait until every event accepted so far is delivered or dropped, at most ``timeout`` seconds."""

    @abstractmethod
    async def close(self, timeout: float = 5.0) -> FlushReport:
        """Refuse further events, flush, and spool or drop the rest, all within ``timeout`` seconds."""

    @property
    @abstractmethod
    def manager(self) -> BackgroundTaskManager | None:
        """The manager that it is attached to, None if there is none."""

    @abstractmethod
    def attached(self, manager: BackgroundTaskManager, /) -> None:
        """Note a manager that flushes and closes this publisher; called by ``manager.attach``."""

    def attach(self, manager: BackgroundTaskManager) -> None:
        """Attach to a manager, as ``manager.attach(self)`` does."""
        manager.attach(self)

    async def __aenter__(self) -> Self:
        """Call ``start``."""
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Call ``close`` with its default timeout."""
        await self.close()
