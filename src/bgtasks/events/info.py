"""The dictionaries that publishers and spools return, typed and JSON-safe; and the types of their options."""

from __future__ import annotations

from typing import Literal, TypeAlias, TypedDict

from bgtasks.info import Histogram

__all__ = [
    "EventOverflow",
    "FlushReport",
    "PublisherState",
    "PublisherStats",
    "SpoolOverflow",
    "SpoolStats",
    "SpoolSync",
    "Sync",
]

# The values of ``bgtasks.Overflow`` that publishers and spools accept.
EventOverflow: TypeAlias = Literal["drop_newest", "drop_oldest", "block", "spool"]
SpoolOverflow: TypeAlias = Literal["drop_oldest", "raise"]
# What a file of SQLite survives once it is committed: the end of its process, or that of the machine.
Sync: TypeAlias = Literal["normal", "full"]
# When a commit of a spool is on the disk: within half a second, before it returns, or when the system likes.
SpoolSync: TypeAlias = Literal["interval", "full", "normal"]

PublisherState: TypeAlias = Literal["ok", "retrying", "spooling", "stalled", "dropping", "closed"]


class FlushReport(TypedDict):
    """The result of ``flush`` or ``close``.

    ``status`` is ``"flushed"`` if every event accepted before the call was delivered or dropped, and ``"timeout"`` if
    the time was up before. ``delivered`` and ``dropped`` count events during the call, ``queued`` and ``spooled`` the
    events that are left. ``last_error`` is the text of the sink's last error since its last successful write, None if
    there was none.
    """

    status: Literal["flushed", "timeout"]
    delivered: int
    dropped: int
    queued: int
    spooled: int
    duration_seconds: float
    last_error: str | None


class PublisherStats(TypedDict):
    """Counters of one publisher since it was made; ``accepted == delivered + sum(dropped) + queue_events + spooled``.

    ``refused`` events were never accepted. ``refused`` and ``dropped`` count by reason: ``closed``, ``corrupt``,
    ``encode``, ``expired``, ``feedback``, ``full``, ``rejected``, ``retries_exhausted``, ``spool_full``, ``timeout``,
    ``too_large``. ``accepted`` includes the ``recovered`` events, which an earlier process left in the spool.
    ``retried`` counts the further tries of batches, ``spool_errors`` the failures of the spool. ``queue_bytes``
    is an estimate for events that are not encoded yet. ``state`` is ``"stalled"`` while a call of the sink has not
    returned for five seconds; ``last_error`` then names it. ``oldest_age_seconds`` is an upper bound, 0 if no event is
    queued. ``lag`` has the time from ``emit`` to the delivery of each event, as an upper bound: that of the oldest
    event of its batch. Events that were read from a spool are not in it.
    """

    name: str
    state: PublisherState
    accepted: int
    recovered: int
    delivered: int
    spooled: int
    retried: int
    spool_errors: int
    queue_events: int
    queue_bytes: int
    dropped: dict[str, int]
    refused: dict[str, int]
    oldest_age_seconds: float
    last_error: str | None
    lag: Histogram


class SpoolStats(TypedDict):
    """The contents and losses of a spool; counters count events unless their names say otherwise.

    ``recovered`` events were left by earlier processes. ``dropped`` counts by reason: ``spool_full`` (dropped to make
    room), ``expired`` (older than ``max_age``), ``corrupt`` (in a damaged row or file, as far as known).
    ``corrupt_files`` counts the files that were set aside.
    """

    events: int
    bytes: int
    batches: int
    recovered: int
    dropped: dict[str, int]
    corrupt_files: int
