"""The bounded queue between ``emit`` and the flusher, and its books. No logging, no policy, no event loop.

The Python twin of ``_ring.pyx``: the same names, signatures and behaviour where no compiler was at hand. A lock guards
every change here; the compiled one changes its state only where no other Python code can run.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypedDict, final

from bgtasks.events._guard import at_work

NEVER: Final = 1 << 62
# What an event that is not encoded yet counts as before the first batch was measured, in bytes.
FIRST_MEAN: Final = 256

_at_work = at_work.get


class Books(TypedDict):
    """The books of a ring at one moment; ``accepted == delivered + sum(dropped) + queue_events + spooled``.

    ``queue_events`` counts those taken out and not settled yet, ``refused`` what was never accepted.
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
class Ring:
    """A bounded first-in, first-out queue of events that any thread may fill, with its books.

    Args:
        max_events: how many events it holds at most.
        max_bytes: how many bytes it holds at most. An event that is ``bytes`` counts with its length, any other with
            the mean length of those encoded so far.
        max_event_bytes: an event of ``bytes`` longer than this is refused alone.
        drop_oldest: at a bound, give up the oldest events instead of refusing the new one.
        wake: called without arguments, by whichever thread emits, when what ``arm`` waits for has come. Once for each
            ``arm``.
        tell: called without arguments when events were refused or given up, once for each ``listen``.

    """

    __slots__ = (
        "_closed",
        "_delivered",
        "_drop_oldest",
        "_dropped",
        "_events",
        "_in_flight",
        "_listening",
        "_lock",
        "_max_bytes",
        "_max_event_bytes",
        "_max_events",
        "_mean",
        "_others",
        "_popped",
        "_recovered",
        "_refused",
        "_spooled",
        "_tell",
        "_volume",
        "_wake",
        "_wake_bytes",
        "_wake_events",
    )

    def __init__(
        self,
        max_events: int,
        max_bytes: int,
        max_event_bytes: int,
        drop_oldest: bool,
        wake: Callable[[], object],
        tell: Callable[[], object],
    ) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._max_event_bytes = max_event_bytes
        self._drop_oldest = drop_oldest
        self._wake = wake
        self._tell = tell
        self._closed = False
        self.reset()

    def reset(self) -> None:
        """Forget all events and books; for the child of a fork, whose lock another thread may have held."""
        # Reentrant: the collector may run what emits in the middle of a change.
        self._lock = threading.RLock()
        self._events: deque[Any] = deque()
        # Bytes that are queued, of which so many events are counted at the mean.
        self._volume = self._others = 0
        self._mean = FIRST_MEAN
        # All that ever left the queue; with what is in it, that is what was accepted.
        self._popped = 0
        self._recovered = self._delivered = self._spooled = self._in_flight = 0
        self._dropped: dict[str, int] = {}
        self._refused: dict[str, int] = {}
        self._wake_events = 1
        self._wake_bytes = NEVER
        self._listening = True

    def __len__(self) -> int:
        return len(self._events)

    # -- filling ------------------------------------------------------------------------------------------------------

    def emit(self, event: Any) -> bool:
        """Queue an event for the flusher; from any thread. Never waits and never raises because of load.

        The event is encoded later: do not change it after this call.

        Returns:
            Whether the event was accepted. What is refused is counted with its reason.

        """
        size = len(event) if type(event) is bytes else -1
        with self._lock:
            events = self._events
            charge = self._mean if size < 0 else size
            volume = self._volume + charge
            # A closed ring has no places.
            if (
                len(events) < self._max_events
                and volume <= self._max_bytes
                and size <= self._max_event_bytes
                and _at_work() is not self
            ):
                events.append(event)
                self._volume = volume
                if size < 0:
                    self._others += 1
                if len(events) < self._wake_events and volume < self._wake_bytes:
                    return True
                self._wake_events = self._wake_bytes = NEVER
                wake = True
            else:
                wake = False
        # Not under the lock: what the callbacks log may take locks of others, and those may emit.
        if wake:
            self._wake()
            return True
        return self._emit_against_odds(event, size)

    def _emit_against_odds(self, event: Any, size: int) -> bool:
        given_up: list[Any] = []
        wake = False
        with self._lock:
            charge = self._mean if size < 0 else size
            refusal = self._refusal(charge, size)
            if refusal is None:
                given_up = self._make_room(charge)
                self._events.append(event)
                self._volume += charge
                self._others += size < 0
                wake = len(self._events) >= self._wake_events or self._volume >= self._wake_bytes
                if wake:
                    self._wake_events = self._wake_bytes = NEVER
        if refusal is not None:
            return self.refuse(refusal)
        if wake:
            self._wake()
        if given_up:
            self._tell_once()
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

    def has_room(self) -> bool:
        """Say whether an event of the mean size would be accepted, or refused for another reason than a full ring."""
        with self._lock:
            return self._closed or (
                len(self._events) < self._max_events and self._volume + self._mean <= self._max_bytes
            )

    def refuse(self, reason: str) -> bool:
        """Count an event that is not accepted, and return False."""
        with self._lock:
            self._refused[reason] = self._refused.get(reason, 0) + 1
        self._tell_once()
        return False

    def _make_room(self, charge: int) -> list[Any]:
        given_up = []
        while self._events and (len(self._events) >= self._max_events or self._volume + charge > self._max_bytes):
            given_up.append(self._pop())
        if given_up:
            self._dropped["full"] = self._dropped.get("full", 0) + len(given_up)
        return given_up

    def _pop(self) -> Any:
        event = self._events.popleft()
        self._popped += 1
        if type(event) is bytes:
            self._volume -= len(event)
        else:
            self._volume -= self._mean
            self._others -= 1
        return event

    def _tell_once(self) -> None:
        with self._lock:
            tell, self._listening = self._listening, False
        if tell:
            self._tell()

    def close(self) -> None:
        """Refuse every event from now on."""
        with self._lock:
            self._closed = True
            self._max_events = 0

    # -- emptying: the flusher's --------------------------------------------------------------------------------------

    def arm(self, events: int, volume: int) -> bool:
        """Have ``wake`` called once, when so many events or bytes are queued.

        Args:
            events: number of events.
            volume: number of bytes; 0 to wait for events alone.

        Returns:
            True if they are there already: then nothing was armed.

        """
        with self._lock:
            if len(self._events) >= events or (volume and self._volume >= volume):
                self._wake_events = self._wake_bytes = NEVER
                return True
            self._wake_events = events
            self._wake_bytes = volume or NEVER
            return False

    def listen(self) -> None:
        """Have ``tell`` called once, at the next event that is refused or given up."""
        self._listening = True

    def take(self, events: int, volume: int) -> list[Any]:
        """Take out the oldest events, at most so many and of so many bytes, but at least one if there is any.

        They are in flight until ``settle`` says what became of them.
        """
        taken: list[Any] = []
        with self._lock:
            while self._events and len(taken) < events:
                first = self._events[0]
                volume -= len(first) if type(first) is bytes else self._mean
                if taken and volume < 0:
                    break
                taken.append(self._pop())
            self._in_flight += len(taken)
        return taken

    def measured(self, mean: int) -> None:
        """Take note of the mean size of the events last encoded, in bytes."""
        with self._lock:
            before = self._mean
            self._mean = max((3 * before + mean) // 4, 1)
            self._volume += self._others * (self._mean - before)

    def settle(self, count: int, outcome: str) -> None:
        """Close the books on events in flight: ``"delivered"``, ``"spooled"`` or the reason of a drop."""
        with self._lock:
            self._in_flight -= count
            dropped = self._enter(count, outcome)
        if dropped:
            self._tell_once()

    def settle_spooled(self, count: int, outcome: str) -> None:
        """Close the books on events that were spooled: ``"delivered"`` or the reason of a drop."""
        with self._lock:
            self._spooled -= count
            dropped = self._enter(count, outcome)
        if dropped:
            self._tell_once()

    def recover(self, count: int) -> None:
        """Enter events that an earlier process left in the spool: accepted and spooled."""
        with self._lock:
            self._recovered += count
            self._spooled += count

    def _enter(self, count: int, outcome: str) -> bool:
        if outcome == "delivered":
            self._delivered += count
        elif outcome == "spooled":
            self._spooled += count
        else:
            self._dropped[outcome] = self._dropped.get(outcome, 0) + count
            return True
        return False

    # -- books --------------------------------------------------------------------------------------------------------

    @property
    def accepted(self) -> int:
        """How many events were accepted."""
        with self._lock:
            return self._recovered + self._popped + len(self._events)

    @property
    def finished(self) -> int:
        """How many accepted events were delivered or dropped."""
        with self._lock:
            return self._recovered + self._popped - self._in_flight - self._spooled

    @property
    def left(self) -> int:
        """How many accepted events have left memory: delivered, dropped or spooled."""
        with self._lock:
            return self._recovered + self._popped - self._in_flight

    def books(self) -> Books:
        """Return the books, all of one moment. Safe from any thread."""
        with self._lock:
            return {
                "accepted": self._recovered + self._popped + len(self._events),
                "recovered": self._recovered,
                "delivered": self._delivered,
                "spooled": self._spooled,
                "queue_events": len(self._events) + self._in_flight,
                "queue_bytes": self._volume,
                "in_flight": self._in_flight,
                "dropped": dict(self._dropped),
                "refused": dict(self._refused),
            }
