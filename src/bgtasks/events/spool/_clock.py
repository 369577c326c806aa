"""The age of a batch, by a clock that nobody sets.

Within one boot of the machine the time since the boot counts, in whatever process a batch was written. Only a batch
from before a restart of the machine needs the system's clock, and that counts within bounds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from bgtasks.events.spool._row import Row

__all__ = ["BOOT", "AgeClock", "uptime"]


def _boot() -> int:
    """Return a number that tells one boot of the machine from another."""
    try:
        return int(Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")[:15], 16)
    except (OSError, ValueError):
        # Unknown: each process counts as a boot of its own.
        return random.SystemRandom().getrandbits(60)


BOOT: Final = _boot()

if hasattr(time, "CLOCK_BOOTTIME"):
    # The sleep of the machine counts.
    uptime: Callable[[], float] = partial(time.clock_gettime, time.CLOCK_BOOTTIME)
else:
    uptime = time.monotonic


class AgeClock:
    """Tells the ages of the rows of one file.

    Args:
        newest: the newest row of a file that was left behind, None for a file of this process.
        most_downtime: the maximum number of seconds that count for the time between an earlier boot and this one. The
            system's clock may have been set in between, so a longer time is not believed.

    """

    def __init__(self, newest: Row | None = None, most_downtime: float = 0.0) -> None:
        self._newest = None
        self._opened = uptime()
        self._downtime = 0.0
        if newest is not None and (newest.boot != BOOT or newest.uptime > self._opened):
            self._newest = newest
            self._downtime = min(max(time.time() - newest.created, 0.0), most_downtime)

    def age(self, row: Row) -> float:
        """Return the seconds since a row was written."""
        if self._newest is None:
            return uptime() - row.uptime
        return self._newest.uptime - row.uptime + self._downtime + uptime() - self._opened
