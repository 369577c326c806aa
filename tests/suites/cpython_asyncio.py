"""Runs CPython's own asyncio tests with every task built by ``BackgroundTaskManager.task_factory``.

::

    python tests/suites/cpython_asyncio.py                  all of MODULES that this Python has
    python tests/suites/cpython_asyncio.py test_locks       some of them
    python tests/suites/cpython_asyncio.py --plain          the same tests without bgtasks, for comparison

A program, not collected by pytest: it needs the compiled registry and an interpreter that comes with its tests. Its
last line reads ``580 passed, 0 failed, 0 skipped``; it exits with 0 only if nothing failed and the tests really ran on
tracked tasks.

Only these are replaced:

- The default task factory of loops. Every ``BaseEventLoop``, those that the tests derive from it included, starts with
  the factory of the one manager of the run. ``set_task_factory(None)`` restores it, and ``get_task_factory`` returns
  None for it, as for the built-in default. A test that sets a factory of its own, or overrides ``create_task``, keeps
  its own: its tasks are not tracked.
- In ``test_eager_task_factory`` and ``test_tasks`` the class attribute ``Task``, from which their tests build tasks and
  factories. If it is asyncio's task in C, it becomes one that calls ``manager.task_factory`` with the same arguments;
  ``eager_start=True`` comes from asyncio's own eager factory. Classes with another ``Task``, the one in pure Python or
  one derived from either, are left out and counted: a manager builds none, and each has a counterpart for the one in C.
- ``asyncio.eager_task_factory`` in all modules, in the same way.
- The ``close`` of loops, to check the live tasks of the manager first.

Tests that start a new interpreter, and tests without tasks, run as usual; the summary has the number of tests with
tracked tasks. When a loop is closed and after each test, no task that is done and none of a closed loop may count as
live. At the end the counters of the manager must add up, and each module must have had tracked tasks.

DIFFERENCES lists tests of features that a tracked task does not have, with the reasons. They run, must fail, and count
as skipped. If other tests fail, the same interpreter runs their modules again without bgtasks. Tests that fail there as
well are named and count as skipped, because the machine is the cause.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import gc
import importlib.util
import logging
import subprocess
import sys
import tempfile
import types
import unittest
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import bgtasks
from bgtasks import BackgroundTaskManager

if sys.platform != "win32":
    import resource

PACKAGE: Final = "test.test_asyncio"
# Seconds and bytes; one run takes a minute and 150 MB, with as much address space again for each of its threads.
LONGEST_RUN: Final = 900
MOST_MEMORY: Final = 6 << 30
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
    "test_tasks",
    "test_timeouts",
    "test_waitfor",
)
# The modules that build tasks from a class attribute ``Task``.
TASK_MODULES: Final = ("test_eager_task_factory", "test_tasks")
# Module and test, with the reason.
DIFFERENCES: Final = {
    "test_tasks.test_get_context_uninitialized_segfault": "it derives a class; a manager does not build tasks of it",
    "test_tasks.test_log_destroyed_pending_task": "a manager holds each task to its end, so none is destroyed before",
}
# They end a task from outside, by ``Future.set_result(task, ...)``: it counts as live until its loop is closed.
ENDED_FROM_OUTSIDE: Final = ("test_set_exception_causes_invalid_state", "test_set_result_causes_invalid_state")
OUTCOMES: Final = ("completed", "failed", "cancelled", "timed_out", "abandoned")
# Precedes the ids of failed tests in the output of a run for the run that started it.
FAILED_MARK: Final = "FAILED "


def task_class(factory: Callable[..., Any]) -> Any:
    """Return a substitute for ``asyncio.Task``, for tests that call it or check for its instances."""
    from bgtasks._registry import TrackedTask

    class Meta(type):
        def __call__(cls, coro: Any, *, loop: asyncio.AbstractEventLoop | None = None, **kwargs: Any) -> Any:
            task = factory(asyncio.get_running_loop() if loop is None else loop, coro, **kwargs)
            if task._source_traceback:
                # The frame of this method.
                del task._source_traceback[-1]
            return task

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, TrackedTask)

    return Meta("Task", (), {"__class_getitem__": classmethod(types.GenericAlias)})


class Tracking:
    """Sets one manager's factory on every event loop, and checks its live tasks."""

    def __init__(self) -> None:
        self.manager = BackgroundTaskManager()
        # One object: a bound method is a new one each time it is read.
        self.factory = self.manager.task_factory
        self.task_class = task_class(self.factory)
        self.problems: list[str] = []

    def install(self) -> None:
        """Make the manager's factory the default of every loop, and the base of asyncio's eager factory."""
        base = asyncio.BaseEventLoop
        initialize, close_loop = base.__init__, base.close
        set_factory, get_factory = base.set_task_factory, base.get_task_factory

        def __init__(loop: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            initialize(loop, *args, **kwargs)
            set_factory(loop, self.factory)

        def set_task_factory(loop: Any, factory: Any) -> None:
            set_factory(loop, self.factory if factory is None else factory)

        def get_task_factory(loop: Any) -> Any:
            factory = get_factory(loop)
            return None if factory is self.factory else factory

        def close(loop: Any) -> None:
            self.look()
            close_loop(loop)

        replacements: dict[str, Callable[..., Any]] = {
            "__init__": __init__,
            "set_task_factory": set_task_factory,
            "get_task_factory": get_task_factory,
            "close": close,
        }
        for name, function in replacements.items():
            setattr(base, name, function)
        if hasattr(asyncio, "create_eager_task_factory"):
            eager = asyncio.create_eager_task_factory(self.task_class)
            for module in (asyncio, asyncio.tasks):
                module.eager_task_factory = eager  # type: ignore[attr-defined]

    def started(self) -> int:
        """Return how many tasks were tracked so far."""
        return self.manager.stats()["started"]

    def look(self) -> None:
        """Note the live tasks that should have ended: those that are done and those of closed loops."""
        for info in self.manager.get_task_info():
            task = self.manager.get_task(info["task_id"])
            if task is None:
                self.problems.append(f"a live record without its task: {info}")
            elif task.done():
                self.problems.append(f"counted as live, but done: {task!r}")
            elif task.get_loop().is_closed():
                self.problems.append(f"counted as live, but its loop is closed: {task!r}")

    def take_problems(self) -> list[str]:
        """Check once more; return the problems noted since the last call."""
        self.look()
        problems, self.problems = self.problems, []
        return problems

    def wrong_counters(self) -> Iterator[str]:
        """Yield the counters of the manager that contradict each other or the tasks that it shows."""
        stats = self.manager.stats()
        for name, counters in (("all", stats), *stats["names"].items()):
            ended = sum(int(counters[outcome]) for outcome in OUTCOMES)
            if counters["started"] != ended + counters["in_flight"]:
                yield f"started is not ended + in_flight for {name}: {counters}"
        for key in ("started", "in_flight", *OUTCOMES):
            if stats[key] != sum(counters[key] for counters in stats["names"].values()):
                yield f"{key} is not the sum over the names: {stats}"
        if stats["in_flight"] != len(self.manager.get_task_info()):
            yield f"{stats['in_flight']} tasks in flight, but {len(self.manager.get_task_info())} are shown"


class Result(unittest.TextTestResult):
    """Collects the ids of tests by outcome, and has the tracking check after each test."""

    tracking: Tracking | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.passed_ids: set[str] = set()
        self.failed_ids: set[str] = set()
        self.skipped_ids: set[str] = set()
        self.differences: dict[str, str] = {}
        self.tracked_tests = 0
        self.tracked_modules: set[str] = set()
        self._started_before = 0

    def startTest(self, test: unittest.TestCase) -> None:  # noqa: N802
        """Note the number of tasks before the test."""
        super().startTest(test)
        if self.tracking is not None:
            self._started_before = self.tracking.started()

    def stopTest(self, test: unittest.TestCase) -> None:  # noqa: N802
        """Fail the test if the manager holds ended tasks."""
        if self.tracking is not None:
            problems = self.tracking.take_problems()
            if problems and name_of(test) not in ENDED_FROM_OUTSIDE:
                self.addFailure(test, (AssertionError, AssertionError("; ".join(problems)), None))
            if self.tracking.started() > self._started_before:
                self.tracked_tests += 1
                self.tracked_modules.add(module_of(test))
        super().stopTest(test)

    def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        """Count a test that passed."""
        super().addSuccess(test)
        self.passed_ids.add(test.id())

    def addExpectedFailure(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        """Count a test that failed as expected by CPython or by DIFFERENCES."""
        super().addExpectedFailure(test, err)
        difference = difference_of(test)
        if difference is None:
            self.passed_ids.add(test.id())
        else:
            self.differences[test.id()] = difference

    def addError(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        """Count a test, or the set-up of a class or module, that raised."""
        super().addError(test, err)
        self.failed_ids.add(test.id())

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        """Count a test with a failed assertion."""
        super().addFailure(test, err)
        self.failed_ids.add(test.id())

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        """Count a test that was expected to fail and passed."""
        super().addUnexpectedSuccess(test)
        self.failed_ids.add(test.id())

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:  # noqa: N802
        """Count a test of which a part failed."""
        super().addSubTest(test, subtest, err)
        if err is not None:
            self.failed_ids.add(test.id())

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:  # noqa: N802
        """Count a skipped test."""
        super().addSkip(test, reason)
        self.skipped_ids.add(getattr(test, "test_case", test).id())


def module_of(test: unittest.TestCase) -> str:
    """Return the name of a test's module without the package."""
    return type(test).__module__.removeprefix(f"{PACKAGE}.")


def name_of(test: unittest.TestCase) -> str:
    """Return the name of a test's method."""
    return test.id().rpartition(".")[2]


def difference_of(test: unittest.TestCase) -> str | None:
    """Return why a test fails on tracked tasks, None if it must pass."""
    return DIFFERENCES.get(f"{module_of(test)}.{name_of(test)}")


def cases_of(suite: Iterable[Any]) -> Iterator[unittest.TestCase]:
    """Return the test cases of a suite of suites."""
    for entry in suite:
        if isinstance(entry, unittest.TestCase):
            yield entry
        else:
            yield from cases_of(entry)


def load(modules: Iterable[str]) -> tuple[list[unittest.TestCase], int]:
    """Return the tests of some modules, and the number of tests left out because they use other classes of tasks."""
    kept, left_out = [], 0
    for test in cases_of(unittest.defaultTestLoader.loadTestsFromNames([f"{PACKAGE}.{name}" for name in modules])):
        if module_of(test) in TASK_MODULES and getattr(test, "Task", asyncio.Task) is not asyncio.Task:
            left_out += 1
        else:
            kept.append(test)
    return kept, left_out


def run(tests: list[unittest.TestCase], tracking: Tracking | None) -> Result:
    """Run the tests, on tracked tasks if ``tracking`` is given."""
    if tracking is not None:
        tracking.install()
        for test in tests:
            if module_of(test) in TASK_MODULES and hasattr(test, "Task"):
                type(test).Task = tracking.task_class
            if difference_of(test) is not None:
                test.__unittest_expecting_failure__ = True  # type: ignore[attr-defined]
    Result.tracking = tracking
    result = unittest.TextTestRunner(verbosity=0, resultclass=Result).run(unittest.TestSuite(tests))
    assert isinstance(result, Result)
    return result


def failures_without_bgtasks(modules: Sequence[str]) -> set[str]:
    """Run some modules in a new interpreter without bgtasks; return the ids of the tests that fail."""
    command = [sys.executable, __file__, "--plain", *modules]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout
    return {line.removeprefix(FAILED_MARK) for line in output.splitlines() if line.startswith(FAILED_MARK)}


def check(tracking: Tracking, result: Result, modules: Iterable[str]) -> list[str]:
    """Return the problems of the run as a whole."""
    gc.collect()
    problems = [*tracking.take_problems(), *tracking.wrong_counters()]
    problems += [f"no tracked task in {name}" for name in modules if name not in result.tracked_modules]
    return problems


def parse_arguments() -> argparse.Namespace:
    """Return the arguments; exit with a message if a module is unknown or missing."""
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
    faulthandler.enable()
    # A test that runs away fails with its traceback, before the machine has no memory left, or no patience.
    faulthandler.dump_traceback_later(LONGEST_RUN, exit=True)
    if sys.platform != "win32":
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    # Some tests leave loops with tasks on purpose, and the manager warns of each.
    logging.getLogger("bgtasks").setLevel(logging.ERROR)
    tests, left_out = load(arguments.modules)
    tracking = None if arguments.plain else Tracking()

    from test.support import os_helper  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as directory, os_helper.change_cwd(directory):
        result = run(tests, tracking)
    failed = set(result.failed_ids)
    skipped = (result.skipped_ids | result.differences.keys()) - failed
    passed = result.passed_ids - failed - skipped
    problems: list[str] = []
    print(f"Python {sys.version.split()[0]}: {', '.join(arguments.modules)}")
    if left_out:
        print(f"left out: {left_out} tests about other classes of tasks")
    if tracking is not None:
        stats = tracking.manager.stats()
        outcomes = ", ".join(f"{stats[outcome]} {outcome}" for outcome in OUTCOMES)
        print(f"{stats['started']} tasks tracked in {result.tracked_tests} tests: {outcomes}")
        problems = check(tracking, result, arguments.modules)
        for name, reason in sorted(result.differences.items()):
            print(f"differs as listed: {name}: {reason}")
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
