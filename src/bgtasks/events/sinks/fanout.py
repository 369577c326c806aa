"""A publisher into several others, each with a queue of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Self

from bgtasks.errors import InvalidOptionError, describe
from bgtasks.events.info import FlushReport, PublisherStats
from bgtasks.events.publisher import BasePublisher
from bgtasks.events.ring import Books
from bgtasks.events.workers import WorkerPublisher

__all__ = ["FanoutPublisher"]


class FanoutPublisher(BasePublisher):
    """Encodes each event once and hands it to every child; a child that is slow or broken holds no other up.

    An event counts as delivered here when it was handed over; what a child then refuses, drops or retries stands in the
    child's statistics. A child with ``overflow="block"`` is waited for, and with it the others.

    Args:
        children: publishers of bytes; closed with this one.
        options: the keywords of ``BasePublisher``; ``linger`` is 0 by default, the children have their own.

    Raises:
        InvalidOptionError: a child is no ``BasePublisher``, or one that needs the events themselves.

    Example:
        >>> publisher = FanoutPublisher([JsonlPublisher("events.jsonl"), ConsolePublisher()])

    """

    def __init__(self, children: Sequence[BasePublisher], **options: Any) -> None:
        for child in children:
            if not isinstance(child, BasePublisher) or isinstance(child, WorkerPublisher):
                raise InvalidOptionError(f"a child must be a BasePublisher that takes bytes; got {describe(child)}")
        super().__init__(**{"linger": 0.0, **options})
        self.children = tuple(children)

    async def start(self) -> Self:
        """Start this publisher and its children."""
        await super().start()
        for child in self.children:
            await child.start()
        return self

    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Hand a batch to every child."""
        for child in self.children:
            if child.waits_for_room:
                for event in batch:
                    await child.publish(event)
            else:
                emit = child.emit
                for event in batch:
                    emit(event)

    async def flush(self, deadline: float = 5.0) -> FlushReport:
        """Flush this publisher, then its children; the report adds up what the children delivered, dropped and hold."""
        end = time.monotonic() + deadline
        report = await super().flush(deadline)
        return _merged(report, await asyncio.gather(*(child.flush(_left(end)) for child in self.children)))

    async def _close(self, deadline: float, before: Books) -> FlushReport:
        end = time.monotonic() + deadline
        report = await super()._close(deadline / 2, before)
        return _merged(report, await asyncio.gather(*(child.close(_left(end)) for child in self.children)))

    def child_stats(self) -> list[PublisherStats]:
        """Return the statistics of each child."""
        return [child.stats() for child in self.children]


def _left(end: float) -> float:
    return max(end - time.monotonic(), 0.0)


def _merged(own: FlushReport, reports: Sequence[FlushReport]) -> FlushReport:
    late = own["status"] == "deadline" or any(report["status"] == "deadline" for report in reports)
    return {
        "status": "deadline" if late else "flushed",
        "delivered": sum(report["delivered"] for report in reports),
        "dropped": own["dropped"] + sum(report["dropped"] for report in reports),
        "queued": own["queued"] + sum(report["queued"] for report in reports),
        "spooled": own["spooled"] + sum(report["spooled"] for report in reports),
        "duration_seconds": own["duration_seconds"]
        + max((report["duration_seconds"] for report in reports), default=0),
        "last_error": next((report["last_error"] for report in (own, *reports) if report["last_error"]), None),
    }
