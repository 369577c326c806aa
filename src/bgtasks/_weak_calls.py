"""Functions to call with an object later, if it still exists."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

__all__ = ["WeakCalls"]

Function = TypeVar("Function", bound=Callable[..., Any])


class WeakCalls(Generic[Function]):
    """Remembers one function per object, and keeps no object alive.

    Objects are told apart by identity: a user's class may be unhashable, or its objects equal. ``weakref.WeakMethod``
    would not do: its callback prints a traceback if the interpreter, at its end, destroys the object before the method.
    """

    def __init__(self) -> None:
        self._calls: dict[int, tuple[weakref.ref[Any], Function]] = {}

    def add(self, owner: object, function: Function) -> None:
        """Remember a function for an object."""
        key = id(owner)
        # Bound here: at the interpreter's end the module's names may be gone.
        forget = self._calls.pop
        self._calls[key] = (weakref.ref(owner, lambda _: forget(key, None)), function)

    def living(self) -> list[tuple[Any, Function]]:
        """Return the objects that still exist, each with its function, in the order in which they were added."""
        pairs = [(reference(), function) for reference, function in list(self._calls.values())]
        return [(owner, function) for owner, function in pairs if owner is not None]
