"""Options that several sinks share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from bgtasks.errors import InvalidOptionError, describe

__all__ = ["check_seconds", "longest_retry"]

DEFAULT_RETRY_FOR: Final = 60.0
# With a spool the next try may come after a restart of the process.
WITH_SPOOL: Final = 3600.0


def check_seconds(option: str, seconds: Any) -> None:
    """See that an option is a length of time.

    Raises:
        InvalidOptionError: it is not.

    """
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not is_number or not math.isfinite(seconds) or seconds <= 0:
        raise InvalidOptionError(f"{option} must be a number of seconds above 0; got {describe(seconds)}")


def longest_retry(options: Mapping[str, Any]) -> float:
    """Return a bound in seconds for the time between two tries of one batch: so long a sink has to know its id.

    Twice ``retry_for``: it counts from the end of the first try, and the last one takes its time as well.
    """
    bound = 2 * float(options.get("retry_for", DEFAULT_RETRY_FOR))
    return bound if options.get("spool") is None else max(bound, WITH_SPOOL)
