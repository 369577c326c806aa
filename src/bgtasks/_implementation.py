"""Reads which of two twins is to run: the compiled one or the one in Python."""

from __future__ import annotations

import importlib
import os
from typing import Literal

Implementation = Literal["cython", "python"]


def choose(extension: str, what: str) -> Implementation:
    """Return the implementation that ``BGTASKS_IMPLEMENTATION`` asks for: ``auto``, ``cython`` or ``python``.

    Args:
        extension: the full name of the compiled module.
        what: what that module holds, for the error's text.

    Raises:
        ImportError: the value is unknown, or ``cython`` is demanded and the extension was not built.

    """
    choice = os.environ.get("BGTASKS_IMPLEMENTATION", "auto")
    if choice == "python":
        return "python"
    if choice not in ("auto", "cython"):
        raise ImportError(f"BGTASKS_IMPLEMENTATION={choice!r} is unknown; it takes one of: auto, cython, python")
    try:
        importlib.import_module(extension)
    except ModuleNotFoundError as error:
        # Only the missing extension is a reason for the twin; one that is there and does not load is an error.
        if error.name != extension:
            raise
        if choice == "cython":
            raise ImportError(
                f"BGTASKS_IMPLEMENTATION=cython, but the compiled {what} was not built: reinstall with a C compiler "
                "and BGTASKS_BUILD=require"
            ) from None
        return "python"
    return "cython"
