"""How many tasks of a name or a key run at once, and how many begin in a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bgtasks._checks import as_seconds, check_count, check_limit, check_seconds
from bgtasks.errors import InvalidOptionError, describe

__all__ = ["Limit", "Rate", "check_limits", "check_rate", "timing_of"]


@dataclass(frozen=True, slots=True)
class Rate:
    """How many tasks begin in a time; the others wait in order, shown as queued.

    The rule is the generic cell rate algorithm of ATM networks (ITU-T I.371), which spaces the starts evenly, without a
    window whose edges let twice as many through. In ``t`` seconds at most ``burst + t * count / per`` tasks begin.

    Args:
        count: how many tasks begin per ``per`` seconds, > 0.
        per: that time in seconds, > 0.
        burst: how many may begin at once after a pause, 1 or more.

    Raises:
        InvalidOptionError: an argument has an invalid value.

    Example:
        >>> Rate(100, per=60.0, burst=20)
        Rate(count=100, per=60.0, burst=20)

    """

    count: float
    per: float = 1.0
    burst: int = 1

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not as_seconds(self.count):
            raise InvalidOptionError(f"count must be a finite number, greater than 0; got {describe(self.count)}")
        check_seconds("per", self.per, positive=True)
        check_count("burst", self.burst, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What the tasks of one name or one key have to wait for.

    Args:
        concurrency: how many of them run at once; None for no limit.
        rate: how many of them begin in a time; None for no limit.

    Raises:
        InvalidOptionError: an argument has an invalid value, or both are None.

    Example:
        >>> Limit(concurrency=10, rate=Rate(50))
        Limit(concurrency=10, rate=Rate(count=50, per=1.0, burst=1))

    """

    concurrency: int | None = None
    rate: Rate | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_limit("concurrency", self.concurrency)
        check_rate(self.rate)
        if self.concurrency is None and self.rate is None:
            raise InvalidOptionError("a Limit limits something: pass concurrency=, rate= or both")


def check_rate(rate: object) -> None:
    """Refuse what is neither a ``Rate`` nor None.

    Raises:
        InvalidOptionError: it is something else.

    """
    if rate is not None and not isinstance(rate, Rate):
        raise InvalidOptionError(f"rate must be a bgtasks.Rate, such as Rate(100, per=1.0); got {describe(rate)}")


def check_limits(limits: object) -> None:
    """Refuse what is neither a mapping to ``Limit`` objects nor None.

    Raises:
        InvalidOptionError: it is something else.

    """
    if limits is None:
        return
    if not isinstance(limits, Mapping):
        raise InvalidOptionError(f"limits must be a mapping of names and keys to bgtasks.Limit; got {describe(limits)}")
    for name, limit in limits.items():
        if not isinstance(limit, Limit):
            raise InvalidOptionError(f"limits[{describe(name)}] must be a bgtasks.Limit; got {describe(limit)}")


def timing_of(rate: Rate | None) -> tuple[float, float]:
    """Return the seconds between two starts, 0 for no rate, and how many seconds one may come early."""
    if rate is None:
        return 0.0, 0.0
    interval = rate.per / rate.count
    return interval, interval * (rate.burst - 1)
