"""The main job's work: for every event of a source a background task and a publication, and the same as bare tasks."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Final, Protocol

from peer import Peer
from sinks import Announcement, checksum_of
from source_lines import Event

from bgtasks import BackgroundTaskManager
from bgtasks.errors import ManagerClosedError
from bgtasks.events import Publisher

__all__ = ["Job", "Source"]

# How many tasks are started, or events published, before the loop runs other callbacks: a millisecond or two.
AT_ONCE: Final = 1_000
# Seconds; more than a burst of tasks needs on a busy machine.
TIMEOUT: Final = 1.0


class Source(Protocol):
    """Where events come from; its text says what they are."""

    def read(self) -> AsyncGenerator[list[Event], None]:
        """Yield the events, some at a time."""


class Job:
    """Has each event of a source, numbered from 1, go through tasks and through a publisher, until one of them is lost.

    Half of the tasks are started by ``create_task``, half by ``fire``. All of them run a second time as bare tasks of
    asyncio, in turn with the others, so that a slow moment of the machine slows down both.
    """

    def __init__(self, manager: BackgroundTaskManager, publisher: Publisher, limit: int) -> None:
        self._manager = manager
        self._publisher = publisher
        self._limit = limit
        self.peer = Peer()
        self.bare_peer = Peer()
        self.kinds: set[str] = set()
        self.published = 0
        self.checksum = 0
        # How many went each way, and in how many seconds.
        self.counts: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._turns = itertools.cycle(itertools.permutations((self._create, self._fire, self._run_bare)))

    async def run(self, source: Source) -> None:
        """Work until the source ends, the limit is reached, an event is lost or the manager shuts down.

        Raises:
            OSError: the source cannot be read any further.

        """
        async with contextlib.aclosing(source.read()) as batches:
            while (events := await self._next(batches)) is not None:
                events = events[: self._limit - self.published]
                self.kinds.update(event.kind for event in events)
                for start in range(0, len(events), AT_ONCE):
                    try:
                        await self._start_tasks(events[start : start + AT_ONCE])
                    except ManagerClosedError:
                        # A signal ends the program.
                        return
                if not await self._publish_all(events) or self.published == self._limit:
                    return

    def rate(self, *ways: str) -> float:
        """Return how many a second went these ways, together."""
        seconds = sum(self.seconds[way] for way in ways)
        return sum(self.counts[way] for way in ways) / seconds if seconds else 0.0

    def seconds_of_tasks(self) -> float:
        """Return the time that the tasks of the manager took."""
        return self.seconds["create_task"] + self.seconds["fire"]

    @contextlib.contextmanager
    def _timed(self, way: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[way] += time.perf_counter() - begun

    async def _next(self, batches: AsyncGenerator[list[Event], None]) -> list[Event] | None:
        with self._timed("source"):
            return await anext(batches, None)

    async def _start_tasks(self, events: Sequence[Event]) -> None:
        """Run a task for each event, and once more without a manager."""
        half = (len(events) + 1) // 2
        parts: dict[Callable[[Sequence[Event]], None], tuple[str, Peer, Sequence[Event]]] = {
            self._create: ("create_task", self.peer, events[:half]),
            self._fire: ("fire", self.peer, events[half:]),
            self._run_bare: ("bare", self.bare_peer, events),
        }
        for start in next(self._turns):
            way, peer, part = parts[start]
            ended = peer.ended + len(part)
            with self._timed(way):
                start(part)
                await peer.wait_until_ended(ended)
            self.counts[way] += len(part)

    def _create(self, events: Sequence[Event]) -> None:
        ask, create_task = self.peer.ask, self._manager.create_task
        first = self.counts["create_task"] + self.counts["fire"]
        for number, event in enumerate(events, first):
            create_task(ask(number, event.name), name=event.kind, timeout=TIMEOUT, context={"event": event.name})

    def _fire(self, events: Sequence[Event]) -> None:
        ask, fire = self.peer.ask, self._manager.fire
        first = self.counts["create_task"] + self.counts["fire"]
        for number, event in enumerate(events, first):
            fire(ask(number, event.name), name=event.kind, timeout=TIMEOUT, context={"event": event.name})

    def _run_bare(self, events: Sequence[Event]) -> None:
        ask, create_task = self.bare_peer.ask, asyncio.get_running_loop().create_task
        for event in events:
            create_task(ask(0, event.name))

    async def _publish_all(self, events: Sequence[Event]) -> bool:
        """Publish events and wait until they are delivered; return False if one of them was lost."""
        with self._timed("events"):
            for start in range(0, len(events), AT_ONCE):
                for event in events[start : start + AT_ONCE]:
                    number = self.published + 1
                    # It waits while the queue is full, and returns False once the publisher is closed.
                    if not await self._publisher.publish(Announcement.of(number, event)):
                        return False
                    self.published = number
                    self.checksum += checksum_of(number, event.payload.encode())
                await asyncio.sleep(0)
                if self._publisher.stats()["dropped"]:
                    return False
            await self._publisher.flush()
        self.counts["events"] = self.published
        return not self._publisher.stats()["dropped"]
