"""The bounded queue between ``emit`` and the flusher, with its counters. No logging, no policy, no event loop.

It has the names, signatures and behaviour of ``_queue.pyx``, and is used where that is not built. Here a lock guards
every change; the compiled queue changes its state only where no other Python code can run.
"""

from __future__ import annotations

import threading
from asyncio.events import _get_running_loop
from collections import deque
from collections.abc import Callable
from itertools import cycle, islice
from operator import itemgetter
from random import Random
from typing import Any, Final, TypedDict, final

from bgtasks.events._guard import at_work

__all__ = ["EventQueue", "QueueStats"]

NEVER: Final = 1 << 62
# The assumed length of an unencoded event, in bytes, until the first batch is encoded.
FIRST_MEAN: Final = 256
# The queue looks at the memory of its newest events when it has grown to this number, and then each time when it has
# grown by one event for every 2 MiB of ``max_bytes``, within these bounds.
FIRST_LOOK: Final = 8
LEAST_STRETCH: Final = 4
LONGEST_STRETCH: Final = 32
# A weight is kept in these parts of a byte: as a number of bytes, each look would round it down.
UNITS: Final = 1024
# A mean weight that only large events reach: then the queue looks at all events until it is empty.
LARGE_MEAN: Final = 2048
# Before, it looks at so few of its newest events, at random: not always at each tenth event, or never.
SAMPLE: Final = 2
SAMPLES: Final = 97

_random = Random(1)
_samples = cycle([itemgetter(*_random.sample(range(-LONGEST_STRETCH, 0), SAMPLE)) for _ in range(SAMPLES)])
_at_work = at_work.get


class QueueStats(TypedDict):
    """The counters of a queue at one moment; ``accepted == delivered + sum(dropped) + queue_events + spooled``.

    ``queue_events`` includes events in flight; ``refused`` events were never accepted.
    """

    accepted: int
    recovered: int
    delivered: int
    spooled: int
    queue_events: int
    queue_bytes: int
    in_flight: int
    dropped: dict[str, int]
    refused: dict[str, int]


