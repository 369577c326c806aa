"""The checks of the pytest plugin: they find tasks that a test leaves, and failures that nobody retrieved."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import pytest

from bgtasks._internals import ManagerInternals
from bgtasks._locations import location_of
from bgtasks._observers import Observer, all_managers, observe_all, stop_observing_all
from bgtasks._reporting import numbered
from bgtasks._task import retrieve_failure, users_traceback
from bgtasks.registry import Record

__all__ = ["LeakChecker"]


class Failure(NamedTuple):
    """A background task that failed, and its exception as it was when the task failed."""

    text: str
    task: asyncio.Task[Any] | None
    error: BaseException
    traceback: Any

    def was_seen(self) -> bool:
        """Return whether the exception was retrieved from the task, or raised again by ``wait_for_all``."""
        is_retrieved = self.task is not None and not self.task._log_traceback  # noqa: SLF001  asyncio's own mark
        return is_retrieved or self.error.__traceback__ is not self.traceback

    def __str__(self) -> str:
        lines = "".join(traceback.format_exception(type(self.error), self.error, users_traceback(self.error)))
        return f"{self.text} failed:\n{lines.rstrip()}"


class CheckedTest:
    """The findings about the background tasks of one test."""

    def __init__(self, item: pytest.Item, mode: str) -> None:
        self.item = item
        self.mode = mode
        # Tasks that the test itself started and left.
        self.left: set[Record] = set()
        self._leaks: list[str] = []
        self._failures: list[Failure] = []

    def add_leak(self, text: str) -> None:
        """Add a task that the test left."""
        self._leaks.append(text)

    def add_failure(self, failure: Failure) -> None:
        """Add a task that failed."""
        self._failures.append(failure)

    def take_report(self) -> str:
        """Return the findings as text, empty if there are none, and forget them."""
        failures = [failure for failure in self._failures if not failure.was_seen()]
        for failure in failures:
            if failure.task is not None:
                # Reported here: asyncio's "never retrieved" must not follow.
                failure.task.exception()
        parts = [str(failure) for failure in failures]
        if self._leaks:
            parts.append("\n".join([f"The test leaves {numbered(len(self._leaks))}:", *self._leaks]))
        self._leaks, self._failures = [], []
        return "\n\n".join(parts)

    def judge(self) -> None:
        """Fail the test or warn, if there is something to report."""
        report = self.take_report()
        if not report:
            return
        if self.mode == "error":
            pytest.fail(report, pytrace=False)
        self.item.warn(pytest.PytestWarning(report))

    @contextlib.contextmanager
    def beside_errors(self, when: str) -> Iterator[None]:
        """Add the findings to the report of a test that fails for another reason."""
        try:
            yield
        except BaseException:
            report = self.take_report()
            if report:
                self.item.add_report_section(when, "bgtasks", report)
            raise


class LeakChecker(Observer):
    """The costly hooks of the plugin; registered when the first test needs them."""

    def __init__(self, config: pytest.Config, mode_of: Callable[[pytest.Item], str]) -> None:
        self._mode_of = mode_of
        self._test: CheckedTest | None = None
        # Tasks that outlast the test which started them, with its name.
        self._left_by: weakref.WeakKeyDictionary[asyncio.Task[Any], str] = weakref.WeakKeyDictionary()
        observe_all(self)
        config.add_cleanup(lambda: stop_observing_all(self))
        self._follow_runners(config)

    def _follow_runners(self, config: pytest.Config) -> None:
        """Look for leaked tasks when a runner closes, before the runner cancels them all."""
        close = asyncio.Runner.close

        def look_and_close(runner: asyncio.Runner) -> None:
            self._on_runner_close(runner)
            close(runner)

        setattr(asyncio.Runner, "close", look_and_close)  # noqa: B010  mypy sees a method
        config.add_cleanup(lambda: setattr(asyncio.Runner, "close", close))

    # -- the run of a test ----------------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Check one test, with coroutines that know where they were created."""
        mode = self._mode_of(item)
        if mode == "off":
            return (yield)
        self._test = CheckedTest(item, mode)
        depth = sys.get_coroutine_origin_tracking_depth()
        sys.set_coroutine_origin_tracking_depth(max(depth, 1))
        try:
            return (yield)
        finally:
            sys.set_coroutine_origin_tracking_depth(depth)
            self._test = None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Fail a test for failures and for tasks of closed loops; its fixtures may still end its other tasks."""
        test = self._test
        if test is None:
            return (yield)
        before = set(_in_flight())
        with test.beside_errors("call"):
            try:
                result = yield
            finally:
                test.left = set(_in_flight()) - before
            test.judge()
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """Fail the teardown for tasks that the test left and its fixtures did not end, and for later failures."""
        test = self._test
        if test is None:
            return (yield)
        with test.beside_errors("teardown"):
            try:
                result = yield
            finally:
                for record in _in_flight():
                    if record in test.left:
                        if record.task is not None:
                            self._left_by[record.task] = item.nodeid
                        test.add_leak(_describe(record))
            test.judge()
        return result

    # -- events during a test -------------------------------------------------------------------------------------

    def task_failed(self, record: Record, error: BaseException) -> None:
        """Add a failure to the test that runs."""
        test = self._test
        if test is None:
            return
        if record.task_set is not None:
            # A task of an executor: the failure belongs to the future that the executor returned.
            return
        text = _describe(record)
        task = record.task
        culprit = None if task is None else self._left_by.get(task)
        if culprit is not None:
            test.item.warn(pytest.PytestWarning(f"{text}, left by {culprit}, failed: {type(error).__name__}: {error}"))
            return
        if task is not None:
            # The registry marks a logged failure as retrieved; here only the test's own retrieval counts.
            task.remove_done_callback(retrieve_failure)
        test.add_failure(Failure(text, task, error, error.__traceback__))

    def tasks_abandoned(self, names: dict[str, int]) -> None:
        """Add the tasks that a closed loop left behind."""
        if self._test is not None:
            for name, count in names.items():
                self._test.add_leak(f"Background task '{name}' ({count} times), abandoned with its closed loop")

    def _on_runner_close(self, runner: asyncio.Runner) -> None:
        test = self._test
        in_flight = [] if test is None else list(_in_flight())
        if test is None or not in_flight:
            return
        try:
            loop = runner.get_loop()
        except RuntimeError:
            # Closed before.
            return
        for record in in_flight:
            if record.loop is loop:
                test.add_leak(_describe(record))


def _in_flight() -> Iterator[Record]:
    """Yield the record of every task that a manager owns and that has not ended."""
    for manager in all_managers():
        internals = ManagerInternals(manager)
        # The tasks of closed loops are reported by tasks_abandoned.
        internals.release_closed_loops()
        yield from internals.owned_records()


def _describe(record: Record) -> str:
    coro = record.coro
    origin = getattr(coro, "cr_origin", None)
    created = "created at an unknown place"
    if origin:
        file, line, function = origin[0]
        created = f"created at {file}:{line} in {function}"
    text = f"Background task '{record.name}' ({record.coroutine_name}), {created}"
    return text if coro is None or getattr(coro, "cr_frame", None) is None else f"{text}, {location_of(coro)}"
