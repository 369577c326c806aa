"""The error of an exporter whose package is not installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bgtasks.errors import missing_extra

__all__ = ["extra"]


@contextlib.contextmanager
def extra(name: str, package: str, distribution: str, purpose: str) -> Iterator[None]:
    """Turn the failed import of a package into the error with the install command of its extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        # Only for the package itself: if it misses one of its own, its own error is better.
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise missing_extra(name, distribution, purpose) from error
