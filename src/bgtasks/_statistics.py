"""Counters and durations by name, added up over event loops."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import repeat
from operator import mul
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from bgtasks.info import Histogram, NameHistograms, NameStats

__all__ = [
    "BUCKETS",
    "BUCKET_EDGES",
    "MAX_NAMES",
    "OTHER_NAMES",
    "OUTCOMES",
    "Distribution",
    "Measured",
    "NameTotals",
    "Snapshot",
    "Totals",
    "bucket_of",
    "with_values",
]

# Further names are counted together.
MAX_NAMES: Final = 1000
OTHER_NAMES: Final = "(other)"

# The number of buckets of a histogram: one below a microsecond, then eight per power of two, up to 2**41 microseconds.
BUCKETS: Final = 329
# The upper edges of the buckets, in seconds; a value on an edge is in the bucket above it.
BUCKET_EDGES: Final[tuple[float, ...]] = (
    1e-6,
    *((9 + part) * 2.0 ** (octave - 3) * 1e-6 for octave in range(41) for part in range(8)),
)
# The same in microseconds, which are exact; without the last: what lies beyond is in the last bucket.
_EDGES_OF_BUCKETS: Final = (1.0, *((9 + part) * 2.0 ** (octave - 3) for octave in range(41) for part in range(8)))[:-1]
# A count per bucket, and the sum and the maximum of all values, in seconds.
Measured: TypeAlias = tuple[dict[int, int], float, float]
# The number of started tasks, a count per outcome, their durations, their waits, and the type of the last failure.
Snapshot: TypeAlias = tuple[int, list[int], Measured, Measured, str | None]

OUTCOMES: Final = ("running", "completed", "failed", "cancelled", "timed_out", "abandoned")
EMPTY: Final = (0,) * len(OUTCOMES)
ABANDONED: Final = OUTCOMES.index("abandoned")


def bucket_of(seconds: float) -> int:
    """Return the bucket of a length of time."""
    microseconds = seconds * 1e6
    if not microseconds >= 1.0:
        return 0
    mantissa, exponent = math.frexp(microseconds)
    return min((exponent - 1) * 8 + int(mantissa * 16.0) - 7, BUCKETS - 1)


def with_values(measured: Measured, values: list[float]) -> Measured:
    """Return a histogram and some lengths of time as one; the histogram keeps its own dict."""
    buckets, total, maximum = measured
    counts = Counter(buckets)
    if values:
        counts.update(map(bisect_right, repeat(_EDGES_OF_BUCKETS), map(mul, values, repeat(1e6))))
    return dict(counts), sum(values, total), max([maximum, *values])


class Distribution:
    """A histogram of lengths of time, with their sum and their maximum."""

    __slots__ = ("_buckets", "_maximum", "_sum")

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}
        self._sum = 0.0
        self._maximum = 0.0

    def count(self, seconds: float, times: int = 1) -> None:
        """Count a length of time."""
        bucket = bucket_of(seconds)
        # What can fail comes first; the maximum before its bucket, as another thread may read in between.
        total = self._sum + seconds * times
        self._maximum = max(self._maximum, seconds)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + times
        self._sum = total

    def as_dict(self) -> Histogram:
        """Return the counts for users. Safe from any thread."""
        return _histogram((self._buckets.copy(), self._sum, self._maximum))


class Totals:
    """The counters of some tasks, and the histograms of their durations and of their waits."""

    __slots__ = ("counts", "durations", "last_error", "started", "waits")

    def __init__(self, snapshot: Snapshot) -> None:
        """Begin with the counters of a snapshot, which belongs to this object from now on."""
        self.started, self.counts, self.durations, self.waits, self.last_error = snapshot

    def add(self, snapshot: Snapshot) -> None:
        """Add the counters of a snapshot."""
        started, counts, durations, waits, last_error = snapshot
        self.started += started
        for outcome, count in enumerate(counts):
            self.counts[outcome] += count
        self.durations = _sum_of(self.durations, durations)
        self.waits = _sum_of(self.waits, waits)
        self.last_error = last_error or self.last_error

    def add_abandoned(self, count: int) -> None:
        """Count live tasks of a closed loop as abandoned: they cannot end otherwise."""
        self.counts[ABANDONED] += count

    def snapshot(self) -> Snapshot:
        """Return the counters."""
        durations, duration_sum, duration_max = self.durations
        waits, wait_sum, wait_max = self.waits
        return (
            self.started,
            list(self.counts),
            (dict(durations), duration_sum, duration_max),
            (dict(waits), wait_sum, wait_max),
            self.last_error,
        )

    def as_dict(self) -> NameStats:
        """Return the counters, percentiles and maxima in seconds (None before the first), and the last error.

        The percentiles are the middles of buckets, at most 6.25 % off, and rounded to three digits.
        """
        durations, _, duration_max = self.durations
        waits, _, wait_max = self.waits
        stats: Any = _counters(self.started, self.counts)
        p50, p90, p99 = _percentiles(self.durations, (0.50, 0.90, 0.99))
        stats["p50_seconds"], stats["p90_seconds"], stats["p99_seconds"] = p50, p90, p99
        stats["max_seconds"] = duration_max if durations else None
        stats["wait_p50_seconds"], stats["wait_p99_seconds"] = _percentiles(self.waits, (0.50, 0.99))
        stats["wait_max_seconds"] = wait_max if waits else None
        stats["last_error"] = self.last_error
        result: NameStats = stats
        return result

    def histograms(self) -> NameHistograms:
        """Return the histograms."""
        return {"duration": _histogram(self.durations), "wait": _histogram(self.waits)}


def _sum_of(measured: Measured, other: Measured) -> Measured:
    """Add counts to those of ``measured``, whose dict the result has."""
    buckets, total, maximum = measured
    more, more_total, more_maximum = other
    for bucket, count in more.items():
        buckets[bucket] = buckets.get(bucket, 0) + count
    return buckets, total + more_total, max(maximum, more_maximum)


def _histogram(measured: Measured) -> Histogram:
    buckets, total, maximum = measured
    return {
        "count": sum(buckets.values()),
        "sum_seconds": total,
        "max_seconds": maximum if buckets else None,
        "buckets": sorted(buckets.items()),
    }


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


def _percentiles(measured: Measured, shares: tuple[float, ...]) -> list[float | None]:
    """Return percentiles by nearest rank, in one pass. None without a value."""
    buckets, _, maximum = measured
    if not buckets:
        return [None] * len(shares)
    total = sum(buckets.values())
    found: list[float | None] = []
    seen = 0
    for bucket in sorted(buckets):
        seen += buckets[bucket]
        while len(found) < len(shares) and seen >= shares[len(found)] * total:
            # The middle of the last bucket in use may lie above all values in it.
            found.append(min(_middle_of(bucket), maximum))
    return found


@cache
def _middle_of(bucket: int) -> float:
    if bucket == 0:
        return 0.5e-6
    octave, part = divmod(bucket - 1, 8)
    # More digits would say more than a bucket knows.
    return float(f"{(8.5 + part) / 16.0 * 2.0 ** (octave + 1) * 1e-6:.3g}")


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
        self._names.setdefault(
            self._key(name), Totals((0, list(EMPTY), ({}, 0.0, 0.0), ({}, 0.0, 0.0), None))
        ).add_abandoned(1)

    def _key(self, name: str) -> str:
        return name if name in self._names or len(self._names) < MAX_NAMES else OTHER_NAMES

    def items(self) -> Iterable[tuple[str, Totals]]:
        """Return the totals by name."""
        return self._names.items()

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

    def histograms(self) -> dict[str, NameHistograms]:
        """Return the histograms of each name."""
        return {name: totals.histograms() for name, totals in self._names.items()}
