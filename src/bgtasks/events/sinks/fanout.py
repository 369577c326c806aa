"""A publisher into several others, each with a queue of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Literal, Self

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

    # It only hands over: what takes time are the children.
    max_inflight = 1

    def __init__(self, children: Sequence[BasePublisher], **options: Any) -> None:
        for child in children:
            if not isinstance(child, BasePublisher) or isinstance(child, WorkerPublisher):
                raise InvalidOptionError(f"a child must be a BasePublisher that takes bytes; got {describe(child)}")
        super().__init__(**{"linger": 0.0, **options})
        self.children = tuple(children)
        self._before_close: tuple[int, int] | None = None

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
        before = self._totals()
        report = await super().flush(deadline)
        return self._merged(report, before, await self._all("flush", end))

    async def close(self, deadline: float = 5.0) -> FlushReport:
        """Close this publisher, then its children, as ``flush`` flushes them."""
        if self._before_close is None:
            self._before_close = self._totals()
        return await super().close(deadline)

    async def _close(self, deadline: float, before: Books) -> FlushReport:
        end = time.monotonic() + deadline
        # Not into its children's time: what is handed over late is lost late.
        report = await super()._close(deadline / 2, before)
        assert self._before_close is not None, "close() comes first"
        return self._merged(report, self._before_close, await self._all("close", end))

    async def _all(self, step: Literal["flush", "close"], end: float) -> list[FlushReport]:
        left = max(end - time.monotonic(), 0.0)
        steps = [child.flush(left) if step == "flush" else child.close(left) for child in self.children]
        return await asyncio.gather(*steps)

    def _totals(self) -> tuple[int, int]:
        stats = self.child_stats()
        return sum(child["delivered"] for child in stats), sum(sum(child["dropped"].values()) for child in stats)

    def _merged(self, own: FlushReport, before: tuple[int, int], reports: Sequence[FlushReport]) -> FlushReport:
        late = own["status"] == "deadline" or any(report["status"] == "deadline" for report in reports)
        delivered, dropped = self._totals()
        return {
            "status": "deadline" if late else "flushed",
            "delivered": delivered - before[0],
            "dropped": own["dropped"] + dropped - before[1],
            "queued": own["queued"] + sum(report["queued"] for report in reports),
            "spooled": own["spooled"] + sum(report["spooled"] for report in reports),
            "duration_seconds": own["duration_seconds"] + max((one["duration_seconds"] for one in reports), default=0),
            "last_error": next((report["last_error"] for report in (own, *reports) if report["last_error"]), None),
        }

    def child_stats(self) -> list[PublisherStats]:
        """Return the statistics of each child."""
        return [child.stats() for child in self.children]
