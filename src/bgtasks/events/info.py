"""The dictionaries that a publisher hands out: typed and JSON-safe."""

from __future__ import annotations

from typing import Literal, TypedDict

__all__ = ["FlushReport", "PublisherStats", "State"]

State = Literal["ok", "retrying", "spooling", "dropping", "closed"]


class FlushReport(TypedDict):
    """What ``flush`` or ``close`` did.

    ``status`` is ``"flushed"`` (every event accepted before the call was delivered or dropped), or ``"deadline"``: the
    time was up before. ``delivered`` and ``dropped`` count what happened during the call, ``queued`` and ``spooled``
    what is left. ``last_error`` is the text of the sink's last error since the last batch it took, None if it is well.
    """

    status: Literal["flushed", "deadline"]
    delivered: int
    dropped: int
    queued: int
    spooled: int
    duration_seconds: float
    last_error: str | None


class PublisherStats(TypedDict):
    """Counters of one publisher since it was made; ``accepted == delivered + sum(dropped) + queue_events + spooled``.

    ``refused`` events were never accepted; both it and ``dropped`` count by reason. ``accepted`` includes the
    ``recovered`` events, which an earlier process left in the spool. ``retried`` counts batches, once for each further
    try; ``spool_errors`` counts failures of the spool. ``queue_bytes`` is an estimate for what is not encoded yet.
    ``oldest_age`` is in seconds, an upper bound, 0 when nothing is queued.
    """

    name: str
    state: State
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
    oldest_age: float
    last_error: str | None
