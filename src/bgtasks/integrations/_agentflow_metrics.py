"""The counters of all managers of a framework, under the names of the framework's own metrics."""

from __future__ import annotations

import weakref
from collections import Counter
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from bgtasks._locks import Lock

if TYPE_CHECKING:
    from bgtasks.manager import BackgroundTaskManager

PREFIX: Final = "background_task_manager."
# The framework counts a task that timed out as cancelled, too.
SUMS: Final[dict[str, tuple[str, ...]]] = {
    "tasks_created": ("started",),
    "tasks_completed": ("completed",),
    "tasks_failed": ("failed",),
    "tasks_cancelled": ("cancelled", "timed_out"),
    "tasks_timed_out": ("timed_out",),
    "tasks_dropped": ("dropped",),
}


class Totals:
    """The sums of the counters of all managers of one framework, collected managers included.

    The framework's counters of these names read the sums; nothing is incremented when a task starts or ends.

    Args:
        metrics: the framework's metrics module.

    """

    def __init__(self, metrics: ModuleType) -> None:
        self._metrics = metrics
        # Re-entrant: a manager may be collected, and retire, while its thread reads.
        self._lock = Lock()
        self._managers: dict[int, weakref.ref[BackgroundTaskManager]] = {}
        self._retired: Counter[str] = Counter()

    def add(self, manager: BackgroundTaskManager) -> None:
        """Include the counters of a manager from now on."""
        with self._lock:
            self._managers[id(manager)] = weakref.ref(manager)

    def retire(self, manager: BackgroundTaskManager) -> None:
        """Keep the counters of a manager that is about to be collected; do nothing for one that was never added."""
        with self._lock:
            if self._managers.pop(id(manager), None) is not None:
                self._retired.update(_counters(manager))

    def read(self) -> Counter[str]:
        """Return the sums over all managers."""
        with self._lock:
            total = Counter(self._retired)
            for reference in list(self._managers.values()):
                manager = reference()
                if manager is not None:
                    total.update(_counters(manager))
        return total

    def count(self, name: str) -> None:
        """Increment a counter of waits or shutdowns, as the framework does."""
        self._metrics.counter(PREFIX + name).inc()

    def attach(self) -> None:
        """Have the framework's counters add the sums to their own values."""
        for name, summands in SUMS.items():
            counter = self._metrics.counter(PREFIX + name)
            own = self._metrics.Counter(counter.name, counter.value)
            # The object stays the same: a program may hold it.
            counter.__class__ = _reading(self, own, summands)

    def detach(self) -> None:
        """Make the framework's counters ordinary ones again, with the values that they have now."""
        for name in SUMS:
            counter = self._metrics.counter(PREFIX + name)
            value = counter.value
            counter.__class__ = self._metrics.Counter
            counter.value = value


def _reading(totals: Totals, own: Any, summands: tuple[str, ...]) -> type:
    """Return a class of counters that count in ``own`` and show its value plus the sums of the managers."""

    def counted() -> int:
        read = totals.read()
        return sum(read[summand] for summand in summands)

    def get_value(_: Any) -> int:
        return int(own.value + counted())

    def set_value(_: Any, value: int) -> None:
        own.value = value - counted()

    def inc(_: Any, *args: Any, **kwargs: Any) -> None:
        own.inc(*args, **kwargs)

    kind = type(own)
    return type(kind.__name__, (kind,), {"value": property(get_value, set_value), "inc": inc})


def _counters(manager: BackgroundTaskManager) -> dict[str, int]:
    return {name: count for name, count in manager.stats().items() if isinstance(count, int)}
