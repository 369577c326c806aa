"""References to a class or a function in a running program: modules, injection defaults, containers."""

# ruff: noqa: SLF001  InjectQ keeps its resolved values in private attributes

from __future__ import annotations

import gc
import sys
from types import ModuleType
from typing import Any

__all__ = ["bind", "rebind_names", "replace_class"]


def replace_class(old: type, new: type) -> None:
    """Replace a class in every module, ``Inject`` default and container."""
    import injectq

    rebind_names(old, new)
    for thing in gc.get_objects():
        # By type(), never isinstance: that would resolve the default.
        kind = type(thing)
        if kind is injectq.Inject and vars(thing).get("service_type") is old:
            thing.service_type = new
            thing._injected_value = None
        elif kind is injectq.InjectQ and thing.has(old) and not thing.has(new):
            bind(thing, new, thing.get(old))


def rebind_names(old: object, new: object) -> None:
    """Replace an object in the namespace of every module."""
    for module in list(sys.modules.values()):
        # getattr() would load a lazy module; objects in there that are not modules are left alone.
        if issubclass(type(module), ModuleType):
            namespace = object.__getattribute__(module, "__dict__")
            for name, value in list(namespace.items()):
                if value is old:
                    namespace[name] = new


def bind(container: Any, kind: type, thing: object) -> None:
    from injectq import ScopeType

    # InjectQ's singleton scope would keep returning the first graph's object after the second graph bound its own.
    container.bind(kind, thing, scope=ScopeType.TRANSIENT, allow_concrete=False)
