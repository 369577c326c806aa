"""Runs CPython's own asyncio tests with every task built by ``BackgroundTaskManager.task_factory``.

::

    python tests/cpython_asyncio.py                  all of MODULES that this Python has
    python tests/cpython_asyncio.py test_locks       some of them
    python tests/cpython_asyncio.py --plain          the same tests without bgtasks, for comparison

A program, not collected by pytest: it needs the compiled registry and an interpreter that comes with its tests. Its
last line reads ``580 passed, 0 failed, 0 skipped``; it exits with 0 only if nothing failed and the tests really ran on
tracked tasks.

What is replaced, and nothing else:

- A loop's default task factory. Every ``BaseEventLoop``, those that the tests derive from it included, is born with the
  factory of the one manager of the run; ``set_task_factory(None)`` goes back to it, and ``get_task_factory`` answers
  None for it, as it does for the built-in default. A test that sets a factory of its own, or overrides ``create_task``,
  keeps what it asks for: its tasks are not tracked.
- In ``test_eager_task_factory`` the ``Task`` that a test class builds its factories from: it becomes one that calls
  ``manager.task_factory``, with the ``eager_start=True`` that asyncio's own eager factory passes. The same goes for
  ``asyncio.eager_task_factory`` in every module. The classes about asyncio's task in pure Python are left out: a tracked
  task derives from the one in C, and there is a twin of each class for that one.

Tests that start a new interpreter and tests of what has no task in it run as always; the number of tests that had
tracked tasks stands in the summary.

After each test no task that is done may still count as live, and its loop, if closed, may have left none. At the end the
counters of the manager have to add up, and each module must have had tracked tasks.

Tests that fail are run again by the same interpreter without bgtasks. Those that fail there as well are named and count
as skipped: they tell of the machine. There is no list of failures to expect.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import logging
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import bgtasks
from bgtasks import BackgroundTaskManager

PACKAGE: Final = "test.test_asyncio"
MODULES: Final = (
    "test_base_events",
    "test_eager_task_factory",
    "test_locks",
    "test_queues",
    "test_runners",
    "test_staggered",
    "test_streams",
    "test_subprocess",
    "test_taskgroups",
    "test_timeouts",
    "test_waitfor",
)
EAGER_MODULE: Final = f"{PACKAGE}.test_eager_task_factory"
OUTCOMES: Final = ("completed", "failed", "cancelled", "timed_out", "abandoned")
# How a run tells its failures to the one that started it.
FAILED_MARK: Final = "FAILED "


class Tracking:
    """Puts one manager under every event loop and watches what it keeps."""

    def __init__(self) -> None:
        self.manager = BackgroundTaskManager()
        # One object: a bound method is a new one each time it is read.
        self.factory = self.manager.task_factory

    def install(self) -> None:
        """Make the manager's factory the default of every loop, and the base of asyncio's eager one."""
        base = asyncio.BaseEventLoop
        initialize, set_factory, get_factory = base.__init__, base.set_task_factory, base.get_task_factory

        def __init__(loop: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            initialize(loop, *args, **kwargs)
            set_factory(loop, self.factory)

        def set_task_factory(loop: Any, factory: Any) -> None:
            set_factory(loop, self.factory if factory is None else factory)

        def get_task_factory(loop: Any) -> Any:
            factory = get_factory(loop)
            return None if factory is self.factory else factory

        replacements: dict[str, Callable[..., Any]] = {
            "__init__": __init__,
            "set_task_factory": set_task_factory,
            "get_task_factory": get_task_factory,
        }
        for name, function in replacements.items():
            setattr(base, name, function)
        if hasattr(asyncio, "create_eager_task_factory"):
            eager = asyncio.create_eager_task_factory(self.task_class())
            for module in (asyncio, asyncio.tasks):
                module.eager_task_factory = eager  # type: ignore[attr-defined]

    def task_class(self) -> Any:
        """Return what stands in for ``asyncio.Task`` where a test calls it or asks for an instance of it."""
        build = self.factory

        async def nothing() -> None: ...

        loop = asyncio.new_event_loop()
        task = build(loop, nothing())
        loop.run_until_complete(task)
        loop.close()
        tracked = type(task)

        class Meta(type):
            def __call__(cls, coro: Any, *, loop: asyncio.AbstractEventLoop, **kwargs: Any) -> Any:
                return build(loop, coro, **kwargs)

            def __instancecheck__(cls, instance: Any) -> bool:
                return isinstance(instance, tracked)

        return Meta("Task", (), {})

    def started(self) -> int:
        """Return how many tasks were tracked so far."""
        return self.manager.stats()["started"]

    def what_is_wrong(self) -> Iterator[str]:
        """Tell of live tasks that should have ended: those that are done and those of closed loops."""
        for info in self.manager.get_task_info():
            task = self.manager.get_task(info["task_id"])
            if task is None:
                yield f"a live record without its task: {info}"
            elif task.done():
                yield f"counted as live, but done: {task!r}"
            elif task.get_loop().is_closed():
                yield f"counted as live, but its loop is closed: {task!r}"

    def what_does_not_add_up(self) -> Iterator[str]:
        """Compare the counters of the manager with each other and with the tasks that it shows."""
        stats = self.manager.stats()
        for name, counters in (("all", stats), *stats["names"].items()):
            ended = sum(int(counters[outcome]) for outcome in OUTCOMES)  # type: ignore[literal-required]
            if counters["started"] != ended + counters["in_flight"]:
                yield f"started is not ended + in_flight for {name}: {counters}"
        for key in ("started", "in_flight", *OUTCOMES):
            if stats[key] != sum(counters[key] for counters in stats["names"].values()):  # type: ignore[literal-required]
                yield f"{key} is not the sum over the names: {stats}"
        if stats["in_flight"] != len(self.manager.get_task_info()):
            yield f"{stats['in_flight']} tasks in flight, but {len(self.manager.get_task_info())} are shown"


class Result(unittest.TextTestResult):
    """Collects the ids of tests by outcome, and asks the tracking after each test."""

    tracking: Tracking | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.passed_ids: set[str] = set()
        self.failed_ids: set[str] = set()
        self.skipped_ids: set[str] = set()
        self.tracked_tests = 0
        self.tracked_modules: set[str] = set()
        self._started_before = 0

    def startTest(self, test: unittest.TestCase) -> None:  # noqa: N802
        """Remember the count of tasks before the test."""
        super().startTest(test)
        if self.tracking is not None:
            self._started_before = self.tracking.started()

    def stopTest(self, test: unittest.TestCase) -> None:  # noqa: N802
        """Fail the test if the manager holds what has ended."""
        if self.tracking is not None:
            problems = list(self.tracking.what_is_wrong())
            if problems:
                self.addFailure(test, (AssertionError, AssertionError("; ".join(problems)), None))
            if self.tracking.started() > self._started_before:
                self.tracked_tests += 1
                self.tracked_modules.add(type(test).__module__)
        super().stopTest(test)

    def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        """Count a test that passed."""
        super().addSuccess(test)
        self.passed_ids.add(test.id())

    def addExpectedFailure(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        """Count a test that failed as CPython says it does."""
        super().addExpectedFailure(test, err)
        self.passed_ids.add(test.id())

    def addError(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        """Count a test, or the set-up of a class or module, that raised."""
        super().addError(test, err)
        self.failed_ids.add(test.id())

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        """Count a test with a failed assertion."""
        super().addFailure(test, err)
        self.failed_ids.add(test.id())

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        """Count a test that passed where CPython says that it fails."""
        super().addUnexpectedSuccess(test)
        self.failed_ids.add(test.id())

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:  # noqa: N802
        """Count a test one part of which failed."""
        super().addSubTest(test, subtest, err)
        if err is not None:
            self.failed_ids.add(test.id())

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:  # noqa: N802
        """Count a skipped test."""
        super().addSkip(test, reason)
        self.skipped_ids.add(getattr(test, "test_case", test).id())


def cases_of(suite: Iterable[Any]) -> Iterator[unittest.TestCase]:
    """Return the test cases of a suite of suites."""
    for entry in suite:
        if isinstance(entry, unittest.TestCase):
            yield entry
        else:
            yield from cases_of(entry)


def load(modules: Iterable[str]) -> tuple[unittest.TestSuite, int]:
    """Return the tests of some modules, and how many of asyncio's task in pure Python were left out."""
    kept, left_out = [], 0
    python_task = asyncio.tasks._PyTask  # type: ignore[attr-defined]
    for case in cases_of(unittest.defaultTestLoader.loadTestsFromNames([f"{PACKAGE}.{name}" for name in modules])):
        if type(case).__module__ == EAGER_MODULE and getattr(case, "Task", None) is python_task:
            left_out += 1
        else:
            kept.append(case)
    return unittest.TestSuite(kept), left_out


