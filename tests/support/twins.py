"""Both twins in one process: the modules of registry and manager, loaded once per twin."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

MODULES = {"cython": "bgtasks._registry", "python": "bgtasks._registry_py"}


def twins_chosen(config: Any) -> list[str]:
    """Return the names of the twins to test."""
    return list(MODULES) if config.option.twin == "both" else [config.option.twin]


def core_module(twin: str) -> ModuleType:
    """Return the hot half of a twin; a compiled one that was not built is an error, and not replaced by the other."""
    return importlib.import_module(MODULES[twin])


@cache
def registry_module(twin: str) -> ModuleType:
    """Return a copy of ``bgtasks.registry`` whose class derives from the hot half of ``twin``."""
    core_module(twin)
    chooser: Any = SimpleNamespace(choose=lambda extension, what: twin)
    return _copy("bgtasks.registry", {"bgtasks._implementation": chooser})


@cache
def manager_module(twin: str) -> ModuleType:
    """Return a copy of ``bgtasks.manager`` whose class derives from the registry on ``twin``."""
    return _copy(
        "bgtasks.manager", {"bgtasks.registry": registry_module(twin), "bgtasks._shutdown": shutdown_module(twin)}
    )


@cache
def shutdown_module(twin: str) -> ModuleType:
    """Return the copy of ``bgtasks._shutdown`` that the manager on ``twin`` uses."""
    return _copy("bgtasks._shutdown", {"bgtasks.registry": registry_module(twin)})


@cache
def framework_manager_module(twin: str) -> ModuleType:
    """Return a copy of the manager for agent frameworks whose class derives from the manager on ``twin``."""
    return _copy("bgtasks.integrations._agentflow_manager", {"bgtasks.manager": manager_module(twin)})


def _copy(name: str, others: dict[str, Any]) -> ModuleType:
    """Load a module once more, with some of its imports replaced."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    usual = {other: importlib.import_module(other) for other in others}
    sys.modules.update(others)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules.update(usual)
    return module
