"""Every example of a docstring runs, and prints what it says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from frameworks import needed
from paths import PACKAGE, SUPPORT
from requirements import need

PROMPT = re.compile(r"^\s*>>> ", re.MULTILINE)
SOURCES = sorted(path for ending in ("py", "pyx") for path in PACKAGE.rglob(f"*.{ending}"))
# What an example or its module needs beside the package: by a name in it, or by the module.
PACKAGES = {
    "KafkaSink": "confluent_kafka",
    "NatsSink": "nats",
    "OtlpSink": "opentelemetry.exporter.otlp.proto.http",
    "RabbitMQSink": "aio_pika",
    "RedisSink": "redis",
    "bgtasks.injection": "injectq",
    "bgtasks.integrations._starlette_background": "starlette",
    "bgtasks.integrations.langgraph": "langgraph.pregel",
    "bgtasks.integrations.starlette": "starlette",
    "bgtasks.watch._collector": "prometheus_client",
    "bgtasks.watch._metrics_page": "prometheus_client",
    "bgtasks.watch._spans": "opentelemetry.metrics",
    "bgtasks.watch.opentelemetry": "opentelemetry.metrics",
}


def docstrings_in(node, names=()):
    """Return (name, docstring) of a module and of everything in it that has one, whatever needs importing for it."""
    found = []
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        if not isinstance(node, ast.Module):
            names = (*names, node.name)
        found.append((".".join(names), ast.get_docstring(node) or ""))
    for child in ast.iter_child_nodes(node):
        found += docstrings_in(child, names)
    return found


def module_of(path):
    """Return the name of a source file as a module."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


DOCSTRINGS = [
    (module_of(path), name, text)
    for path in SOURCES
    if path.suffix == ".py"
    for name, text in docstrings_in(ast.parse(path.read_text(encoding="utf-8")))
    if PROMPT.search(text)
]


def test_no_example_is_outside_of_these_docstrings():
    """There is no prompt in a comment or in a compiled source, where nothing would run it."""
    prompts = sum(len(PROMPT.findall(path.read_text(encoding="utf-8"))) for path in SOURCES)
    assert prompts == sum(len(PROMPT.findall(text)) for _, _, text in DOCSTRINGS) > 0


@pytest.mark.parametrize(("module", "name", "text"), DOCSTRINGS, ids=[f"{row[0]}.{row[1]}" for row in DOCSTRINGS])
def test_the_examples_of_a_docstring_run(module, name, text, tmp_path):
    """They run in a program of their own, with warnings as errors."""
    if module.startswith("bgtasks.events"):
        need("msgspec")
    if module == "bgtasks.integrations.agentflow":
        needed("agentflow")
    for key, package in PACKAGES.items():
        if key in text or key == module:
            need(package)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", SUPPORT / "docstring_examples.py", module, name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "never awaited" not in done.stderr