def run(suite: unittest.TestSuite, tracking: Tracking | None) -> Result:
    """Run the tests, on tracked tasks if there is a tracking."""
    if tracking is not None:
        tracking.install()
        task_class = tracking.task_class()
        for test_class in {type(case) for case in cases_of(suite) if type(case).__module__ == EAGER_MODULE}:
            test_class.Task = task_class  # type: ignore[attr-defined]
    Result.tracking = tracking
    result = unittest.TextTestRunner(verbosity=0, resultclass=Result).run(suite)
    assert isinstance(result, Result)
    return result


def failures_without_bgtasks(modules: Sequence[str]) -> set[str]:
    """Run some modules in a new interpreter without bgtasks and return the ids of the tests that fail."""
    command = [sys.executable, __file__, "--plain", *modules]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout
    return {line.removeprefix(FAILED_MARK) for line in output.splitlines() if line.startswith(FAILED_MARK)}


def check(tracking: Tracking, result: Result, modules: Iterable[str]) -> list[str]:
    """Return what is wrong with the run as a whole."""
    gc.collect()
    problems = [*tracking.what_is_wrong(), *tracking.what_does_not_add_up()]
    problems += [f"no tracked task in {name}" for name in modules if f"{PACKAGE}.{name}" not in result.tracked_modules]
    return problems


