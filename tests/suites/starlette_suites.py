"""Runs the tests of Starlette and FastAPI that have background tasks, by themselves and on a manager of bgtasks.

    python tests/suites/starlette_suites.py [starlette] [fastapi]

They come from the source distributions. Each framework gets a new environment with this checkout. Some tests need
packages that are not installed: those that fail without bgtasks may fail with it as well, and all others must pass.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from source_distributions import ROOT, SUITES, fetched_source, make_environment, outcomes

PACKAGES = {
    "starlette": ("starlette[full]",),
    "fastapi": ("fastapi[standard]", "sqlmodel", "dirty-equals", "inline-snapshot", "pyjwt", "pwdlib[argon2]", "flask"),
}
TOOLS = ("pytest>=8.2", "trio", "httpx")
# A file of which at least one test must pass, so that a source distribution without it is noticed.
EXPECTED = {"starlette": "test_background", "fastapi": "test_background_tasks"}
USES = re.compile(r"BackgroundTask|background_tasks|background=")


def files_of(source: Path) -> list[str]:
    """Return the files with tests of background tasks."""
    files = [path for path in sorted(source.glob("tests/**/test_*.py")) if USES.search(path.read_text("utf-8"))]
    return [str(path.relative_to(source)) for path in files]


def check(framework: str) -> bool:
    """Compare both runs of one framework's tests and print the result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = make_environment(folder / "environment", str(ROOT), *PACKAGES[framework], *TOOLS)
        version, source = fetched_source(python, folder, framework)
        # Without the framework's filters of warnings, which need further packages.
        arguments = ("-o", "filterwarnings=", *files_of(source))
        original = outcomes(python, source, *arguments, PYTHONPATH=str(SUITES))
        replaced = outcomes(python, source, *arguments, "-p", "starlette_plugin", PYTHONPATH=str(SUITES))
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
