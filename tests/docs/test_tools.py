"""What people start by hand: the benchmarks' help, and the size of what the build makes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import PACKAGE, ROOT
from requirements import need

# The other files are modules of these.
BENCHMARKS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "ArgumentParser(" in path.read_text()]


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
    if missing := re.search(r"No module named '(\w+)|^(\w+) is not installed", done.stderr, re.MULTILINE):
        need(missing[1] or missing[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {path.name} [-h]")
    assert "[]" not in done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other linkers are left as they are")
@pytest.mark.skipif(os.environ.get("BGTASKS_TRACE") == "1", reason="a traced build keeps its symbols")
@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.so")), ids=lambda path: path.name)
def test_extensions_carry_no_symbols(path: Path):
    """They are six times the size of the code."""
    assert b".debug_info" not in path.read_bytes()