def parse_arguments() -> argparse.Namespace:
    """Return the arguments; leave with a message if a module is not to be had."""
    parser = argparse.ArgumentParser(description="Run CPython's asyncio tests on tracked tasks.")
    parser.add_argument("modules", nargs="*", metavar="module", help=f"one of {', '.join(MODULES)}; all by default")
    parser.add_argument("--plain", action="store_true", help="run the tests without bgtasks")
    arguments = parser.parse_args()
    unknown = set(arguments.modules) - set(MODULES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if importlib.util.find_spec("test") is None or importlib.util.find_spec(PACKAGE) is None:
        parser.error("this Python came without its tests")
    wanted = arguments.modules or MODULES
    arguments.modules = [name for name in wanted if importlib.util.find_spec(f"{PACKAGE}.{name}") is not None]
    for name in wanted:
        if name not in arguments.modules:
            print(f"not in this Python: {name}")
    return arguments


def main() -> int:
    """Run the tests and print the summary."""
    arguments = parse_arguments()
    if not arguments.plain and bgtasks.IMPLEMENTATION != "cython":
        print("the compiled registry does not run here: build it, or unset BGTASKS_IMPLEMENTATION")
        return 2
    # Loops that tests leave behind with tasks are part of the trade here; the manager warns of each.
    logging.getLogger("bgtasks").setLevel(logging.ERROR)
    suite, left_out = load(arguments.modules)
    tracking = None if arguments.plain else Tracking()

    from test.support import os_helper

    with tempfile.TemporaryDirectory() as directory, os_helper.change_cwd(directory):
        result = run(suite, tracking)
    failed, skipped = result.failed_ids, result.skipped_ids - result.failed_ids
    passed = result.passed_ids - failed - skipped
    problems: list[str] = []
    print(f"Python {sys.version.split()[0]}: {', '.join(arguments.modules)}")
    if left_out:
        print(f"left out: {left_out} tests of asyncio's task in pure Python")
    if tracking is not None:
        stats = tracking.manager.stats()
        outcomes = ", ".join(f"{stats[outcome]} {outcome}" for outcome in OUTCOMES)  # type: ignore[literal-required]
        print(f"{stats['started']} tasks tracked in {result.tracked_tests} tests: {outcomes}")
        problems = check(tracking, result, arguments.modules)
        if failed:
            for name in sorted(failed & failures_without_bgtasks(arguments.modules)):
                print(f"fails without bgtasks, too: {name}")
                failed.remove(name)
                skipped.add(name)
    for name in sorted(failed):
        print(FAILED_MARK + name)
    for problem in problems:
        print(f"PROBLEM {problem}")
    print(f"{len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped")
    return 1 if failed or problems or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
