"""Runs LangGraph's own tests twice, on its executors and on those of bgtasks, and fails if the outcomes differ.

::

    python tests/suites/langgraph_suite.py                            all of them that need no server
    python tests/suites/langgraph_suite.py test_pregel.py test_retry.py   some of the files
    python tests/suites/langgraph_suite.py test_pregel.py::test_in_one_fan_out_state_graph   one test

A program, not collected by pytest. It needs the dependency group ``langgraph``, and an index that has LangGraph's
sdist: the tests are in the sdist, not in the wheel. It downloads the sdist of the installed version and unpacks only
the tests, so that they import the installed package.

Both runs are made at once, each in its own interpreter; they differ in one call,
``bgtasks.integrations.langgraph.install()``. For each test the outcome is compared (passed, failed, raised in its
set-up or skipped), and the warnings that no test raises itself: coroutines never awaited, errors that no test could
catch. The files of tests that differ are run once more, on both sides: LangGraph has tests that measure time, and they
fail on either side of a busy machine. Only tests that differ again count; repeated tests are named. Whole files are
repeated, because a test may fail for the effects of earlier ones.

Its last line reads ``2941 passed, 0 differ, 43 skipped``. It exits with 0 only if no test differed, at least one
passed, and the run on bgtasks made executors of bgtasks and the other run made none.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypedDict

SIDES: Final = ("langgraph", "bgtasks")
Side = Literal["langgraph", "bgtasks"]
# Options of LangGraph's own tests: for machines without its database servers, and to keep its tracer off the network.
ENVIRONMENT: Final = {"NO_DOCKER": "true", "LANGSMITH_TRACING": "false", "PYTHONDONTWRITEBYTECODE": "1"}
# Seconds after which a run counts as hanging.
LIMIT: Final = 1200.0
# Lines that are shown of the output of each failed run.
LINES_SHOWN: Final = 60
# More differing tests than this are neither run again nor named: the difference is no accident.
REPEATED_AT_MOST: Final = 100


class Record(TypedDict):
    """The result of a run, for the program that started it."""

    outcomes: dict[str, str]
    warnings: list[str]
    executors: int


class Recorder:
    """A pytest plugin that installs the executors of one side and records the outcomes of the tests."""

    def __init__(self, side: Side, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, str] = {}
        self._warnings: set[str] = set()
        self._executors = 0
        if side == "bgtasks":
            from bgtasks.integrations import langgraph

            langgraph.install()
            self._count(langgraph.BackgroundExecutor)
            self._count(langgraph.AsyncBackgroundExecutor)

    def _count(self, executor: Any) -> None:
        """Count the executors that are made of a class."""
        initialize = executor.__init__

        def __init__(made: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            self._executors += 1
            initialize(made, *args, **kwargs)

        executor.__init__ = __init__

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Record the outcome of a test, or of its set-up or tear-down if one of these failed."""
        if report.when == "call":
            self._outcomes[report.nodeid] = report.outcome
        elif report.skipped:
            self._outcomes[report.nodeid] = "skipped"
        elif report.failed:
            self._outcomes[report.nodeid] = f"failed in its {report.when}"

    def pytest_collectreport(self, report: Any) -> None:
        """Record a file that could not be collected."""
        if not report.passed:
            self._outcomes[report.nodeid] = "skipped" if report.skipped else "not collected"

    def pytest_warning_recorded(self, warning_message: Any) -> None:
        """Record a warning that no test raised itself; which test it appears in depends on the cycle collector."""
        if issubclass(warning_message.category, RuntimeWarning) or "Unraisable" in warning_message.category.__name__:
            first_line = str(warning_message.message).partition("\n")[0]
            self._warnings.add(re.sub(r"0x[0-9a-f]+|Task-\d+", "...", first_line))

    def pytest_sessionfinish(self) -> None:
        """Write the record."""
        record = Record(outcomes=self._outcomes, warnings=sorted(self._warnings), executors=self._executors)
        self._path.write_text(json.dumps(record))


def run_side(side: Side, record: Path, tests: Sequence[str]) -> int:
    """Run some tests in this interpreter, on the executors of one side; return pytest's status."""
    import pytest

    return pytest.main(["-q", "-p", "no:cacheprovider", *tests], plugins=[Recorder(side, record)])


