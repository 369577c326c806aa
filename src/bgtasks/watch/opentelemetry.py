"""OpenTelemetry: figures of managers and publishers, read when a reader collects; and spans of tasks, where wanted.

::

    from bgtasks.watch.opentelemetry import instrument, trace

    instrument(manager, publishers=[publisher])
    trace(manager)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

from bgtasks.watch._extra import extra

with extra("otel", "opentelemetry", "opentelemetry-api", "export figures to OpenTelemetry"):
    from opentelemetry.metrics import CallbackOptions, Meter, Observation, get_meter

from bgtasks.watch._published import Published, checked_manager, checked_publishers, encodable, figures_of

# Below the check for the extra, which it needs, too.
from bgtasks.watch._spans import SpanParent, trace

if TYPE_CHECKING:
    from bgtasks.info import LoopStats, ManagerStats, NameHistograms

__all__ = ["Counted", "Published", "SpanParent", "instrument", "trace"]

OUTCOMES: Final = ("completed", "failed", "cancelled", "timed_out", "abandoned")
# The unit and the description of each.
EVENT_COUNTERS: Final = {
    "accepted": ("{event}", "Accepted events."),
    "delivered": ("{event}", "Delivered events."),
    "retried": ("{try}", "Further tries of batches."),
}
EVENT_GAUGES: Final = {
    "queue_events": ("queued", "Events in the queue and in flight."),
    "spooled": ("spooled", "Events in the spool."),
}

Observe = Callable[[], Iterator[Observation]]


class Counted(Protocol):
    """What the instruments ask of a manager."""

    def stats(self) -> ManagerStats:
        """Return the counters."""

    def histograms(self) -> dict[str, NameHistograms]:
        """Return the durations and waits by name."""

    def loop_stats(self) -> list[LoopStats]:
        """Return the figures of watched loops."""


def instrument(
    manager: Counted, *, publishers: Iterable[Published] = (), meter: Meter | None = None, name: str = "default"
) -> None:
    """Make observable counters and gauges of a manager and of publishers.

    They are read when a reader of the meter's provider collects; a task costs nothing more. OpenTelemetry has no
    observable histogram: of durations, waits and lags there are only the sums. Have its collector scrape
    ``bgtasks.watch.prometheus`` for the histograms.

    Args:
        manager: the manager; kept alive by the meter.
        publishers: publishers whose figures to export, by their names; of a ``Fanout``, each of its publishers. A
            second one of the same name is called ``name (2)``.
        meter: where to make the instruments; one of the global provider by default.
        name: the attribute ``bgtasks.manager`` of all figures of this manager.

    Raises:
        InvalidOptionError: ``manager`` is no manager, or ``publishers`` are none.
        MissingExtraError: on import, if ``opentelemetry-api`` is not installed.

    Example:
        >>> manager = bgtasks.BackgroundTaskManager()
        >>> instrument(manager)

    """
    meter = get_meter("bgtasks") if meter is None else meter
    published = checked_publishers(publishers)
    _make_tasks(meter, checked_manager(manager), {"bgtasks.manager": name})
    if published:
        _make_events(meter, published)


def _make_tasks(meter: Meter, manager: Counted, mine: Mapping[str, str]) -> None:
    def of_names(*keys: str, attribute: str | None = None) -> Observe:
        def observe() -> Iterator[Observation]:
            for task, stats in manager.stats()["names"].items():
                figures: Mapping[str, Any] = stats
                for key in keys:
                    extra = {} if attribute is None else {attribute: key}
                    yield Observation(figures[key], {**mine, "bgtasks.task.name": encodable(task), **extra})

        return observe

    def of_histograms(key: str) -> Observe:
        def observe() -> Iterator[Observation]:
            for task, histograms in manager.histograms().items():
                figures: Mapping[str, Any] = histograms
                yield Observation(figures[key]["sum_seconds"], {**mine, "bgtasks.task.name": encodable(task)})

        return observe

    def of_manager(key: str) -> Observe:
        def observe() -> Iterator[Observation]:
            figures: Mapping[str, Any] = manager.stats()
            yield Observation(figures[key], mine)

        return observe

    def of_loops(key: str) -> Observe:
        def observe() -> Iterator[Observation]:
            loops: list[Any] = list(manager.loop_stats())
            if loops:
                yield Observation(sum(loop[key] for loop in loops), mine)

        return observe

    _counter(meter, "bgtasks.task.started", "{task}", "Started tasks.", of_names("started"))
    ended = of_names(*OUTCOMES, attribute="bgtasks.task.outcome")
    _counter(meter, "bgtasks.task.finished", "{task}", "Ended tasks.", ended)
    _counter(meter, "bgtasks.task.dropped", "{task}", "Coroutines dropped at the limit.", of_manager("dropped"))
    _counter(meter, "bgtasks.task.duration.sum", "s", "Durations of ended tasks.", of_histograms("duration"))
    _counter(meter, "bgtasks.task.wait.sum", "s", "Waits from creation to the first step.", of_histograms("wait"))
    _gauge(meter, "bgtasks.task.active", "{task}", "Live tasks.", of_names("in_flight"))
    _gauge(meter, "bgtasks.task.queued", "{task}", "Tasks that wait for a slot.", of_manager("queued"))
    _gauge(meter, "bgtasks.task.waiting", "{task}", "Tasks that wait for their next attempt.", of_manager("waiting"))
    _counter(meter, "bgtasks.task.retried", "{attempt}", "Attempts after the first ones.", of_manager("retried"))
    given_up = of_manager("given_up")
    _counter(meter, "bgtasks.service.given_up", "{service}", "Services that are not restarted any more.", given_up)
    _counter(meter, "bgtasks.loop.blocks", "{block}", "How often a loop was blocked.", of_loops("blocked"))
    _counter(
        meter, "bgtasks.loop.blocked", "s", "Seconds during which a loop was blocked.", of_loops("blocked_seconds")
    )


def _make_events(meter: Meter, publishers: tuple[Published, ...]) -> None:
    def of(key: str) -> Observe:
        def observe() -> Iterator[Observation]:
            for stats in figures_of(publishers):
                yield Observation(stats[key], {"bgtasks.publisher": stats["name"]})

        return observe

    def observe_lags() -> Iterator[Observation]:
        for stats in figures_of(publishers):
            yield Observation(stats["lag"]["sum_seconds"], {"bgtasks.publisher": stats["name"]})

    def by_reason(key: str) -> Observe:
        def observe() -> Iterator[Observation]:
            for stats in figures_of(publishers):
                for reason, count in stats[key].items():
                    yield Observation(count, {"bgtasks.publisher": stats["name"], "bgtasks.event.reason": reason})

        return observe

    for key, (unit, text) in EVENT_COUNTERS.items():
        _counter(meter, f"bgtasks.event.{key}", unit, text, of(key))
    _counter(meter, "bgtasks.event.lag.sum", "s", "Times from emit to delivery.", observe_lags)
    for key, (name, text) in EVENT_GAUGES.items():
        _gauge(meter, f"bgtasks.event.{name}", "{event}", text, of(key))
    for key in ("dropped", "refused"):
        _counter(meter, f"bgtasks.event.{key}", "{event}", f"{key.capitalize()} events by reason.", by_reason(key))


def _counter(meter: Meter, name: str, unit: str, text: str, observe: Observe) -> None:
    meter.create_observable_counter(name, [_callback(observe)], unit=unit, description=text)


def _gauge(meter: Meter, name: str, unit: str, text: str, observe: Observe) -> None:
    meter.create_observable_up_down_counter(name, [_callback(observe)], unit=unit, description=text)


def _callback(observe: Observe) -> Callable[[CallbackOptions], Iterable[Observation]]:
    return lambda options: observe()
