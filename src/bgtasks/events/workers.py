"""Publishers that know one event at a time, agentflow's for one, behind a queue and a few workers."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from typing import Any, Final, Protocol, runtime_checkable

from bgtasks.errors import InvalidOptionError, describe, text_of
from bgtasks.events.encoding import Encoded, Encoder
from bgtasks.events.errors import Reject
from bgtasks.events.publisher import BasePublisher

__all__ = ["PublishesOne", "WorkerPublisher", "worker_publisher_of"]

WORKERS: Final = 8


@runtime_checkable
class PublishesOne(Protocol):
    """A publisher whose author wrote ``publish``; agentflow's and 10xGraph's do."""

    async def publish(self, event: Any, /) -> Any:
        """Publish one event."""


class _AsTheyAre:
    """Leaves events as they are: the publisher behind wants the objects."""

    def encode(self, event: Any) -> Any:
        return event

    def encode_batch(self, events: Sequence[Any]) -> Encoded:
        return Encoded(list(events), 0, [])


class WorkerPublisher(BasePublisher):
    """Hands events to a publisher that only defines ``async publish(event)``, a few at a time.

    The queue is bounded by ``max_events`` alone: nobody knows the size of what is not encoded. More than one worker
    gives the order of events up. An event whose ``publish`` raises is dropped with the reason ``rejected``; it is not
    tried again, since nobody knows what was done of it. The publisher behind is not closed: it belongs to its maker.

    Args:
        publisher: whose ``publish`` is called.
        workers: how many calls run at once; 1 keeps the order.
        options: the keywords of ``BasePublisher``.

    Raises:
        InvalidOptionError: ``publisher`` has no ``publish``, or an argument is outside its values.

    """

    # ``workers`` is what runs at once here; what was called is known of one batch.
    max_inflight = 1

    def __init__(self, publisher: PublishesOne, *, workers: int = WORKERS, **options: Any) -> None:
        if not isinstance(publisher, PublishesOne):
            raise InvalidOptionError(f"a publisher with an async publish(event) is needed; got {describe(publisher)}")
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise InvalidOptionError(f"workers must be a whole number, 1 or more; got {describe(workers)}")
        super().__init__(**{"name": type(publisher).__name__, **options})
        self._publisher = publisher
        self._workers = workers
        # What was called in a batch that was cancelled on its way is not called again.
        self._batch_id = ""
        self._called: set[int] = set()
        self._failed: dict[int, str] = {}

    def _make_encoder(self) -> Encoder:
        return _AsTheyAre()

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


_made: weakref.WeakKeyDictionary[Any, WorkerPublisher] = weakref.WeakKeyDictionary()


def worker_publisher_of(publisher: PublishesOne) -> WorkerPublisher:
    """Return the one ``WorkerPublisher`` of a publisher, made at the first call."""
    found = _made.get(publisher)
    if found is None:
        found = _made[publisher] = WorkerPublisher(publisher)
    return found
