"""The checks of the pytest plugin: they find tasks that a test leaves, and failures that nobody retrieved."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import pytest

# ruff: noqa: SLF001  only asyncio's own marks tell whether the outcome of a task was retrieved
from bgtasks._internals import ManagerInternals
from bgtasks._locations import location_of
from bgtasks._observers import Observer, all_managers, observe_all, stop_observing_all
from bgtasks._reporting import numbered
from bgtasks._task import retrieve_failure, users_traceback
from bgtasks.errors import text_of
from bgtasks.registry import Record

__all__ = ["LeakChecker"]


@dataclasses.dataclass(eq=False)
class Failure:
    """A background task that failed or timed out, and its exception as it was then."""

    name: str
    text: str
    task: asyncio.Task[Any] | None
    error: BaseException
    traceback: Any

    def on_end(self, _: asyncio.Task[Any]) -> None:
        """Note that the task has ended: what changes the traceback from now on looks at the exception."""
        self.traceback = self.error.__traceback__

    def was_seen(self) -> bool:
        """Return whether the exception was retrieved from the task, or raised again by ``wait_for_all``."""
        return self._is_retrieved() or self.error.__traceback__ is not self.traceback

    def _is_retrieved(self) -> bool:
        if self.task is None:
            return False
        if self.task.cancelled():
            # It timed out. The first that awaits it gets the CancelledError of its coroutine, later ones a new one.
            return self.task._make_cancelled_error().__traceback__ is None  # type: ignore[attr-defined]
        return not self.task._log_traceback

    def headline(self) -> str:
        """Return what pytest shows in its summary, whose lines it cuts: the name comes first."""
        return f"{self.name!r} failed: {text_of(self.error)}"

    def __str__(self) -> str:
        lines = "".join(traceback.format_exception(type(self.error), self.error, users_traceback(self.error)))
        return f"{self.text} failed:\n{lines.rstrip()}"


class Leak(NamedTuple):
    """A background task that a test left."""

    name: str
    text: str

    def headline(self) -> str:
        """Return what pytest shows in its summary."""
        return f"{self.name!r} is left"


class CheckedTest:
    """The findings about the background tasks of one test.

    Args:
        item: the test.
        mode: what to do with findings.
        expected: how many failures the test expects, and of tasks of which name, None for any; None if it did not say.

    """

    def __init__(self, item: pytest.Item, mode: str, expected: tuple[int, str | None] | None) -> None:
        self.item = item
        self.mode = mode
        # Tasks that the test itself started and left.
        self.left: set[Record] = set()
        # The test ran to its end.
        self.has_passed = False
        self._expected = expected
        self._leaks: list[Leak] = []
        self._failures: list[Failure] = []
        # The failures of the kind that the test expects.
        self._met: list[Failure] = []

    def add_leak(self, name: str, text: str) -> None:
        """Add a task that the test left."""
        self._leaks.append(Leak(name, text))

    def add_failure(self, failure: Failure) -> None:
        """Add a task that failed."""
        if self._expected is not None and self._expected[1] in (None, failure.name):
            self._met.append(failure)
        else:
            self._failures.append(failure)

    def take_report(self, is_over: bool) -> str:
        """Return the findings as text, empty if there are none, and forget them.

        Args:
            is_over: whether no further failure that the test expects can come.

        """
        failures = [failure for failure in self._failures if not failure.was_seen()]
        for failure in failures + self._met:
            if failure.task is not None and not failure.task.cancelled():
                # Reported here: asyncio's "never retrieved" must not follow.
                failure.task.exception()
        mismatch = self._mismatch(is_over)
        if mismatch:
            failures += self._met
        findings: list[Failure | Leak] = [*failures, *self._leaks]
        headlines = [finding.headline() for finding in findings]
        parts = ["; ".join(headlines + [mismatch] * bool(mismatch))] if headlines or mismatch else []
        parts += map(str, failures)
        if self._leaks:
            texts = [leak.text for leak in self._leaks]
            parts.append("\n".join([f"The test leaves {numbered(len(self._leaks))}:", *texts]))
        self._leaks, self._failures = [], []
        return "\n\n".join(parts)

    def _mismatch(self, is_over: bool) -> str:
        """Return what is wrong with the number of failures, if the test said how many it expects; once."""
        if self._expected is None:
            return ""
        count, name = self._expected
        if len(self._met) == count or (len(self._met) < count and not is_over):
            return ""
        self._expected = None
        tasks = "background tasks" if name is None else repr(name)
        return f"expected failures of {tasks}: {count}, came: {len(self._met)}"

    def judge(self, *, is_over: bool = False) -> None:
        """Fail the test or warn, if there is something to report; ``is_over`` as for ``take_report``."""
        report = self.take_report(is_over)
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
            report = self.take_report(is_over=False)
            if report:
                self.item.add_report_section(when, "bgtasks", report)
            raise


class LeakChecker(Observer):
    """The costly hooks of the plugin; registered when the first test needs them."""

    def __init__(
        self,
        config: pytest.Config,
        mode_of: Callable[[pytest.Item], str],
        expected_of: Callable[[pytest.Item], tuple[int, str | None] | None],
    ) -> None:
        self._mode_of = mode_of
        self._expected_of = expected_of
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
        self._test = CheckedTest(item, mode, self._expected_of(item))
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
            test.has_passed = True
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
                        test.add_leak(record.name, _describe(record))
            test.judge(is_over=test.has_passed)
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
        failure = Failure(record.name, text, task, error, error.__traceback__)
        if task is not None and record.outcome == "timed_out":
            # The task may raise this error itself.
            task.add_done_callback(failure.on_end)
        test.add_failure(failure)

    def task_timed_out(self, record: Record, error: TimeoutError) -> None:
        """Add a task that timed out: it has failed."""
        self.task_failed(record, error)

    def tasks_abandoned(self, names: dict[str, int]) -> None:
        """Add the tasks that a closed loop left behind."""
        if self._test is not None:
            for name, count in names.items():
                self._test.add_leak(name, f"Background task '{name}' ({count} times), abandoned with its closed loop")

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
                test.add_leak(record.name, _describe(record))


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
