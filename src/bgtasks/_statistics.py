"""Counters and durations by name, added up over event loops."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from bgtasks.info import NameStats

__all__ = ["MAX_NAMES", "OTHER_NAMES", "OUTCOMES", "NameTotals", "Totals"]

# Further names are counted together.
MAX_NAMES: Final = 1000
OTHER_NAMES: Final = "(other)"

# The number of started tasks, a count per outcome, and a count per bucket of the histogram.
Snapshot = tuple[int, list[int], dict[int, int]]

OUTCOMES: Final = ("running", "completed", "failed", "cancelled", "timed_out", "abandoned")
EMPTY: Final = (0,) * len(OUTCOMES)
ABANDONED: Final = OUTCOMES.index("abandoned")


class Totals:
    """The counters and the duration histogram of some tasks."""

    __slots__ = ("buckets", "counts", "started")

    def __init__(self, snapshot: Snapshot) -> None:
        """Begin with the counters of a snapshot, which belongs to this object from now on."""
        self.started, self.counts, self.buckets = snapshot

    def add(self, snapshot: Snapshot) -> None:
        """Add the counters of a snapshot."""
        started, counts, buckets = snapshot
        self.started += started
        for outcome, count in enumerate(counts):
            self.counts[outcome] += count
        for bucket, count in buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count

    def add_abandoned(self, count: int) -> None:
        """Count live tasks of a closed loop as abandoned: they cannot end otherwise."""
        self.counts[ABANDONED] += count

    def snapshot(self) -> Snapshot:
        """Return the counters."""
        return self.started, list(self.counts), dict(self.buckets)

    def as_dict(self) -> NameStats:
        """Return the counters and the 50th and 99th percentile of the durations, in seconds (None before the first).

        The percentiles are the middles of buckets, at most 6.25 % off, and rounded to three digits.
        """
        p50, p99 = _percentiles(self.buckets, (0.50, 0.99))
        stats: Any = _counters(self.started, self.counts)
        stats["p50_seconds"], stats["p99_seconds"] = p50, p99
        result: NameStats = stats
        return result


def _counters(started: int, counts: Sequence[int]) -> dict[str, int]:
    _, completed, failed, cancelled, timed_out, abandoned = counts
    return {
        "started": started,
        "in_flight": started - completed - failed - cancelled - timed_out - abandoned,
        "completed": completed,
        "failed": failed,
        "cancelled": cancelled,
        "timed_out": timed_out,
        "abandoned": abandoned,
    }


def _percentiles(buckets: dict[int, int], shares: tuple[float, ...]) -> list[float | None]:
    """Return percentiles by nearest rank; the middle of a bucket is at most 6.25 % off. None without a duration."""
    if not buckets:
        return [None] * len(shares)
    total = sum(buckets.values())
    found: list[float | None] = []
    seen = 0
    for bucket in sorted(buckets):
        seen += buckets[bucket]
        while len(found) < len(shares) and seen >= shares[len(found)] * total:
            # More digits would say more than a bucket knows.
            found.append(float(f"{_middle_of(bucket):.3g}"))
    return found


def _middle_of(bucket: int) -> float:
    if bucket == 0:
        return 0.5e-6
    octave, part = divmod(bucket - 1, 8)
    return (8.5 + part) / 16.0 * 2.0 ** (octave + 1) * 1e-6


class NameTotals:
    """Totals by name."""

    def __init__(self) -> None:
        self._names: dict[str, Totals] = {}

    def add(self, names: Iterable[tuple[str, Snapshot]]) -> None:
        """Add snapshots by name, which belong to this object from now on."""
        for name, snapshot in names:
            key = self._key(name)
            known = self._names.get(key)
            if known is None:
                self._names[key] = Totals(snapshot)
            else:
                known.add(snapshot)

    def add_abandoned(self, name: str) -> None:
        """Count a live task of a closed loop as abandoned."""
        self._names.setdefault(self._key(name), Totals((0, list(EMPTY), {}))).add_abandoned(1)

    def _key(self, name: str) -> str:
        return name if name in self._names or len(self._names) < MAX_NAMES else OTHER_NAMES

    def snapshots(self) -> list[tuple[str, Snapshot]]:
        """Return the counters by name, for ``add``."""
        return [(name, totals.snapshot()) for name, totals in self._names.items()]

    def counters(self) -> dict[str, int]:
        """Return the counters over all names."""
        names = self._names.values()
        started = sum([totals.started for totals in names])
        counts = [sum(column) for column in zip(*[totals.counts for totals in names], strict=True)]
        return _counters(started, counts or EMPTY)

    def by_name(self) -> dict[str, NameStats]:
        """Return the statistics of each name."""
        return {name: totals.as_dict() for name, totals in self._names.items()}
