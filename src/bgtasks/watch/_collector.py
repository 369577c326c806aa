"""The figures of a manager and of publishers as metrics of Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from bgtasks._statistics import BUCKET_EDGES, MAX_NAMES, OTHER_NAMES
from bgtasks.errors import InvalidOptionError, describe
from bgtasks.watch._exposition import AGE, DURATION, ENDED, HELP, OUTCOMES, STARTED, WAIT, Edges, NamedText
from bgtasks.watch._published import Published, checked_manager, checked_publishers, encodable, figures_of

if TYPE_CHECKING:
    from bgtasks._statistics import NameTotals
    from bgtasks.info import Histogram, LoopStats
    from bgtasks.registry import Record

__all__ = ["OCTAVES", "Collector", "Managed"]

# The powers of two of a microsecond from 256 microseconds to 9.5 hours: edges of the buckets, so the counts are exact.
OCTAVES: Final = tuple(2.0**power * 1e-6 for power in range(8, 36))

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

    @property
    def dropped_count(self) -> int:
        """The number of dropped coroutines."""

    def loop_stats(self) -> list[LoopStats]:
        """Return the figures of watched loops."""

    def _merged(self) -> tuple[NameTotals, int, int]:
        """Return the counters by name, and the numbers of queued and of waiting tasks."""

    def _policy_counters(self) -> tuple[int, int]:
        """Return how many attempts followed a first one, and how many services were given up."""

    def _live_records(self) -> list[Record]:
        """Return the records of the live tasks."""


class Collector:
    """Reads the figures of a manager on each scrape, for ``metrics_app``, ``render`` or a registry.

    Labels are names of tasks, outcomes and reasons; never an id, a context, a host or a process. Several managers can
    be on one page if each has a collector with a ``manager`` of its own.

    Args:
        managed: the manager.
        manager: the value of the label ``manager``.
        publishers: publishers whose figures to export, labelled by their names; of a ``Fanout``, each of its
            publishers. A second one of the same name is labelled ``name (2)``; in different collectors, they need
            different names.
        buckets: the upper edges of the exported buckets in seconds, ascending; each one of ``bgtasks.BUCKET_EDGES``,
            because only there are the counts exact. By default the powers of two from 256 microseconds to 9.5 hours.

    Raises:
        InvalidOptionError: an argument has an invalid value; ``buckets`` one that is no edge, or they do not ascend.
        MissingExtraError: on import, if ``prometheus_client`` is not installed.

    Example:
        >>> from bgtasks.watch.prometheus import metrics_app
        >>> manager = bgtasks.BackgroundTaskManager()
        >>> application = metrics_app(Collector(manager, buckets=bgtasks.BUCKET_EDGES[65::16]))

    """

    def __init__(
        self,
        managed: Managed,
        *,
        manager: str = "default",
        publishers: Iterable[Published] = (),
        buckets: Sequence[float] = OCTAVES,
    ) -> None:
        if not isinstance(manager, str):
            raise InvalidOptionError(f"manager is the text of a label; got {describe(manager)}")
        self.manager: str = encodable(manager)
        self._managed = checked_manager(managed)
        self._publishers = checked_publishers(publishers)
        self._edges = Edges(_checked(buckets))
        self._text = NamedText(manager, self._edges)

    def describe(self) -> list[Metric]:
        """Return no names: with them, a registry would refuse a second manager."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read the figures, as a registry asks for them."""
        totals, *idle = self._managed._merged()  # noqa: SLF001  the interface of the cold half
        yield from self._named(totals)
        yield from self._unnamed(totals, *idle)

    def texts(self) -> tuple[dict[bytes, list[bytes]], Iterator[Metric]]:
        """Return the figures by name as text, for each metric; and the other figures."""
        totals, *idle = self._managed._merged()  # noqa: SLF001  as above
        return self._text.families(totals.items(), self._ages()), self._unnamed(totals, *idle)

    def _named(self, totals: NameTotals) -> Iterator[Metric]:
        """Yield the figures by name."""
        labels = ["manager", "name"]
        started = CounterMetricFamily(STARTED, HELP[STARTED], labels=labels)
        ended = CounterMetricFamily(ENDED, HELP[ENDED], labels=[*labels, "outcome"])
        durations = HistogramMetricFamily(DURATION, HELP[DURATION], labels=labels)
        waits = HistogramMetricFamily(WAIT, HELP[WAIT], labels=labels)
        oldest = GaugeMetricFamily(AGE, HELP[AGE], labels=labels)
        for name, figures in totals.items():
            mine = [self.manager, encodable(name)]
            started.add_metric(mine, figures.started)
            for outcome, count in zip(OUTCOMES, figures.counts[1:], strict=True):
                ended.add_metric([*mine, outcome], count)
            histograms = figures.histograms()
            self._add(durations, mine, histograms["duration"])
            self._add(waits, mine, histograms["wait"])
        for name, age in self._ages().items():
            oldest.add_metric([self.manager, encodable(name)], age)
        yield from (started, ended, durations, waits, oldest)

    def _unnamed(self, totals: NameTotals, queued: int, waiting: int) -> Iterator[Metric]:
        """Yield all other figures."""
        mine = [self.manager]
        running = totals.counters()["in_flight"] - queued - waiting
        retried, given_up = self._managed._policy_counters()  # noqa: SLF001  as above
        dropped = self._managed.dropped_count
        yield _counter("bgtasks_tasks_dropped", "Coroutines that were dropped at the limit.", mine, dropped)
        yield _gauge("bgtasks_tasks_running", "Tasks that run.", mine, running)
        yield _gauge("bgtasks_tasks_queued", "Tasks that wait for a concurrency slot.", mine, queued)
        yield _gauge("bgtasks_tasks_waiting", "Tasks that wait for their next attempt.", mine, waiting)
        yield _counter("bgtasks_tasks_retried", "Attempts after the first ones.", mine, retried)
        yield _counter("bgtasks_services_given_up", "Services that are not restarted any more.", mine, given_up)
        yield from self._loops()
        if self._publishers:
            yield from self._events()

    def _ages(self) -> dict[str, float]:
        """Return the age of the oldest live task by name."""
        ages: dict[str, float] = {}
        for record in self._managed._live_records():  # noqa: SLF001  as above
            name = record.name if record.name in ages or len(ages) < MAX_NAMES else OTHER_NAMES
            ages[name] = max(ages.get(name, 0.0), record.duration)
        return ages

    def _loops(self) -> Iterator[Metric]:
        loops = self._managed.loop_stats()
        if not loops:
            return
        lag = HistogramMetricFamily(
            "bgtasks_loop_lag_seconds", "Lateness of the heartbeats of watched loops.", labels=["manager"]
        )
        self._add(lag, [self.manager], *(loop["lag"] for loop in loops))
        yield lag
        mine = [self.manager]
        times, seconds = sum(loop["blocked"] for loop in loops), sum(loop["blocked_seconds"] for loop in loops)
        yield _counter("bgtasks_loop_blocks", "How often a loop was blocked.", mine, times)
        yield _counter("bgtasks_loop_blocked_seconds", "Seconds during which a loop was blocked.", mine, seconds)

    def _events(self) -> Iterator[Metric]:
        stats = figures_of(self._publishers)
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
        counts = accumulate(self._edges.counts(*(histogram["buckets"] for histogram in histograms)))
        total = sum(histogram["sum_seconds"] for histogram in histograms)
        family.add_metric(labels, list(zip(self._edges.labels, counts, strict=True)), total)


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
