"""Packages that some tests need: imported where they are installed, demanded where the environment says so."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest


def need(name: str) -> ModuleType:
    """Return the package; where it is missing, skip the calling module or test.

    ``BGTASKS_REQUIRE``, a list with commas, names the packages that must be there: missing, they are an error. A part
    of a package stands there under the name of the package: ``need("aiohttp.web")`` is demanded by ``aiohttp``.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        if package in {entry.strip() for entry in os.environ.get("BGTASKS_REQUIRE", "").split(",")}:
            raise
        pytest.skip(f"{package} is not installed", allow_module_level=True)
