"""What exporters have in common: the figures of publishers, names that can be sent, and checks of arguments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from bgtasks.errors import InvalidOptionError, describe

__all__ = ["Published", "checked_manager", "checked_publishers", "encodable", "figures_of"]


Manager = TypeVar("Manager")


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
            name = encodable(each["name"])
            seen[name] += 1
            found.append({**each, "name": name if seen[name] == 1 else f"{name} ({seen[name]})"})
    return found


def encodable(text: str) -> str:
    """Return a text that UTF-8 can encode: a lone surrogate, as in names of files, is written as its number."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def checked_manager(manager: Manager) -> Manager:
    """Return a manager.

    Raises:
        InvalidOptionError: it is none.

    """
    # Not by isinstance: the tests run a copy of the manager on each twin.
    if not hasattr(manager, "_live_records"):
        raise InvalidOptionError(f"manager must be a BackgroundTaskManager; got {describe(manager)}")
    return manager


def checked_publishers(publishers: Iterable[Published]) -> tuple[Published, ...]:
    """Return publishers.

    Raises:
        InvalidOptionError: they are none.

    """
    found = tuple(publishers) if isinstance(publishers, Iterable) else None
    if found is None or not all(hasattr(each, "stats") for each in found):
        raise InvalidOptionError(f"publishers must be a list such as [publisher]; got {describe(publishers)}")
    return found
