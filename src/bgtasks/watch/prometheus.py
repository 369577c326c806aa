"""Figures of managers and publishers for Prometheus, read when it scrapes; a task costs nothing more.

::

    from prometheus_client import REGISTRY
    from bgtasks.watch.prometheus import Collector

    REGISTRY.register(Collector(manager, publishers=[publisher]))
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from bgtasks._statistics import BUCKET_EDGES, MAX_NAMES
from bgtasks.errors import InvalidOptionError, describe, missing_extra

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "prometheus_client":
        raise
    raise missing_extra("prometheus", "prometheus_client", "export figures to Prometheus") from error

if TYPE_CHECKING:
    from bgtasks.info import Histogram, LoopStats, ManagerStats, NameHistograms, TaskInfo

__all__ = ["OCTAVES", "Collector", "Managed", "Published"]

# The powers of two of a microsecond from 256 microseconds to 9.5 hours: edges of the buckets, so the counts are exact.
OCTAVES: Final = tuple(2.0**power * 1e-6 for power in range(8, 36))

NAMES_HELP: Final = f"; the first {MAX_NAMES} names, all others together as (other)"
OUTCOMES: Final = ("completed", "failed", "cancelled", "timed_out", "abandoned")
STATES: Final = ("ok", "retrying", "spooling", "dropping", "closed")


EVENT_COUNTERS: Final = {
    "accepted": "Accepted events.",
    "delivered": "Delivered events.",
    "recovered": "Events that an earlier process left in the spool.",
    "retried": "Further tries of batches.",
    "spool_errors": "Failures of the spool.",
}
EVENT_GAUGES: Final = {
    "queue_events": ("queued", "Events in the queue and in flight."),
    "queue_bytes": ("queued_bytes", "Bytes in the queue, estimated for events that are not encoded yet."),
    "spooled": ("spooled", "Events in the spool."),
    "oldest_age_seconds": ("oldest_age_seconds", "Upper bound of the age of the oldest queued event."),
}


class Managed(Protocol):
    """What the collector asks of a manager."""

    def stats(self) -> ManagerStats:
        """Return the counters."""

    def histograms(self) -> dict[str, NameHistograms]:
        """Return the histograms by name."""

    def loop_stats(self) -> list[LoopStats]:
        """Return the figures of watched loops."""

    def get_task_info(self) -> list[TaskInfo]:
        """Return the live tasks."""


class Published(Protocol):
    """What the collector asks of a publisher."""

    def stats(self) -> Mapping[str, Any]:
        """Return the counters."""


class Collector:
    """A collector for ``prometheus_client``: register it with a registry, and it reads the figures on each scrape.

    Labels are names of tasks, outcomes and reasons; never an id, a context, a host or a process. Several managers can
    be in one registry if each has a collector with a ``manager`` of its own.

    Args:
        managed: the manager.
        manager: the value of the label ``manager``.
        publishers: publishers whose figures to export, labelled by their names.
        buckets: the upper edges of the exported buckets in seconds, ascending; each one of ``bgtasks.BUCKET_EDGES``,
            because only there are the counts exact. By default the powers of two from 256 microseconds to 9.5 hours.

    Raises:
        InvalidOptionError: ``buckets`` has a value that is no edge, or they do not ascend.
        MissingExtraError: on import, if ``prometheus_client`` is not installed.

    Example:
        >>> from prometheus_client import REGISTRY
        >>> manager = bgtasks.BackgroundTaskManager()
        >>> REGISTRY.register(Collector(manager, buckets=bgtasks.BUCKET_EDGES[65::16]))

    """

    def __init__(
        self,
        managed: Managed,
        *,
        manager: str = "default",
        publishers: Iterable[Published] = (),
        buckets: Sequence[float] = OCTAVES,
    ) -> None:
        self._managed = managed
        self._manager = manager
        self._publishers = tuple(publishers)
        self._edges = _checked(buckets)
        # The index of the first exported edge at or above the upper edge of each bucket.
        self._place_of = [bisect.bisect_left(self._edges, edge) for edge in BUCKET_EDGES]
        # The last bucket has everything beyond its edge, too.
        self._place_of[-1] = len(self._edges)

    def describe(self) -> list[Metric]:
        """Return no names: with them, a registry would refuse a second manager."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read the figures."""
        yield from self._tasks()
        yield from self._histograms()
        yield from self._ages()
        yield from self._loops()
        if self._publishers:
            yield from self._events()

    def _tasks(self) -> Iterator[Metric]:
        stats = self._managed.stats()
        mine = [self._manager]
        started = CounterMetricFamily(
            "bgtasks_tasks_started", f"Started tasks{NAMES_HELP}.", labels=["manager", "name"]
        )
        finished = CounterMetricFamily(
            "bgtasks_tasks_finished", f"Ended tasks by outcome{NAMES_HELP}.", labels=["manager", "name", "outcome"]
        )
        for name, counters in stats["names"].items():
            figures: Mapping[str, Any] = counters
            started.add_metric([self._manager, name], counters["started"])
            for outcome in OUTCOMES:
                finished.add_metric([self._manager, name, outcome], figures[outcome])
        yield started
        yield finished
        yield _counter("bgtasks_tasks_dropped", "Coroutines that were dropped at the limit.", mine, stats["dropped"])
        yield _gauge("bgtasks_tasks_running", "Tasks that run.", mine, stats["running"])
        yield _gauge("bgtasks_tasks_queued", "Tasks that wait for a concurrency slot.", mine, stats["queued"])

    def _histograms(self) -> Iterator[Metric]:
        labels = ["manager", "name"]
        durations = HistogramMetricFamily(
            "bgtasks_task_duration_seconds", f"From start to end{NAMES_HELP}.", labels=labels
        )
        waits = HistogramMetricFamily(
            "bgtasks_task_wait_seconds", f"From creation to the first step{NAMES_HELP}.", labels=labels
        )
        for name, histograms in self._managed.histograms().items():
            self._add(durations, [self._manager, name], histograms["duration"])
            self._add(waits, [self._manager, name], histograms["wait"])
        yield durations
        yield waits

    def _ages(self) -> Iterator[Metric]:
        ages: dict[str, float] = {}
        for info in self._managed.get_task_info():
            name = info["name"] if info["name"] in ages or len(ages) < MAX_NAMES else "(other)"
            ages[name] = max(ages.get(name, 0.0), info["age_seconds"])
        family = GaugeMetricFamily(
            "bgtasks_task_oldest_age_seconds", f"Age of the oldest live task{NAMES_HELP}.", labels=["manager", "name"]
        )
        for name, age in ages.items():
            family.add_metric([self._manager, name], age)
        yield family

    def _loops(self) -> Iterator[Metric]:
        loops = self._managed.loop_stats()
        if not loops:
            return
        lag = HistogramMetricFamily(
            "bgtasks_loop_lag_seconds", "Lateness of the heartbeats of watched loops.", labels=["manager"]
        )
        self._add(lag, [self._manager], *(loop["lag"] for loop in loops))
        yield lag
        mine = [self._manager]
        times, seconds = sum(loop["blocked"] for loop in loops), sum(loop["blocked_seconds"] for loop in loops)
        yield _counter("bgtasks_loop_blocks", "How often a loop was blocked.", mine, times)
        yield _counter("bgtasks_loop_blocked_seconds", "Seconds during which a loop was blocked.", mine, seconds)

    def _events(self) -> Iterator[Metric]:
        stats = [publisher.stats() for publisher in self._publishers]
        for key, text in EVENT_COUNTERS.items():
            family: Any = CounterMetricFamily(f"bgtasks_events_{key}", text, labels=["publisher"])
            yield _filled(family, stats, key)
        for key, (name, text) in EVENT_GAUGES.items():
            yield _filled(GaugeMetricFamily(f"bgtasks_events_{name}", text, labels=["publisher"]), stats, key)
        for key in ("dropped", "refused"):
            text = f"{key.capitalize()} events by reason."
            reasons = CounterMetricFamily(f"bgtasks_events_{key}", text, labels=["publisher", "reason"])
            for each in stats:
                for reason, count in each[key].items():
                    reasons.add_metric([each["name"], reason], count)
            yield reasons
        state = GaugeMetricFamily(
            "bgtasks_events_state", "1 for the state that the publisher is in.", labels=["publisher", "state"]
        )
        lag = HistogramMetricFamily(
            "bgtasks_events_lag_seconds", "From emit to delivery, as an upper bound.", labels=["publisher"]
        )
        for each in stats:
            for name in STATES:
                state.add_metric([each["name"], name], each["state"] == name)
            self._add(lag, [each["name"]], each["lag"])
        yield state
        yield lag

    def _add(self, family: Any, labels: list[str], *histograms: Histogram) -> None:
        """Add the sum of histograms, with the cumulative counts at the chosen edges."""
        counts = [0] * (len(self._edges) + 1)
        for histogram in histograms:
            for bucket, count in histogram["buckets"]:
                counts[self._place_of[bucket]] += count
        total = 0
        buckets = []
        for edge, count in zip((*map(repr, self._edges), "+Inf"), counts, strict=True):
            total += count
            buckets.append((edge, total))
        family.add_metric(labels, buckets, sum(histogram["sum_seconds"] for histogram in histograms))


def _checked(buckets: Sequence[float]) -> tuple[float, ...]:
    known = set(BUCKET_EDGES)
    for edge in buckets:
        if edge not in known:
            raise InvalidOptionError(
                f"buckets must be taken from bgtasks.BUCKET_EDGES, where the counts are exact; got {describe(edge)}"
            )
    if list(buckets) != sorted(set(buckets)):
        raise InvalidOptionError(f"buckets must ascend; got {describe(buckets)}")
    return tuple(buckets)


def _filled(family: Any, stats: Sequence[Any], key: str) -> Metric:
    for each in stats:
        family.add_metric([each["name"]], each[key])
    metric: Metric = family
    return metric


def _counter(name: str, text: str, labels: list[str], value: float) -> Metric:
    family = CounterMetricFamily(name, text, labels=["manager"])
    family.add_metric(labels, value)
    return family


def _gauge(name: str, text: str, labels: list[str], value: float) -> Metric:
    family = GaugeMetricFamily(name, text, labels=["manager"])
    family.add_metric(labels, value)
    return family
