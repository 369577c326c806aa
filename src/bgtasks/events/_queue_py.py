"""The bounded queue between ``emit`` and the flusher, with its counters. No logging, no policy, no event loop.

It has the names, signatures and behaviour of ``_queue.pyx``, and is used where that is not built. Here a lock guards
every change; the compiled queue changes its state only where no other Python code can run.
"""

from __future__ import annotations

from asyncio.events import _get_running_loop
from collections import deque
from collections.abc import Callable
from itertools import cycle, islice
from operator import itemgetter
from random import Random
from typing import Any, Final, TypedDict, final

from bgtasks._locks import Lock
from bgtasks.events._guard import at_work

__all__ = ["EventQueue", "QueueStats"]

NEVER: Final = 1 << 62
# The assumed length of an unencoded event, in bytes, until the first batch is encoded.
FIRST_MEAN: Final = 256
# The queue looks at the memory of its newest events when it has grown to this number, and then each time when it has
# grown by one event for every 2 MiB of ``max_bytes``, within these bounds. A queue with the longest stretch takes twice
# as many while it is not half full: that many events of 1 MiB still fit into twice ``max_bytes``.
FIRST_LOOK: Final = 8
LEAST_STRETCH: Final = 4
LONGEST_STRETCH: Final = 32
# A weight is kept in these parts of a byte: as a number of bytes, each look would round it down.
UNITS: Final = 1024
# A mean weight that only large events reach: then the queue looks at all events until it is empty.
LARGE_MEAN: Final = 2048
# Before, it looks at one in this many of its newest events, at random: not always at each tenth event, or never.
SAMPLED: Final = 16
SAMPLES: Final = 97

