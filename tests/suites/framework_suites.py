"""Runs the frameworks' own tests, from their source distributions, on their manager and on that of bgtasks.

    python tests/suites/framework_suites.py [agentflow] [tenxgraph]

Each framework gets a new environment with this checkout. Its source distribution is fetched from the package index. It
has the tests of manager, memory, graphs and skills, but not those in the folders of its repository. Some of them need
packages that are not installed: tests that fail on the framework's own manager may fail on that of bgtasks as well, and
all others must pass.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTIONS = {"agentflow": "10xscale-agentflow", "tenxgraph": "10xgraph"}
TOOLS = ("pytest>=8.2", "pytest-asyncio>=1.2", "pytest-env>=1.1")
# Files of which at least one test must pass, so that a source distribution without them is noticed.
EXPECTED = ("test_background_task_manager", "test_memory_management", "test_basic", "test_multiagent")


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command; show its output only if it fails."""
    done = subprocess.run([str(part) for part in command], text=True, capture_output=True, check=False, **options)
    if done.returncode > 1:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-5000:]}{done.stderr[-5000:]}")
    return done


def environment(folder: Path, framework: str) -> Path:
    """Make an environment with the framework and this checkout; return its interpreter."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    run(python, "-m", "pip", "install", "--quiet", f"{ROOT}[{framework}]", *TOOLS)
    return python


def fetched_tests(python: Path, folder: Path, framework: str) -> tuple[str, Path]:
    """Fetch the source distribution of the installed release; return the version and the directory of its tests."""
    distribution = DISTRIBUTIONS[framework]
    code = f"import importlib.metadata as metadata; print(metadata.version({distribution!r}))"
    version = run(python, "-c", code).stdout.strip()
    pip = (python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", folder)
    run(*pip, f"{distribution}=={version}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "source", filter="data")
    (tests,) = (folder / "source").glob("*/tests")
    return version, tests


def outcomes(python: Path, tests: Path, framework: str, *options: str) -> dict[str, bool]:
    """Run the tests; return whether each passed, except for skipped ones."""
    report = tests.parent / "report.xml"
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "suites"), str(ROOT / "tests" / "support")]),
        "BGTASKS_FRAMEWORK": framework,
    }
    # Without the options of the framework, which need a coverage plugin.
    pytest = (python, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--junit-xml={report}")
    run(*pytest, *options, tests, cwd=tests.parent, env=variables)
    return {
        f"{case.get('classname')}::{case.get('name')}": case.find("failure") is None and case.find("error") is None
        for case in ElementTree.parse(report).iter("testcase")
        if case.find("skipped") is None
    }


def check(framework: str) -> bool:
    """Compare both runs of one framework's tests and print the result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = environment(folder / "environment", framework)
        version, tests = fetched_tests(python, folder, framework)
        original = outcomes(python, tests, framework)
        replaced = outcomes(python, tests, framework, "-p", "framework_plugin")
    worse = sorted(test for test, passed in original.items() if passed and not replaced.get(test))
    missing = [part for part in EXPECTED if not any(passed and part in test for test, passed in replaced.items())]
    print(
        f"{framework} {version}: {sum(original.values())} of {len(original)} tests pass on its own manager, "
        f"{sum(replaced.values())} of {len(replaced)} on that of bgtasks"
    )
    for test in worse:
        print("  fails on the manager of bgtasks alone:", test)
    for part in missing:
        print("  no test passed of:", part)
    return not worse and not missing


if __name__ == "__main__":
    # All frameworks, also after a failed one.
    results = [check(framework) for framework in sys.argv[1:] or DISTRIBUTIONS]
    sys.exit(0 if all(results) else 1)
