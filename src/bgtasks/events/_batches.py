"""Batches of events: popped from the queue, encoded, and on their way to the sink."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from bgtasks.errors import text_of
from bgtasks.events._dead_letters import DeadLetters
from bgtasks.events._durable import DurableEvent, set_outcomes
from bgtasks.events._encoding import Encoder
from bgtasks.events._event_queue import EventQueue
from bgtasks.events._health import Health
from bgtasks.events.errors import EncodeError

__all__ = ["Batch", "BatchLimits", "Batcher", "Unfit"]


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """When a batch is due: at a number of events, bytes or seconds. ``event_bytes`` is the maximum for one event."""

    events: int
    batch_bytes: int
    linger: float
    event_bytes: int


@dataclass(slots=True, eq=False)
class Batch:
    """A batch on its way. Events that are accounted for leave it: a later flusher can resume where one was cancelled.

    ``parts`` are still to be written, as (id, payloads), the next one last. ``failing_since`` is the time of the first
    failed try, on the monotonic clock. ``is_held`` is whether the sink itself set the time of the next one,
    ``has_durable`` whether the outcome of one of its events is waited for. ``attempts`` counts the failed writes of the
    next part to an open sink. None of its events was emitted before ``since``, on the loop's clock. ``position`` is the
    number of events that had left the queue before it; it is used only if batches may overtake each other.
    """

    batch_id: str
    parts: list[tuple[str, Sequence[Any]]]
    tries: int = 0
    failing_since: float | None = None
    is_held: bool = False
    has_durable: bool = False
    attempts: int = 0
    position: int = 0
    since: float = 0.0

    @classmethod
    def of(cls, batch_id: str, payloads: Sequence[Any], position: int = 0, since: float = 0.0) -> Batch:
        """Return a new batch of one part."""
        return cls(batch_id, [(batch_id, payloads)], position=position, since=since)

    def halve(self) -> None:
        """Replace the next part by its halves, always the same ones with the same ids: the sink may know them."""
        part_id, payloads = self.parts[-1]
        middle = len(payloads) // 2
        self.parts[-1:] = [(f"{part_id}.1", payloads[middle:]), (f"{part_id}.0", payloads[:middle])]
        self.attempts = 0

    def set_outcomes(self, payloads: Sequence[Any], outcome: str) -> None:
        """Note the outcome of events for the coroutines that wait for it."""
        if self.has_durable:
            set_outcomes(payloads, outcome)

    def events(self) -> int:
        """Return the number of events that are not accounted for yet."""
        return sum(len(payloads) for _, payloads in self.parts)


@dataclass(slots=True, eq=False)
class Unfit:
    """Events that cannot be encoded, or are too large, and the reason for which they are dropped."""

    events: list[Any]
    reason: str
    error: EncodeError | None


class Batcher:
    """Pops events from a queue and encodes them into batches with globally unique ids.

    Args:
        queue: the source of the events.
        encoder: turns events into payloads.
        limits: how large a batch and an event may be.
        health: records the errors of encoding.
        dead_letters: keeps events that are not encoded or too large.

    """

    def __init__(
        self, queue: EventQueue, encoder: Encoder, limits: BatchLimits, health: Health, dead_letters: DeadLetters
    ) -> None:
        self._queue = queue
        self._encoder = encoder
        self._limits = limits
        self._health = health
        self._dead_letters = dead_letters
        # Whether there may be events whose outcome is waited for.
        self.has_receipts = False
        self.renew_ids()

    def renew_ids(self) -> None:
        """Choose a new prefix for the ids; also called in the child of a fork."""
        self._publisher_id = uuid.uuid4().hex
        self._numbers: Iterator[int] = count()

    @property
    def events(self) -> int:
        """The number of events in a full batch."""
        return self._limits.events

    def pop(self) -> list[Any]:
        """Remove and return the events of one batch, oldest first; an empty list if the queue is empty."""
        return self._queue.pop_batch(self._limits.events, self._limits.batch_bytes)

    def encode(self, events: list[Any], position: int = 0, since: float = 0.0) -> tuple[list[Batch], list[Unfit]]:
        """Return events as batches, and those that fit into none; nothing is counted here.

        There may be several batches: the sizes of the events were estimates when they were popped.
        """
        has_durable = self.has_receipts and any(type(event) is DurableEvent for event in events)
        payloads, total_bytes, failed = self._encoder.encode_batch(events)
        if payloads and type(events[0]) is not bytes:
            self._queue.add_mean(total_bytes // len(payloads))
        too_large: list[Any] = []
        if total_bytes > self._limits.event_bytes:
            too_large = [payload for payload in payloads if len(payload) > self._limits.event_bytes]
            if too_large:
                payloads = [payload for payload in payloads if len(payload) <= self._limits.event_bytes]
        batches = [
            Batch.of(f"{self._publisher_id}-{next(self._numbers)}", part, position, since)
            for part in self._split(payloads, total_bytes)
        ]
        for batch in batches:
            batch.has_durable = has_durable
        unfit: list[Unfit] = []
        if failed:
            unfit.append(Unfit([event for event, _ in failed], "encode", failed[0][1]))
        if too_large:
            unfit.append(Unfit(too_large, "too_large", None))
        return batches, unfit

    def count_dropped(self, unfit: Unfit) -> None:
        """Count events that fit into no batch as dropped."""
        if unfit.error is not None:
            self._health.sink_error = text_of(unfit.error)
        self._queue.account(len(unfit.events), unfit.reason)

    def bury(self, unfit: Unfit) -> None:
        """Write events that were dropped into the dead letters."""
        self._dead_letters.add(unfit.events, self._publisher_id, unfit.reason, unfit.error)

    def _split(self, payloads: list[Any], total_bytes: int) -> list[list[Any]]:
        """Split payloads into parts within the byte limit."""
        if total_bytes <= self._limits.batch_bytes:
            return [payloads] if payloads else []
        parts: list[list[Any]] = []
        left = 0
        for payload in payloads:
            left -= len(payload)
            if left < 0 or not parts:
                parts.append([])
                left = self._limits.batch_bytes - len(payload)
            parts[-1].append(payload)
        return parts
