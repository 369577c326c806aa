"""The options of a manager: their types and their checks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, TypedDict, get_args

from bgtasks._checks import check_callable, check_choice, check_count, check_flag, check_limit, check_seconds
from bgtasks.errors import InvalidOptionError
from bgtasks.info import TaskInfo, TaskOverflow, TimeoutPolicy

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


# The values of an option, and advice for those who give another one.
_CHOICES: Final = {
    "overflow": (get_args(TaskOverflow), "to wait for capacity, await spawn()"),
    "timeouts": (get_args(TimeoutPolicy), ""),
}


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
        match option:
            case "default_shutdown_timeout" | "drain_timeout":
                check_seconds(option, value)
            case "max_pending_tasks" | "max_concurrency":
                check_limit(option, value)
            case "overflow" | "timeouts":
                check_choice(option, value, *_CHOICES[option])
            case "on_error":
                check_callable(option, value)
            case "history":
                check_count(option, value)
            case "track_origin" | "watch":
                check_flag(option, value, optional=option == "watch")
            case _:
                known = ", ".join(ManagerOptions.__annotations__)
                raise TypeError(f"BackgroundTaskManager has no option {option!r}; it has: {known}")
