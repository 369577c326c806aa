"""Checks of arguments: numbers, durations, choices. Every option of the package is checked here.

Durations are in seconds and finite; None means "no limit" where an option allows it. A bool is not a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bgtasks.errors import BgtasksError, InvalidOptionError, describe

__all__ = [
    "check_callable",
    "check_choice",
    "check_count",
    "check_flag",
    "check_limit",
    "check_optional_seconds",
    "check_seconds",
]


def check_count(option: str, value: object, least: int = 0) -> int:
    """Return ``value`` if it is a whole number of at least ``least``.

    Raises:
        InvalidOptionError: it is not.

    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidOptionError(f"{option} must be a whole number, {least} or more; got {describe(value)}")
    return value


def check_limit(option: str, value: object, least: int = 1) -> int | None:
    """Return ``value`` if it is a whole number of at least ``least``, or None for no limit.

    Raises:
        InvalidOptionError: it is neither.

    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidOptionError(
            f"{option} must be a whole number, {least} or more, or None for no limit; got {describe(value)}"
        )
    return value


def check_seconds(
    option: str, value: object, *, positive: bool = False, error: type[BgtasksError] = InvalidOptionError
) -> float:
    """Return ``value`` if it is a finite number of seconds: 0 or more, or more than 0 if ``positive``.

    Raises:
        BgtasksError: it is not; an error of the class ``error``.

    """
    seconds = as_seconds(value)
    if seconds is None or (positive and seconds == 0):
        least = "greater than 0" if positive else "0 or more"
        raise error(f"{option} must be a finite number of seconds, {least}; got {describe(value)}")
    return seconds


def check_optional_seconds(option: str, value: object, *, none: str = "for no limit") -> float | None:
    """Return ``value`` if it is a finite number of seconds, greater than 0, or None; ``none`` says what None means.

    Raises:
        InvalidOptionError: it is neither.

    """
    seconds = None if value is None else as_seconds(value)
    if value is not None and not seconds:
        raise InvalidOptionError(
            f"{option} must be a finite number of seconds, greater than 0, or None {none}; got {describe(value)}"
        )
    return seconds


def as_seconds(value: Any) -> float | None:
    """Return ``value`` as a float if it is a finite number of seconds, 0 or more; else None."""
    if isinstance(value, (bool, str, bytes)):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if 0 <= seconds < math.inf else None


def check_choice(option: str, value: object, choices: Sequence[str], advice: str = "") -> None:
    """Check that ``value`` is one of the choices; ``advice`` ends the text of the error.

    Raises:
        InvalidOptionError: it is not.

    """
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise InvalidOptionError(f"{option} must be one of {listed}; got {describe(value)}{advice and '; '}{advice}")


def check_flag(option: str, value: object, *, optional: bool = False) -> None:
    """Check that ``value`` is True or False, or None if it is ``optional``.

    Raises:
        InvalidOptionError: it is neither.

    """
    if not isinstance(value, bool) and not (optional and value is None):
        raise InvalidOptionError(f"{option} must be True or False{', or None' * optional}; got {describe(value)}")


def check_callable(option: str, value: object) -> None:
    """Check that ``value`` is callable or None.

    Raises:
        InvalidOptionError: it is neither.

    """
    if value is not None and not callable(value):
        raise InvalidOptionError(f"{option} must be callable, or None; got {describe(value)}")