@final
class EventQueue:
    """A bounded first-in, first-out queue of events, with counters; any thread may fill it.

    Args:
        max_events: the maximum number of queued events.
        max_bytes: the maximum number of queued bytes. A ``bytes`` event counts with its length, any other with the
            mean length of the events encoded so far or three quarters of the mean ``measure``, whichever is more.
        max_event_bytes: a ``bytes`` event longer than this is refused.
        drop_oldest: when the queue is full, drop the oldest events instead of refusing the new one.
        on_due: called without arguments, by the emitting thread, when the number given to ``arm`` is reached; once
            per ``arm``. If it raises, it is called again at the next event.
        on_loss: called without arguments when events were refused or dropped; once per ``arm_loss``. If it raises, it
            is called again at the next loss.
        measure: returns about how many bytes of memory a list of unencoded events takes; called for the events that
            make the queue grow, many at a time.

    """

    __slots__ = (
        "_bytes",
        "_charge",
        "_closed",
        "_delivered",
        "_drop_oldest",
        "_dropped",
        "_due_bytes",
        "_due_events",
        "_events",
        "_first_look",
        "_in_flight",
        "_lock",
        "_look_events",
        "_looks_at_all",
        "_loss_armed",
        "_max_bytes",
        "_max_event_bytes",
        "_max_events",
        "_mean",
        "_measure",
        "_next_events",
        "_on_due",
        "_on_loss",
        "_others",
        "_popped",
        "_recovered",
        "_refused",
        "_spooled",
        "_stretch",
        "_waits_for_loop",
        "_weight",
    )

    def __init__(
        self,
        max_events: int,
        max_bytes: int,
        max_event_bytes: int,
        drop_oldest: bool,
        on_due: Callable[[], object],
        on_loss: Callable[[], object],
        measure: Callable[[list[Any]], int],
    ) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._max_event_bytes = max_event_bytes
        self._drop_oldest = drop_oldest
        self._on_due = on_due
        self._on_loss = on_loss
        self._measure = measure
        self._stretch = min(max(max_bytes >> 21, LEAST_STRETCH), LONGEST_STRETCH)
        self._first_look = max(self._stretch, FIRST_LOOK)
        self._closed = False
        self.reset()

    def reset(self) -> None:
        """Forget all events and counters; also called in the child of a fork."""
        # New: another thread of the parent may have held the old one. Reentrant: the garbage collector may run code
        # that emits in the middle of a change.
        self._lock = threading.RLock()
        self._events: deque[Any] = deque()
        # Queued bytes, and the number of queued events that are not encoded yet.
        self._bytes = self._others = 0
        # The mean length of encoded events; three quarters of the mean memory, in units; what an unencoded event
        # counts: the maximum in bytes.
        self._mean = self._charge = FIRST_MEAN
        self._weight = 0
        # The number of events at which to look at the newest.
        self._look_events = self._first_look
        self._looks_at_all = False
        # Events that ever left the queue; with the queued and the recovered ones, these are the accepted events.
        self._popped = 0
        self._recovered = self._delivered = self._spooled = self._in_flight = 0
        self._dropped: dict[str, int] = {}
        self._refused: dict[str, int] = {}
        self._waits_for_loop = False
        # The next number is the minimum of those at which to look and to call ``on_due``.
        self._due_events = self._next_events = 1
        self._due_bytes = NEVER
        self._loss_armed = True

    def __len__(self) -> int:
        return len(self._events)

    # -- filling --------------------------------------------------------------------------------------------------

    def emit(self, event: object) -> bool:
        """Queue an event for the flusher, from any thread; never wait, and never raise because of load.

        The event is encoded later: do not change it after this call.

        Returns:
            Whether the event was accepted. Refused events are counted by reason.

        """
        if type(event) is bytes:
            size = len(event)
            is_other = 0
        else:
            size = -1
            is_other = 1
        with self._lock:
            events = self._events
            count = len(events)
            total = self._bytes + (self._charge if is_other else size)
            # A closed queue has no capacity.
            if (
                count < self._max_events
                and total <= self._max_bytes
                and size <= self._max_event_bytes
                and _at_work() is not self
            ):
                # What can fail comes first: a number is an object that has to be made.
                others = self._others + is_other
                events.append(event)
                self._bytes = total
                self._others = others
                if count + 1 < self._next_events and total < self._due_bytes:
                    return True
            else:
                count = -1
        if count >= 0:
            self._pass_threshold()
            return True
        return self._emit_at_bound(event, size)

    def _pass_threshold(self) -> None:
        # Without the lock, as are all callbacks: one may log, a log handler takes a lock, and code that holds that lock
        # may emit.
        if len(self._events) >= self._look_events:
            self._look()
        if self._waits_for_loop:
            if _get_running_loop() is not None:
                self._call_due()
            return
        with self._lock:
            is_due = len(self._events) >= self._due_events or self._bytes >= self._due_bytes
            # What can fail comes first, here as well.
            following = self._look_events if is_due else min(self._due_events, self._look_events)
            if is_due:
                self._due_events = self._due_bytes = NEVER
            self._next_events = following
        if is_due:
            self._call_due()

    def _call_due(self) -> None:
        try:
            self._on_due()
        except BaseException:
            with self._lock:
                self._waits_for_loop = False
                self._due_events = self._next_events = len(self._events) + 1
            raise

    def _look(self) -> None:
        with self._lock:
            looked, count = self._look_events, len(self._events)
            # After the first look, the events before were looked at already.
            step = self._stretch if count > self._first_look else count
            is_all = self._looks_at_all or step < LONGEST_STRETCH
            newest = self._newest(step, is_all)
            self._look_events = count + self._stretch
        try:
            weight = self._weigh(newest)
            if weight > LARGE_MEAN * UNITS and not is_all:
                with self._lock:
                    self._looks_at_all = is_all = True
                    newest = self._newest(step, True)
                weight = self._weigh(newest)
            if weight:
                with self._lock:
                    self._note_weight(weight, len(newest) if is_all else step)
        except BaseException:
            self._look_events = looked
            raise

    def _newest(self, step: int, is_all: bool) -> list[Any]:
        """Return the newest events that are not encoded, or some of them at random."""
        events = islice(reversed(self._events), step) if is_all else next(_samples)(self._events)
        return [event for event in events if type(event) is not bytes]

    def _weigh(self, newest: list[Any]) -> int:
        try:
            return self._measure(newest) * 3 * UNITS // (4 * len(newest)) if newest else 0
        except Exception:
            # The events are queued already: emit must not raise.
            return 0

    def _note_weight(self, weight: int, count: int) -> None:
        if self._others > count:
            weight = self._weight + (weight - self._weight) * count // self._others
        self._set_charge(max(self._mean, weight // UNITS))
        self._weight = weight

    def _set_charge(self, charge: int) -> None:
        queued = self._bytes + self._others * (charge - self._charge)
        self._charge = charge
        self._bytes = queued

    def _emit_at_bound(self, event: object, size: int) -> bool:
        dropped: list[Any] = []
        is_reached = False
        with self._lock:
            charge = self._charge if size < 0 else size
            refusal = self._refusal(charge, size)
            if refusal is None:
                dropped = self._make_room(charge)
                total, others = self._bytes + charge, self._others + (size < 0)
                self._events.append(event)
                self._bytes = total
                self._others = others
                is_reached = len(self._events) >= self._next_events or self._bytes >= self._due_bytes
        if refusal is not None:
            return self.refuse(refusal)
        if is_reached:
            self._pass_threshold()
        if dropped:
            self._report_loss()
        return True

    def _refusal(self, charge: int, size: int) -> str | None:
        if self._closed:
            return "closed"
        if size > self._max_event_bytes:
            return "too_large"
        if _at_work() is self:
            return "feedback"
        if self._drop_oldest and charge <= self._max_bytes:
            return None
        return "full"

    def has_capacity(self) -> bool:
        """Return whether an event of mean length would be accepted, or refused for another reason than load."""
        with self._lock:
            return self._closed or (
                len(self._events) < self._max_events and self._bytes + self._charge <= self._max_bytes
            )

    def is_over(self, share: float) -> bool:
        """Return whether more than a share of either capacity is in use; False if the queue is closed."""
        with self._lock:
            return not self._closed and (
                len(self._events) > share * self._max_events or self._bytes > share * self._max_bytes
            )

    def refuse(self, reason: str) -> bool:
        """Count a refused event, and return False."""
        with self._lock:
            self._refused[reason] = self._refused.get(reason, 0) + 1
        self._report_loss()
        return False

    def _make_room(self, charge: int) -> list[Any]:
        events, queued, left = self._events, self._bytes, len(self._events)
        dropped: list[Any] = []
        for event in events:
            if left < self._max_events and queued + charge <= self._max_bytes:
                break
            dropped.append(event)
            left -= 1
            queued -= len(event) if type(event) is bytes else self._charge
        if dropped:
            count = self._dropped.get("full", 0) + len(dropped)
            # A queue that is always full has to look, too.
            look = self._look_events - len(dropped)
            following = min(self._due_events, look)
            self._remove(dropped)
            self._dropped["full"] = count
            self._look_events = look
            self._next_events = following
        return dropped

    def _remove(self, oldest: list[Any]) -> None:
        """Remove these events, which are the oldest, once all numbers are made: from then on nothing can fail."""
        others = sum(type(event) is not bytes for event in oldest)
        queued = self._bytes - others * self._charge - sum(len(event) for event in oldest if type(event) is bytes)
        others = self._others - others
        popped = self._popped + len(oldest)
        for _ in oldest:
            self._events.popleft()
        self._bytes, self._others, self._popped = queued, others, popped

    def _report_loss(self) -> None:
        with self._lock:
            is_armed, self._loss_armed = self._loss_armed, False
        if is_armed:
            try:
                self._on_loss()
            except BaseException:
                self._loss_armed = True
                raise

    def close(self) -> None:
        """Refuse every event from now on."""
        with self._lock:
            self._closed = True
            self._max_events = 0

    # -- emptying, by the flusher ---------------------------------------------------------------------------------

    def arm(self, events: int, queued_bytes: int) -> bool:
        """Have ``on_due`` called once, when this number of events or bytes is queued.

        Args:
            events: number of events.
            queued_bytes: number of bytes; 0 to wait for events alone.

        Returns:
            True if that number is queued already; then nothing is armed.

        """
        with self._lock:
            self._waits_for_loop = False
            if len(self._events) >= events or (queued_bytes and self._bytes >= queued_bytes):
                self._due_events = self._due_bytes = NEVER
                self._next_events = self._look_events
                return True
            self._due_events = events
            self._due_bytes = queued_bytes or NEVER
            self._next_events = min(self._due_events, self._look_events)
            return False

    def arm_loop(self) -> None:
        """Have ``on_due`` called at every event that is emitted where an event loop runs, until ``arm`` is called."""
        with self._lock:
            self._waits_for_loop = True
            self._due_events = self._next_events = 0
            self._due_bytes = NEVER

    def arm_loss(self) -> None:
        """Have ``on_loss`` called once, when the next event is refused or dropped."""
        self._loss_armed = True

    def pop_batch(self, events: int, batch_bytes: int) -> list[Any]:
        """Remove and return the oldest events, up to this number of events and bytes, but at least one if there is any.

        They are in flight until ``account`` counts their outcome.
        """
        batch: list[Any] = []
        left = batch_bytes
        with self._lock:
            # The batch is whole before the first event leaves the queue.
            for event in islice(self._events, events):
                left -= len(event) if type(event) is bytes else self._charge
                if batch and left < 0:
                    break
                batch.append(event)
            in_flight = self._in_flight + len(batch)
            count = len(self._events) - len(batch)
            look = min(self._look_events, max(count + self._stretch, self._first_look))
            following = min(self._due_events, look)
            self._remove(batch)
            self._in_flight = in_flight
            self._look_events = look
            self._next_events = following
            if not self._others:
                self._looks_at_all = False
                self._weight = 0
                self._charge = self._mean
        return batch

    def add_mean(self, mean: int) -> None:
        """Update the mean length of events by that of the batch just encoded, in bytes."""
        with self._lock:
            mean = max((3 * self._mean + mean) // 4, 1)
            self._set_charge(max(mean, self._weight // UNITS))
            self._mean = mean

    def account(self, count: int, outcome: str) -> None:
        """Count the outcome of events in flight: ``"delivered"``, ``"spooled"`` or the reason of a drop."""
        with self._lock:
            in_flight = self._in_flight - count
            is_loss = self._add(count, outcome)
            self._in_flight = in_flight
        if is_loss:
            self._report_loss()

    def account_spooled(self, count: int, outcome: str) -> None:
        """Count the outcome of spooled events: ``"delivered"`` or the reason of a drop."""
        with self._lock:
            spooled = self._spooled - count
            is_loss = self._add(count, outcome)
            self._spooled = spooled
        if is_loss:
            self._report_loss()

    def recover(self, count: int) -> None:
        """Count events that an earlier process left in the spool as accepted and spooled."""
        with self._lock:
            recovered, spooled = self._recovered + count, self._spooled + count
            self._recovered = recovered
            self._spooled = spooled

    def _add(self, count: int, outcome: str) -> bool:
        if outcome == "delivered":
            self._delivered += count
        elif outcome == "spooled":
            self._spooled += count
        else:
            self._dropped[outcome] = self._dropped.get(outcome, 0) + count
            return True
        return False

    # -- counters -------------------------------------------------------------------------------------------------

    @property
    def accepted(self) -> int:
        """The number of accepted events."""
        with self._lock:
            return self._recovered + self._popped + len(self._events)

    @property
    def finished(self) -> int:
        """The number of accepted events that were delivered or dropped."""
        with self._lock:
            return self._recovered + self._popped - self._in_flight - self._spooled

    def counters(self) -> QueueStats:
        """Return a consistent snapshot of the counters. Safe from any thread."""
        with self._lock:
            return {
                "accepted": self._recovered + self._popped + len(self._events),
                "recovered": self._recovered,
                "delivered": self._delivered,
                "spooled": self._spooled,
                "queue_events": len(self._events) + self._in_flight,
                "queue_bytes": self._bytes,
                "in_flight": self._in_flight,
                "dropped": dict(self._dropped),
                "refused": dict(self._refused),
            }
