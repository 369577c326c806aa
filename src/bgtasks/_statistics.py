"""Counters and durations by name, added up over event loops."""

from __future__ import annotations

from collections.abc import Iterable
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
RUNNING, COMPLETED, FAILED, CANCELLED, TIMED_OUT, ABANDONED = range(6)


class Totals:
    """The counters and the duration histogram of some tasks."""

    __slots__ = ("_buckets", "_counts", "_started")

    def __init__(self) -> None:
        self._started = 0
        self._counts = [0] * len(OUTCOMES)
        self._buckets: dict[int, int] = {}

    def add(self, snapshot: Snapshot) -> None:
        """Add the counters of a snapshot."""
        started, counts, buckets = snapshot
        self._started += started
        for outcome, count in enumerate(counts):
            self._counts[outcome] += count
        for bucket, count in buckets.items():
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count

    def add_abandoned(self, count: int) -> None:
        """Count live tasks of a closed loop as abandoned: they cannot end otherwise."""
        self._counts[ABANDONED] += count

    def snapshot(self) -> Snapshot:
        """Return the counters."""
        return self._started, list(self._counts), dict(self._buckets)

    def counters(self) -> dict[str, int]:
        """Return the counters by name."""
        return {
            "started": self._started,
            "in_flight": self._started - sum(self._counts[COMPLETED:]),
            "completed": self._counts[COMPLETED],
            "failed": self._counts[FAILED],
            "cancelled": self._counts[CANCELLED],
            "timed_out": self._counts[TIMED_OUT],
            "abandoned": self._counts[ABANDONED],
        }

    def as_dict(self) -> NameStats:
        """Return the counters and the 50th and 99th percentile of the durations, in seconds (None before the first)."""
        stats: Any = self.counters()
        stats["p50_seconds"] = self._percentile(0.50)
        stats["p99_seconds"] = self._percentile(0.99)
        result: NameStats = stats
        return result

    def _percentile(self, share: float) -> float | None:
        # Nearest rank over the buckets; the middle of a bucket is at most 6.25 % off.
        total = sum(self._buckets.values())
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= share * total:
                return _middle_of(bucket)
        return None


def _middle_of(bucket: int) -> float:
    if bucket == 0:
        return 0.5e-6
    octave, part = divmod(bucket - 1, 8)
    return (8.5 + part) / 16.0 * 2.0 ** (octave + 1) * 1e-6


class NameTotals:
    """Totals over all tasks and by name."""

    def __init__(self) -> None:
        self.total = Totals()
        self._names: dict[str, Totals] = {}

    def add(self, names: Iterable[tuple[str, Snapshot]]) -> None:
        """Add snapshots by name."""
        for name, snapshot in names:
            self.total.add(snapshot)
            self._of(name).add(snapshot)

    def add_abandoned(self, name: str) -> None:
        """Count a live task of a closed loop as abandoned."""
        self.total.add_abandoned(1)
        self._of(name).add_abandoned(1)

    def _of(self, name: str) -> Totals:
        if name not in self._names and len(self._names) >= MAX_NAMES:
            name = OTHER_NAMES
        return self._names.setdefault(name, Totals())

    def snapshots(self) -> list[tuple[str, Snapshot]]:
        """Return the counters by name, for ``add``."""
        return [(name, totals.snapshot()) for name, totals in self._names.items()]

    def by_name(self) -> dict[str, NameStats]:
        """Return the statistics of each name."""
        return {name: totals.as_dict() for name, totals in self._names.items()}
