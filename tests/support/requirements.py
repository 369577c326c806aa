"""What some tests need: packages and programs, used if they are installed, required if the environment says so."""

from __future__ import annotations

import importlib
import os
import shutil
from types import ModuleType

import pytest

# By the name of a sink's module, what it imports.
CLIENTS = {
    "kafka": "confluent_kafka",
    "nats": "nats",
    "otlp": "opentelemetry.exporter.otlp.proto.http",
    "rabbitmq": "aio_pika",
    "redis": "redis",
}


def need(name: str) -> ModuleType:
    """Return the package; if it is missing, skip the calling module or test.

    ``BGTASKS_REQUIRE``, a list separated by commas, names the packages that are required: a missing one is an error. It
    has the name of the package for all of its modules: ``aiohttp`` requires ``need("aiohttp.web")``.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        if _is_required(package):
            raise
        pytest.skip(f"{package} is not installed", allow_module_level=True)


def need_program(*names: str) -> str:
    """Return the path of the first of these programs that is installed; if none is, skip the calling test.

    ``BGTASKS_REQUIRE`` makes that an error, by the first of the names.
    """
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        if _is_required(names[0]):
            pytest.fail(f"{names[0]} is not installed")
        pytest.skip(f"{names[0]} is not installed")
    return found


def _is_required(name: str) -> bool:
    return name in {entry.strip() for entry in os.environ.get("BGTASKS_REQUIRE", "").split(",")}
