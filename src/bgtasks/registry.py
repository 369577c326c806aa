"""Picks the registry: the compiled one or its Python twin.

``BGTASKS_IMPLEMENTATION`` chooses: ``auto`` (the default) takes the compiled one where it was built and a GIL is on,
``cython`` demands it, ``python`` takes the twin. ``IMPLEMENTATION`` says which one runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bgtasks._implementation import choose

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

IMPLEMENTATION: Final = choose("bgtasks._registry", "registry")

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
