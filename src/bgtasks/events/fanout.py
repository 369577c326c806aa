"""One publisher in front of several others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Self

from bgtasks.errors import InvalidOptionError, describe
from bgtasks.events._base import BasePublisher
from bgtasks.events._encoding import JsonEncoder
from bgtasks.events.errors import EncodeError
from bgtasks.events.info import FlushReport, PublisherStats
from bgtasks.events.publisher import Publisher

if TYPE_CHECKING:
    from bgtasks.manager import BackgroundTaskManager

__all__ = ["Fanout"]


class Fanout(BasePublisher):
    """Passes every event to several publishers. Each has its own queue, so none waits for another.

    It has no queue and no counters of its own; each publisher counts its events.

    Args:
        publishers: at least one publisher; closed with the fanout.
        manager: the manager that shows their flushers and closes them in its ``shutdown``.

    Raises:
        InvalidOptionError: there is no publisher, an item is no ``Publisher``, or a sink takes unencoded events.
        MissingExtraError: msgspec is not installed.

    Example:
        >>> async def main():
        ...     async with Fanout([Publisher(JsonlSink("events.jsonl")), Publisher(ConsoleSink())]) as fanout:
        ...         fanout.emit({"event": "started"})
        >>> asyncio.run(main())
        {"event":"started"}

    """

    def __init__(self, publishers: Sequence[Publisher], *, manager: BackgroundTaskManager | None = None) -> None:
        self.publishers: tuple[Publisher, ...] = tuple(publishers)
        for publisher in self.publishers:
            if not isinstance(publisher, Publisher) or not publisher.sink.takes_bytes:
                raise InvalidOptionError(f"a Fanout needs publishers whose sinks take bytes; got {describe(publisher)}")
        if not self.publishers:
            raise InvalidOptionError("a Fanout needs at least one publisher")
        self._encoder = JsonEncoder()
        self._manager: BackgroundTaskManager | None = None
        if manager is not None:
            self.attach(manager)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {', '.join(map(repr, self.publishers))}>"

    def emit(self, event: object) -> bool:
        """Queue an event for every publisher, from any thread; never wait, and never raise because of load.

        Each publisher encodes the event later: do not change it after this call.

        Returns:
            Whether every publisher accepted it.

        """
        # Not all(): if one publisher refuses the event, the others still get it.
        return not [publisher for publisher in self.publishers if not publisher.emit(event)]

    def emit_encoded(self, event: object) -> bool:
        """Encode an event now, once, and queue it as ``emit`` does: for an event that is changed afterwards."""
        try:
            event = self._encoder.encode(event)
        except EncodeError:
            # Each publisher counts it as refused.
            return not [publisher for publisher in self.publishers if not publisher.emit_encoded(event)]
        return self.emit(event)

    async def publish(self, event: object, *, durable: bool = False) -> bool:
        """Queue an event for every publisher; wait for the capacity of those with ``overflow="block"``.

        Args:
            event: as for ``emit``.
            durable: wait until every publisher has the event in its spool or its sink; see ``Publisher.publish``.

        Returns:
            Whether every publisher accepted it; with ``durable``, whether each has it in its spool or its sink.

        Raises:
            InvalidOptionError: ``durable`` is true, and a publisher has no spool and a sink that keeps no events.

        """
        for publisher in self.publishers:
            if durable and not publisher.is_durable:
                raise InvalidOptionError(
                    f"publish(durable=True) needs a spool in every publisher whose sink keeps no events; {publisher!r} "
                    "has none: make it with spool=PATH, or leave out durable"
                )
        return all(await self._all([publisher.publish(event, durable=durable) for publisher in self.publishers]))

    async def start(self) -> Self:
        """Start every publisher on the running loop, before the first event.

        Raises:
            Exception: for a publisher with ``connect``, an error of its sink's ``open``.

        """
        await self._all([publisher.start() for publisher in self.publishers])
        return self

    async def flush(self, timeout: float = 5.0) -> FlushReport:
        """Flush all publishers at the same time, within ``timeout`` seconds; return one report for all."""
        return await self._report([publisher.flush(timeout) for publisher in self.publishers])

    async def close(self, timeout: float = 5.0) -> FlushReport:
        """Close all publishers at the same time, within ``timeout`` seconds; return one report for all."""
        report = await self._report([publisher.close(timeout) for publisher in self.publishers])
        if self._manager is not None:
            self._manager.detach(self)
        return report

    async def _report(self, steps: Sequence[Coroutine[Any, Any, FlushReport]]) -> FlushReport:
        """Run one coroutine per publisher, and add up their reports."""
        begun = time.monotonic()
        # Not the sum of what the reports say: a publisher may deliver before its own coroutine begins.
        delivered, dropped = self._totals()
        reports = await self._all(steps)
        now_delivered, now_dropped = self._totals()
        errors = [report["last_error"] for report in reports if report["last_error"] is not None]
        return {
            "status": "timeout" if any(report["status"] == "timeout" for report in reports) else "flushed",
            "delivered": now_delivered - delivered,
            "dropped": now_dropped - dropped,
            "queued": sum(report["queued"] for report in reports),
            "spooled": sum(report["spooled"] for report in reports),
            "duration_seconds": time.monotonic() - begun,
            "last_error": errors[0] if errors else None,
        }

    def _totals(self) -> tuple[int, int]:
        """Return how many events were delivered, and how many dropped, by all publishers."""
        stats = self.stats()
        return sum(each["delivered"] for each in stats), sum(sum(each["dropped"].values()) for each in stats)

    async def _all(self, steps: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        """Run one coroutine per publisher, each to its end; then raise the first error."""
        outcomes = await asyncio.gather(*steps, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return outcomes

    @property
    def manager(self) -> BackgroundTaskManager | None:
        """The manager that it is attached to, None if there is none."""
        return self._manager

    def attached(self, manager: BackgroundTaskManager, /) -> None:
        """Note a manager that flushes and closes the publishers; called by ``manager.attach``."""
        if self._manager is None:
            self._manager = manager
        for publisher in self.publishers:
            publisher.attached(manager)

    def stats(self) -> list[PublisherStats]:
        """Return counters and health of each publisher. Safe from any thread."""
        return [publisher.stats() for publisher in self.publishers]
