"""Both twins in one process: the manager's module loaded once on each registry."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

MODULES = {"cython": "bgtasks._registry", "python": "bgtasks._registry_py"}


def registry_module(twin: str) -> ModuleType:
    """Return the registry of a twin; a compiled one that was not built is an error, not a second run of the other."""
    return importlib.import_module(MODULES[twin])


@cache
def manager_module(twin: str) -> ModuleType:
    """Return a copy of ``bgtasks.manager`` whose class derives from the registry of ``twin``."""
    chosen: Any = SimpleNamespace(**vars(registry_module(twin)))
    spec = importlib.util.find_spec("bgtasks.manager")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    importlib.import_module("bgtasks.registry")
    usual = sys.modules["bgtasks.registry"]
    sys.modules["bgtasks.registry"] = chosen
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules["bgtasks.registry"] = usual
    return module
