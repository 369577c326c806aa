"""What people start by hand: the benchmarks' help, and the size of what the build makes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import PACKAGE, ROOT
from requirements import need

BENCHMARKS = sorted((ROOT / "benchmarks").glob("[!t]*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_the_help_of_a_benchmark_names_its_parts(path):
    """An empty choice is no choice."""
    for package in ("msgspec", "uvloop"):
        need(package)
    done = subprocess.run(
        [sys.executable, path, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    assert "[]" not in done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other linkers are left as they are")
@pytest.mark.skipif(os.environ.get("BGTASKS_TRACE") == "1", reason="a traced build keeps its symbols")
@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.so")), ids=lambda path: path.name)
def test_extensions_carry_no_symbols(path: Path):
    """They are six times the size of the code."""
    assert b".debug_info" not in path.read_bytes()
