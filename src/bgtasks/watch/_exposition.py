"""The figures by name in the text format of Prometheus, made from a template per metric.

A manager with 1,000 names has 68,000 samples; ``prometheus_client`` makes an object, a dict and a line for each.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from bgtasks._statistics import BUCKET_EDGES, MAX_NAMES
from bgtasks.watch._published import encodable

if TYPE_CHECKING:
    from bgtasks._statistics import Measured, Totals

__all__ = ["AGE", "DURATION", "ENDED", "HELP", "OUTCOMES", "STARTED", "WAIT", "Edges", "NamedText"]

OUTCOMES: Final = ("completed", "failed", "cancelled", "timed_out", "abandoned")
ENDED: Final = "bgtasks_tasks_finished"
STARTED: Final = "bgtasks_tasks_started"
DURATION: Final = "bgtasks_task_duration_seconds"
WAIT: Final = "bgtasks_task_wait_seconds"
AGE: Final = "bgtasks_task_oldest_age_seconds"
_NAMES: Final = f"; the first {MAX_NAMES} names, all others together as (other)."
HELP: Final = {
    STARTED: f"Started tasks{_NAMES}",
    ENDED: f"Ended tasks by outcome{_NAMES}",
    DURATION: f"From start to end{_NAMES}",
    WAIT: f"From creation to the first step{_NAMES}",
    AGE: f"Age of the oldest live task{_NAMES}",
}


class Edges:
    """The upper edges of exported buckets.

    Args:
        edges: the edges in seconds, ascending; each one of ``BUCKET_EDGES``.

    """

    def __init__(self, edges: Sequence[float]) -> None:
        self.labels = (*map(repr, edges), "+Inf")
        # The index of the first exported edge at or above the upper edge of each bucket.
        self._index_of = [bisect.bisect_left(edges, edge) for edge in BUCKET_EDGES]
        # The last bucket has everything beyond its edge, too.
        self._index_of[-1] = len(edges)

    def counts(self, *buckets: Iterable[tuple[int, int]]) -> list[int]:
        """Return the number of values between each edge and the one below it; the last one is beyond all edges."""
        counts = [0] * len(self.labels)
        index_of = self._index_of
        for pairs in buckets:
            for bucket, count in pairs:
                counts[index_of[bucket]] += count
        return counts


class _Template:
    """Lines of text, in UTF-8, that differ by a name and their values.

    Args:
        lines: what stands before and after the name of each line; its value follows.

    """

    def __init__(self, lines: Iterable[tuple[str, str]]) -> None:
        self._parts = [part.encode() for before, after in lines for part in (f"\n{before}", "", after, "")]
        self._count = len(self._parts) // 4

    def fill(self, name: bytes, values: Sequence[bytes]) -> bytes:
        """Return the lines, each after a line feed."""
        parts = self._parts.copy()
        parts[1::4] = [name] * self._count
        parts[3::4] = values
        return b"".join(parts)


class NamedText:
    """Writes the figures by name.

    Args:
        manager: the value of the label ``manager``.
        edges: the edges of the buckets.

    """

    def __init__(self, manager: str, edges: Edges) -> None:
        self._edges = edges
        labels = f'manager="{_escaped(manager)}",name="'
        self._started = _Template([(f"{STARTED}_total{{{labels}", '"} ')])
        self._ended = _Template([(f"{ENDED}_total{{{labels}", f'",outcome="{outcome}"}} ') for outcome in OUTCOMES])
        self._age = _Template([(f"{AGE}{{{labels}", '"} ')])
        self._duration, self._wait = (
            _Template(
                [
                    *((f'{metric}_bucket{{le="{edge}",{labels}', '"} ') for edge in edges.labels),
                    (f"{metric}_count{{{labels}", '"} '),
                    (f"{metric}_sum{{{labels}", '"} '),
                ]
            )
            for metric in (DURATION, WAIT)
        )

    def families(self, names: Iterable[tuple[str, Totals]], ages: Mapping[str, float]) -> dict[bytes, list[bytes]]:
        """Return the lines of some names, and of the ages of their oldest live tasks in seconds.

        They stand under the comments of their metric, each after a line feed.
        """
        started, ended, durations, waits = [], [], [], []
        for name, totals in names:
            label = _escaped(name).encode()
            started.append(self._started.fill(label, (b"%d" % totals.started,)))
            ended.append(self._ended.fill(label, [b"%d" % count for count in totals.counts[1:]]))
            durations.append(self._histogram(self._duration, label, totals.durations))
            waits.append(self._histogram(self._wait, label, totals.waits))
        oldest = [self._age.fill(_escaped(name).encode(), (repr(age).encode(),)) for name, age in ages.items()]
        families = (
            (f"{STARTED}_total", STARTED, "counter", started),
            (f"{ENDED}_total", ENDED, "counter", ended),
            (DURATION, DURATION, "histogram", durations),
            (WAIT, WAIT, "histogram", waits),
            (AGE, AGE, "gauge", oldest),
        )
        return {
            f"# HELP {shown} {HELP[metric]}\n# TYPE {shown} {kind}".encode(): lines
            for shown, metric, kind, lines in families
        }

    def _histogram(self, template: _Template, label: bytes, measured: Measured) -> bytes:
        buckets, seconds, _ = measured
        values: list[bytes] = []
        total = 0
        value = b"0"
        for count in self._edges.counts(buckets.items()):
            # Most are 0: a text less to make.
            if count:
                total += count
                value = b"%d" % total
            values.append(value)
        values += (value, repr(seconds).encode())
        return template.fill(label, values)


def _escaped(label: str) -> str:
    return encodable(label).replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
