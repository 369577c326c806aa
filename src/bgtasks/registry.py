"""Picks the registry: the compiled one or its Python twin.

``BGTASKS_IMPLEMENTATION`` chooses: ``auto`` (the default) takes the compiled one where it was built, ``cython`` demands
it, ``python`` takes the twin. ``IMPLEMENTATION`` says which one runs.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, Literal

__all__ = [
    "CANCEL_ON_EXIT",
    "DEFAULT_NAME",
    "IMPLEMENTATION",
    "MAX_NAMES",
    "OTHER_NAMES",
    "RERAISE_ON_EXIT",
    "Record",
    "Registry",
]


def _choose() -> Literal["cython", "python"]:
    """Return the name of the implementation to load."""
    choice = os.environ.get("BGTASKS_IMPLEMENTATION", "auto")
    if choice == "python":
        return "python"
    if choice not in ("auto", "cython"):
        raise ImportError(f"BGTASKS_IMPLEMENTATION={choice!r} is unknown; it takes one of: auto, cython, python")
    try:
        import bgtasks._registry  # noqa: F401
    except ModuleNotFoundError as error:
        # Only the missing extension is a reason for the twin; one that is there and does not load is an error.
        if error.name != "bgtasks._registry":
            raise
        if choice == "cython":
            raise ImportError(
                "BGTASKS_IMPLEMENTATION=cython, but the compiled registry was not built: reinstall with a C compiler "
                "and BGTASKS_BUILD=require"
            ) from None
        return "python"
    return "cython"


IMPLEMENTATION: Final = _choose()

if TYPE_CHECKING or IMPLEMENTATION == "python":
    from bgtasks._registry_py import (
        CANCEL_ON_EXIT,
        DEFAULT_NAME,
        MAX_NAMES,
        OTHER_NAMES,
        RERAISE_ON_EXIT,
        Record,
        Registry,
    )
else:
    from bgtasks._registry import (
        CANCEL_ON_EXIT,
        DEFAULT_NAME,
        MAX_NAMES,
        OTHER_NAMES,
        RERAISE_ON_EXIT,
        Record,
        Registry,
    )
