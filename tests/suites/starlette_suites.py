"""Runs the tests of Starlette and FastAPI that have background tasks, by themselves and on a manager of bgtasks.

    python tests/suites/starlette_suites.py [starlette] [fastapi]

They come from the source distributions. Each framework gets a new environment with this checkout. Some tests need
packages that are not installed: those that fail without bgtasks may fail with it as well, and all others must pass.
"""

from __future__ import annotations

import os
import re
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from framework_suites import ROOT, run

PACKAGES = {
    "starlette": ("starlette[full]",),
    "fastapi": ("fastapi[standard]", "sqlmodel", "dirty-equals", "inline-snapshot", "pyjwt", "pwdlib[argon2]", "flask"),
}
TOOLS = ("pytest>=8.2", "trio", "httpx")
# A file of which at least one test must pass, so that a source distribution without it is noticed.
EXPECTED = {"starlette": "test_background", "fastapi": "test_background_tasks"}
USES = re.compile(r"BackgroundTask|background_tasks|background=")


def environment(folder: Path, framework: str) -> Path:
    """Make an environment with the framework and this checkout; return its interpreter."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    run(python, "-m", "pip", "install", "--quiet", str(ROOT), *PACKAGES[framework], *TOOLS)
    return python


def fetched_tests(python: Path, folder: Path, framework: str) -> tuple[str, Path, list[str]]:
    """Fetch the source distribution of the installed release; return its version, its folder and the files to run."""
    code = f"import importlib.metadata as metadata; print(metadata.version({framework!r}))"
    version = run(python, "-c", code).stdout.strip()
    pip = (python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", folder)
    run(*pip, f"{framework}=={version}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    files = [path for path in sorted(source.glob("tests/**/test_*.py")) if USES.search(path.read_text("utf-8"))]
    return version, source, [str(path.relative_to(source)) for path in files]


def outcomes(python: Path, source: Path, files: list[str], *options: str) -> dict[str, bool]:
    """Run the tests; return whether each passed, except for skipped ones."""
    report = source / "report.xml"
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "suites")}
    # Without the options of the framework, which need further packages.
    pytest = (python, "-m", "pytest", "-q", "-o", "addopts=", "-o", "filterwarnings=", "-p", "no:cacheprovider")
    run(*pytest, f"--junit-xml={report}", *options, *files, cwd=source, env=variables)
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
        version, source, files = fetched_tests(python, folder, framework)
        original = outcomes(python, source, files)
        replaced = outcomes(python, source, files, "-p", "starlette_plugin")
    worse = sorted(test for test, passed in original.items() if passed and not replaced.get(test))
    is_complete = any(passed and EXPECTED[framework] in test for test, passed in replaced.items())
    print(
        f"{framework} {version}: {sum(original.values())} of {len(original)} tests pass by itself, "
        f"{sum(replaced.values())} of {len(replaced)} on a manager of bgtasks"
    )
    for test in worse:
        print("  fails on the manager of bgtasks alone:", test)
    if not is_complete:
        print("  no test passed of:", EXPECTED[framework])
    return not worse and is_complete


if __name__ == "__main__":
    # All frameworks, also after a failed one.
    results = [check(framework) for framework in sys.argv[1:] or PACKAGES]
    sys.exit(0 if all(results) else 1)
