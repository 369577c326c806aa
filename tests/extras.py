"""Packages that only an extra brings along: a test that needs one is skipped without it, unless it has to run."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest


def needed(package: str) -> ModuleType:
    """Import a package; without it skip the calling module, or fail it if ``BGTASKS_REQUIRE`` names the package.

    ``BGTASKS_REQUIRE`` is a list with commas, of the packages that must not be missing here.
    """
    if package in os.environ.get("BGTASKS_REQUIRE", "").split(","):
        return importlib.import_module(package)
    return pytest.importorskip(package, reason=f"{package} is not installed")
