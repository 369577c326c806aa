"""A sink that calls the ``publish`` of another package's publisher, agentflow's for example, for each event."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar, Final

from bgtasks._checks import check_count
from bgtasks.errors import InvalidOptionError, describe, text_of
from bgtasks.events._base import PublishesOne
from bgtasks.events.errors import Reject
from bgtasks.events.sink import Sink

__all__ = ["PublishSink"]

WORKERS: Final = 8


class PublishSink(Sink):
    """Passes events to an object with ``async publish(event)``, a few at a time.

    The events are passed on as they were emitted, unencoded, so the queue of the ``Publisher`` is bounded by
    ``max_events`` alone. More than one worker gives up the order of events. An event whose ``publish`` raises is
    dropped with the reason ``rejected``. It is not tried again, because it may have been published in part. The
    object is not closed: it belongs to its creator.

    Args:
        publisher: the object.
        workers: the number of concurrent calls; 1 keeps the order.

    Raises:
        InvalidOptionError: ``publisher`` has no ``publish``, or ``workers`` is no positive whole number.

    Example:
        >>> publisher = Publisher(PublishSink(webhooks, workers=1))

    """

    # ``workers`` sets the concurrency; published events are remembered for one batch only.
    max_inflight: ClassVar[int | None] = 1
    takes_bytes: ClassVar[bool] = False
    is_durable: bool = False

    def __init__(self, publisher: PublishesOne, *, workers: int = WORKERS) -> None:
        if not isinstance(publisher, PublishesOne):
            raise InvalidOptionError(f"a publisher with an async publish(event) is needed; got {describe(publisher)}")
        self._workers = check_count("workers", workers, 1)
        self._publisher = publisher
        # Events of a cancelled batch that were passed on are not passed on again.
        self._batch_id = ""
        self._called: set[int] = set()
        self._failed: dict[int, str] = {}

    async def write(self, batch: Sequence[Any], batch_id: str) -> None:
        """Publish the events of a batch."""
        if batch_id != self._batch_id:
            self._batch_id = batch_id
            self._called.clear()
            self._failed.clear()
        events = iter([(index, event) for index, event in enumerate(batch) if index not in self._called])

        async def work() -> None:
            for index, event in events:
                self._called.add(index)
                try:
                    await self._publisher.publish(event)
                except Exception as error:
                    self._failed[index] = text_of(error)

        await asyncio.gather(*(work() for _ in range(min(self._workers, len(batch)))))
        if self._failed:
            raise Reject(sorted(self._failed), next(iter(self._failed.values())))
