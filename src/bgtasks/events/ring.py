"""Picks the ring: the compiled one or its Python twin, by ``BGTASKS_IMPLEMENTATION`` as ``bgtasks.registry`` does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bgtasks._implementation import choose

__all__ = ["IMPLEMENTATION", "Books", "Ring"]

IMPLEMENTATION: Final = choose("bgtasks.events._ring", "event ring")

if TYPE_CHECKING or IMPLEMENTATION == "python":
    from bgtasks.events._ring_py import Books, Ring
else:
    from bgtasks.events._ring import Books, Ring
