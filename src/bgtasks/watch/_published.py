"""The figures of publishers, as exporters read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

__all__ = ["Published", "figures_of"]


class Published(Protocol):
    """What exporters ask of a ``Publisher`` or a ``Fanout``."""

    def stats(self) -> Mapping[str, Any] | Sequence[Mapping[str, Any]]:
        """Return the counters; of a fanout, those of each of its publishers."""


def figures_of(publishers: Iterable[Published]) -> list[dict[str, Any]]:
    """Return the counters of each publisher, under names that differ: the second ``orders`` is ``orders (2)``."""
    found: list[dict[str, Any]] = []
    seen: Counter[str] = Counter()
    for publisher in publishers:
        stats = publisher.stats()
        for each in [stats] if isinstance(stats, Mapping) else stats:
            name = each["name"]
            seen[name] += 1
            found.append({**each, "name": name if seen[name] == 1 else f"{name} ({seen[name]})"})
    return found