class Suite:
    """LangGraph's tests, unpacked in a directory of their own."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._runs = 0

    @classmethod
    def download(cls, directory: Path) -> Suite:
        """Download the tests of the installed version from its sdist."""
        version = importlib.metadata.version("langgraph")
        command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
        options = ["--no-binary", ":all:", "--no-deps", "--dest", str(directory)]
        subprocess.run([*command, *options, f"langgraph=={version}"], check=True)
        (archive,) = directory.glob("langgraph-*.tar.gz")
        with tarfile.open(archive) as content:
            # The sources stay packed: the tests must import the installed package.
            wanted = [member for member in content if re.match(r"[^/]+/(tests/|pyproject\.toml$)", member.name)]
            content.extractall(directory, members=wanted, filter="data")
        return cls(directory / archive.name.removesuffix(".tar.gz"))

    def run(self, tests: Sequence[str]) -> dict[Side, Record]:
        """Run some tests on both sides at once; return the record of each side."""
        self._runs += 1
        paths = {side: self._root.parent / f"{side}-{self._runs}" for side in SIDES}
        processes: dict[Side, subprocess.Popen[bytes]] = {}
        for side, path in paths.items():
            command = [sys.executable, __file__, "--side", side, "--record", f"{path}.json", *tests]
            with open(f"{path}.log", "wb") as log:
                processes[side] = subprocess.Popen(
                    command,
                    cwd=self._root,
                    env={**os.environ, **ENVIRONMENT},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        end = time.monotonic() + LIMIT
        records: dict[Side, Record] = {}
        for side, process in processes.items():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            records[side] = self._record_of(paths[side], process.returncode)
        return records

    def _record_of(self, path: Path, status: int) -> Record:
        """Return the record of a run; if it wrote none, show the end of its output."""
        try:
            record: Record = json.loads(Path(f"{path}.json").read_text())
        except FileNotFoundError:
            record = Record(outcomes={}, warnings=[], executors=0)
        if status not in (0, 1) or not record["outcomes"]:
            print(f"{path.name} ended with status {status}:")
            print(self.log_of(path.name, LINES_SHOWN))
        return record

    def log_of(self, run: str, lines: int) -> str:
        """Return the last lines that a run printed."""
        text = (self._root.parent / f"{run}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def last_log(self, side: Side, lines: int) -> str:
        """Return the last lines of the newest run of a side."""
        return self.log_of(f"{side}-{self._runs}", lines)


def differences(records: dict[Side, Record]) -> list[str]:
    """Return the ids of the tests whose outcomes differ between the sides."""
    original, replaced = (records[side]["outcomes"] for side in SIDES)
    return sorted(test for test in original.keys() | replaced.keys() if original.get(test) != replaced.get(test))


def outcome_on(records: dict[Side, Record], test: str) -> str:
    """Return the outcomes of a test on both sides as text."""
    return ", ".join(f"{records[side]['outcomes'].get(test, 'not run')} on {side}" for side in SIDES)


def find_problems(suite: Suite, first: dict[Side, Record]) -> list[str]:
    """Compare the two sides, run differing tests again, and return those that still differ."""
    problems = []
    differing = differences(first)
    if differing and len(differing) <= REPEATED_AT_MOST:
        print(f"{len(differing)} tests differ; their files are run again:")
        for test in differing:
            print(f"  {test}: {outcome_on(first, test)}")
        second = suite.run(sorted({test.partition("::")[0] for test in differing}))
        again = set(differences(second))
        problems += [f"differs, twice: {test}: {outcome_on(second, test)}" for test in differing if test in again]
        if problems:
            print(suite.last_log("bgtasks", 5 * LINES_SHOWN))
    else:
        problems += [f"differs: {test}: {outcome_on(first, test)}" for test in differing]
    known = set(first["langgraph"]["warnings"])
    problems += [f"a warning that is new: {text}" for text in first["bgtasks"]["warnings"] if text not in known]
    if first["langgraph"]["executors"]:
        problems.append("the run on LangGraph's executors made executors of bgtasks")
    if not first["bgtasks"]["executors"]:
        problems.append("the run on our executors made none of them")
    return problems


def summary(records: dict[Side, Record], differing: int) -> str:
    """Return the line that counts the tests."""
    original, replaced = (records[side]["outcomes"] for side in SIDES)
    alike = Counter(outcome for test, outcome in replaced.items() if original.get(test) == outcome)
    failed = sum(alike.values()) - alike["passed"] - alike["skipped"]
    parts = [f"{alike['passed']} passed", f"{differing} differ"]
    if failed:
        parts.append(f"{failed} failed on both")
    return ", ".join([*parts, f"{alike['skipped']} skipped"])


def parse_arguments() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description="Run LangGraph's own tests on its executors and on those of bgtasks.")
    parser.add_argument("tests", nargs="*", help="files of LangGraph's tests, or ids of tests in them; all by default")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def paths_of(tests: Iterable[str]) -> list[str]:
    """Return the tests as pytest finds them from the directory of the sdist."""
    return [test if test.startswith("tests/") else f"tests/{test}" for test in tests] or ["tests"]


def main() -> int:
    """Run, report, and return the exit status."""
    arguments = parse_arguments()
    if arguments.side is not None:
        return run_side(arguments.side, arguments.record, arguments.tests)
    import bgtasks

    start = time.monotonic()
    versions = f"bgtasks {bgtasks.__version__} ({bgtasks.IMPLEMENTATION}), Python {sys.version.split()[0]}"
    print(f"LangGraph {importlib.metadata.version('langgraph')}, {versions}")
    with tempfile.TemporaryDirectory(prefix="langgraph-suite-") as directory:
        suite = Suite.download(Path(directory))
        records = suite.run(paths_of(arguments.tests))
        problems = find_problems(suite, records)
    for test, outcome in sorted(records["bgtasks"]["outcomes"].items()):
        if outcome not in ("passed", "skipped") and records["langgraph"]["outcomes"].get(test) == outcome:
            print(f"{outcome} on both: {test}")
    print(f"{records['bgtasks']['executors']} of our executors were made; {time.monotonic() - start:.0f} s")
    print("\n".join(problems[-REPEATED_AT_MOST:]))
    line = summary(records, sum(problem.startswith("differs") for problem in problems))
    print(line)
    return 1 if problems or line.startswith("0 passed") else 0


if __name__ == "__main__":
    sys.exit(main())
