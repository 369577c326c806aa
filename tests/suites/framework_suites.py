"""Runs the frameworks' own tests, out of their source distributions, on their manager and on ours.

    python tests/suites/framework_suites.py [agentflow] [tenxgraph]

Each framework gets a fresh environment with this checkout in it; its source distribution is fetched from the package
index and holds the tests of manager, memory, graphs and skills, not those that stand in folders of its repository. Some
of them need packages that no one here uses: what fails on the framework's own manager is not held against ours, and
everything else has to pass.
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
# Files of which at least one test has to pass, so that a source distribution without them is noticed.
EXPECTED = ("test_background_task_manager", "test_memory_management", "test_basic", "test_multiagent")


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command; its output is shown only if it fails."""
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
    """Fetch the source distribution of the installed release; return the version and the folder of its tests."""
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
    """Run the tests; return whether each passed, without those that were skipped."""
    report = tests.parent / "report.xml"
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "suites"), str(ROOT / "tests" / "support")]),
        "BGTASKS_FRAMEWORK": framework,
    }
    # Their options ask for coverage; pytest's own are enough.
    pytest = (python, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--junit-xml={report}")
    run(*pytest, *options, tests, cwd=tests.parent, env=variables)
    return {
        f"{case.get('classname')}::{case.get('name')}": case.find("failure") is None and case.find("error") is None
        for case in ElementTree.parse(report).iter("testcase")
        if case.find("skipped") is None
    }


def check(framework: str) -> bool:
    """Compare both runs of one framework's tests and print what came of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = environment(folder / "environment", framework)
        version, tests = fetched_tests(python, folder, framework)
        theirs = outcomes(python, tests, framework)
        ours = outcomes(python, tests, framework, "-p", "framework_plugin")
    worse = sorted(test for test, passed in theirs.items() if passed and not ours.get(test))
    missing = [part for part in EXPECTED if not any(passed and part in test for test, passed in ours.items())]
    print(
        f"{framework} {version}: {sum(theirs.values())} of {len(theirs)} tests pass on its own manager, "
        f"{sum(ours.values())} of {len(ours)} on ours"
    )
    for test in worse:
        print("  fails on ours alone:", test)
    for part in missing:
        print("  no test passed of:", part)
    return not worse and not missing


if __name__ == "__main__":
    # All of them, also after one that failed.
    results = [check(framework) for framework in sys.argv[1:] or DISTRIBUTIONS]
    sys.exit(0 if all(results) else 1)
