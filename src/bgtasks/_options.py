"""The options of a manager: their types and their checks."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from typing import Final, TypedDict, get_args

from bgtasks._checks import check_callable, check_choice, check_count, check_flag, check_limit, check_seconds
from bgtasks.errors import InvalidOptionError
from bgtasks.info import TaskInfo, TaskOverflow, TimeoutPolicy
from bgtasks.policies._limits import Limit, Rate, check_limits, check_rate

__all__ = ["ManagerOptions", "check_options", "is_watched"]


class ManagerOptions(TypedDict, total=False):
    """The options of ``BackgroundTaskManager``, for functions that make one."""

    default_shutdown_timeout: float
    max_pending_tasks: int | None
    overflow: TaskOverflow
    max_concurrency: int | None
    drain_timeout: float
    on_error: Callable[[TaskInfo, BaseException], object] | None
    history: int
    timeouts: TimeoutPolicy
    track_origin: bool
    watch: bool | None
    rate: Rate | None
    limits: Mapping[Hashable, Limit] | None


def is_watched(watch: bool | None) -> bool:
    """Return the option ``watch``, or what ``BGTASKS_WATCH`` says if it is None.

    Raises:
        InvalidOptionError: the variable has another value than ``0`` and ``1``.

    """
    variable = os.environ.get("BGTASKS_WATCH", "0")
    if variable not in ("0", "1"):
        raise InvalidOptionError(f"BGTASKS_WATCH must be 0 or 1; got {variable!r}")
    return variable == "1" if watch is None else watch


def check_options(options: ManagerOptions) -> None:
    """Check the given options.

    Raises:
        InvalidOptionError: an option has an invalid value.
        TypeError: a manager has no such option.

    """
    for option, value in options.items():
        check = CHECKS.get(option)
        if check is None:
            known = ", ".join(ManagerOptions.__annotations__)
            raise TypeError(f"BackgroundTaskManager has no option {option!r}; it has: {known}")
        check(option, value)


def _check_overflow(option: str, value: object) -> None:
    check_choice(option, value, get_args(TaskOverflow), "to wait for capacity, await spawn()")


# How each option is checked.
CHECKS: Final[Mapping[str, Callable[[str, object], object]]] = {
    "default_shutdown_timeout": check_seconds,
    "max_pending_tasks": check_limit,
    "overflow": _check_overflow,
    "max_concurrency": check_limit,
    "drain_timeout": check_seconds,
    "on_error": check_callable,
    "history": check_count,
    "timeouts": lambda option, value: check_choice(option, value, get_args(TimeoutPolicy)),
    "track_origin": check_flag,
    "watch": lambda option, value: check_flag(option, value, optional=True),
    "rate": lambda _, value: check_rate(value),
    "limits": lambda _, value: check_limits(value),
}