_random = Random(1)
# By the number of the newest events.
_samples = {
    step: cycle([itemgetter(*_random.sample(range(-step, 0), step // SAMPLED)) for _ in range(SAMPLES)])
    for step in (LONGEST_STRETCH, 2 * LONGEST_STRETCH)
}
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
        "_encoded",
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
        "_on_due",
        "_on_loss",
        "_popped",
        "_quiet_bytes",
        "_quiet_events",
        "_recovered",
        "_refused",
        "_spooled",
        "_step",
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
        self._first_look = max(self._longest_step(), FIRST_LOOK)
        self._closed = False
        self.reset()

    def reset(self) -> None:
        """Forget all events and counters; also called in the child of a fork."""
        # New: another thread of the parent may have held the old one. Reentrant: the garbage collector may run code
        # that emits in the middle of a change.
        self._lock = Lock()
        self._events: deque[Any] = deque()
        # The number and the bytes of the queued events that are encoded.
        self._encoded = self._bytes = 0
        # The mean length of encoded events; three quarters of the mean memory, in units; what an unencoded event
        # counts: the maximum in bytes.
        self._mean = self._charge = FIRST_MEAN
        self._weight = 0
        # The number of events at which to look at the newest, and how many more those are than at the last look.
        self._look_events = self._first_look
        self._step = self._longest_step()
        self._looks_at_all = False
        # Events that ever left the queue; with the queued and the recovered ones, these are the accepted events.
        self._popped = 0
        self._recovered = self._delivered = self._spooled = self._in_flight = 0
        self._dropped: dict[str, int] = {}
        self._refused: dict[str, int] = {}
        self._waits_for_loop = False
        self._due_events = 1
        self._due_bytes = NEVER
        # Up to this number of events, and of bytes of the encoded ones, an event passes no threshold of any kind.
        self._quiet_events = self._quiet_bytes = 0
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
        with self._lock:
            events = self._events
            if type(event) is not bytes:
                size = -1
                # The usual event: whatever is counted follows from the number of events, and nothing is due.
                if (
                    len(events) < self._quiet_events
                    and _at_work() is not self
                    and (not self._waits_for_loop or _get_running_loop() is None)
                ):
                    events.append(event)
                    return True
            else:
                size = len(event)
                queued = self._bytes + size
                if (
                    len(events) < self._quiet_events
                    and queued <= self._quiet_bytes
                    and size <= self._max_event_bytes
                    and _at_work() is not self
                    and (not self._waits_for_loop or _get_running_loop() is None)
                ):
                    # What can fail comes first: a number is an object that has to be made.
                    encoded = self._encoded + 1
                    events.append(event)
                    self._encoded = encoded
                    self._bytes = queued
                    return True
        return self._emit_at_threshold(event, size)

    def _emit_at_threshold(self, event: object, size: int) -> bool:
        dropped: list[Any] = []
        with self._lock:
            charge = self._charge if size < 0 else size
            refusal = self._refusal(charge, size)
            if refusal is None:
                dropped = self._make_room(charge)
                # What can fail comes first, here as well.
                encoded, queued = self._encoded + (size >= 0), self._bytes + max(size, 0)
                self._events.append(event)
                self._encoded = encoded
                self._bytes = queued
        if refusal is not None:
            return self.refuse(refusal)
        self._pass_threshold()
        if dropped:
            self._report_loss()
        return True

    def _pass_threshold(self) -> None:
        # Without the lock, as are all callbacks: one may log, a log handler takes a lock, and code that holds that lock
        # may emit.
        if len(self._events) >= self._look_events:
            self._look()
        if self._waits_for_loop and _get_running_loop() is not None:
            self._call_due()
            return
        with self._lock:
            count, total = len(self._events), self._total()
            is_due = count >= self._due_events or total >= self._due_bytes
            if is_due:
                self._due_events = self._due_bytes = NEVER
            else:
                quiet = min(self._max_events, self._due_events - 1, self._look_events - 1)
                left = min(self._max_bytes, self._due_bytes - 1) - total - (quiet - count) * self._charge
                if left < 0:
                    quiet += left // self._charge
                quiet_bytes = self._bytes + max(left, 0)
                self._quiet_events = quiet
                self._quiet_bytes = quiet_bytes
        if is_due:
            self._call_due()

    def _disturb(self) -> None:
        """Compare the next event with all thresholds again: one of them, or what is compared with it, has changed."""
        self._quiet_events = 0

    def _call_due(self) -> None:
        try:
            self._on_due()
        except BaseException:
            with self._lock:
                self._waits_for_loop = False
                self._due_events = len(self._events) + 1
                self._disturb()
            raise

    def _longest_step(self) -> int:
        return 2 * self._stretch if self._stretch == LONGEST_STRETCH else self._stretch

    def _look(self) -> None:
        try:
            with self._lock:
                count = len(self._events)
                # After the first look, the events before were looked at already.
                step = self._step if count > self._first_look else count
                following = self._longest_step() if 2 * self._total() <= self._max_bytes else self._stretch
                look = count + following
                self._step = following
                self._look_events = look
                is_all = self._looks_at_all or step not in _samples
                newest = self._newest(step, is_all)
            weight = self._weigh(newest)
            if weight > LARGE_MEAN * UNITS and not is_all:
                with self._lock:
                    self._looks_at_all = is_all = True
                    newest = self._newest(step, True)
                weight = self._weigh(newest)
            if weight:
                with self._lock:
                    self._note_weight(weight, len(newest) if is_all else step)
        except Exception:
            # The events are queued already: emit must not raise.
            return

    def _newest(self, step: int, is_all: bool) -> list[Any]:
        """Return the newest events that are not encoded, or a sixteenth of them at random."""
        events = islice(reversed(self._events), step) if is_all else next(_samples[step])(self._events)
        return [event for event in events if type(event) is not bytes]

    def _weigh(self, newest: list[Any]) -> int:
        return self._measure(newest) * 3 * UNITS // (4 * len(newest)) if newest else 0

    def _note_weight(self, weight: int, count: int) -> None:
        others = len(self._events) - self._encoded
        if others > count:
            weight = self._weight + (weight - self._weight) * count // others
        self._set_charge(max(self._mean, weight // UNITS))
        self._weight = weight

    def _set_charge(self, charge: int) -> None:
        self._charge = charge
        self._disturb()

    def _total(self) -> int:
        return self._bytes + (len(self._events) - self._encoded) * self._charge

    def _refusal(self, charge: int, size: int) -> str | None:
        if self._closed:
            return "closed"
        if size > self._max_event_bytes:
            return "too_large"
        if _at_work() is self:
            return "feedback"
        if len(self._events) < self._max_events and self._total() + charge <= self._max_bytes:
            return None
        if self._drop_oldest and charge <= self._max_bytes:
            return None
        return "full"

    def has_capacity(self) -> bool:
        """Return whether an event of mean length would be accepted, or refused for another reason than load."""
        with self._lock:
            return self._closed or (
                len(self._events) < self._max_events and self._total() + self._charge <= self._max_bytes
            )

    def is_over(self, share: float) -> bool:
        """Return whether more than a share of either capacity is in use; False if the queue is closed."""
        with self._lock:
            return not self._closed and (
                len(self._events) > share * self._max_events or self._total() > share * self._max_bytes
            )

    def refuse(self, reason: str) -> bool:
        """Count a refused event, and return False."""
        with self._lock:
            self._refused[reason] = self._refused.get(reason, 0) + 1
        self._report_loss()
        return False

    def _make_room(self, charge: int) -> list[Any]:
        queued, left = self._total(), len(self._events)
        dropped: list[Any] = []
        for event in self._events:
            if left < self._max_events and queued + charge <= self._max_bytes:
                break
            dropped.append(event)
            left -= 1
            queued -= len(event) if type(event) is bytes else self._charge
        if dropped:
            count = self._dropped.get("full", 0) + len(dropped)
            # A queue that is always full has to look, too.
            look = self._look_events - len(dropped)
            self._remove(dropped)
            self._dropped["full"] = count
            self._look_events = look
        return dropped

    def _remove(self, oldest: list[Any]) -> None:
        """Remove these events, which are the oldest, once all numbers are made: from then on nothing can fail."""
        sizes = [len(event) for event in oldest if type(event) is bytes]
        encoded, queued = self._encoded - len(sizes), self._bytes - sum(sizes)
        popped = self._popped + len(oldest)
        for _ in oldest:
            self._events.popleft()
        self._encoded, self._bytes, self._popped = encoded, queued, popped
        self._disturb()

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
            self._disturb()

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
            self._disturb()
            if len(self._events) >= events or (queued_bytes and self._total() >= queued_bytes):
                self._due_events = self._due_bytes = NEVER
                return True
            self._due_events = events
            self._due_bytes = queued_bytes or NEVER
            return False

    def arm_loop(self) -> None:
        """Have ``on_due`` called at every event that is emitted where an event loop runs, until ``arm`` is called."""
        with self._lock:
            self._waits_for_loop = True
            self._due_events = self._due_bytes = NEVER

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
            look = min(self._look_events, max(count + self._step, self._first_look))
            self._remove(batch)
            self._in_flight = in_flight
            self._look_events = look
            if len(self._events) == self._encoded:
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
                "queue_bytes": self._total(),
                "in_flight": self._in_flight,
                "dropped": dict(self._dropped),
                "refused": dict(self._refused),
            }
