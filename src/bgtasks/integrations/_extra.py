"""The error of an integration whose framework is not installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bgtasks import errors


@contextlib.contextmanager
def extra(name: str, framework: str) -> Iterator[None]:
    """Turn the failed import of the package ``name`` into the error with the install command of its extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        # Only for the framework itself: if it misses a package of its own, its own error is better.
        if error.name is None or error.name.partition(".")[0] != name:
            raise
        raise errors.missing_extra(name, framework, f"use bgtasks.integrations.{name}") from error
