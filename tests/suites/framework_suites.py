"""Runs the frameworks' own tests, from their source distributions, on their manager and on that of bgtasks.

    python tests/suites/framework_suites.py [agentflow] [tenxgraph]

Each framework gets a new environment with this checkout. Its source distribution is fetched from the package index. It
has the tests of manager, memory, graphs and skills, but not those in the folders of its repository. Some of them need
packages that are not installed: tests that fail on the framework's own manager may fail on that of bgtasks as well, and
all others must pass.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from source_distributions import ROOT, SUITES, fetched_source, make_environment, outcomes

DISTRIBUTIONS = {"agentflow": "10xscale-agentflow", "tenxgraph": "10xgraph"}
TOOLS = ("pytest>=8.2", "pytest-asyncio>=1.2", "pytest-env>=1.1")
# Files of which at least one test must pass, so that a source distribution without them is noticed.
EXPECTED = ("test_background_task_manager", "test_memory_management", "test_basic", "test_multiagent")


def check(framework: str) -> bool:
    """Compare both runs of one framework's tests and print the result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = make_environment(folder / "environment", f"{ROOT}[{framework}]", *TOOLS)
        version, source = fetched_source(python, folder, DISTRIBUTIONS[framework])
        variables = {
            "PYTHONPATH": os.pathsep.join([str(SUITES), str(ROOT / "tests" / "support")]),
            "BGTASKS_FRAMEWORK": framework,
        }
        original = outcomes(python, source, "tests", **variables)
        replaced = outcomes(python, source, "tests", "-p", "framework_plugin", **variables)
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
