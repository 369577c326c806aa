"""What the pytest plugin does once a test asks: it finds the tasks that are left, and the failures nobody looked at."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import pytest

from bgtasks._task import users_traceback
from bgtasks.manager import BackgroundTaskManager, managers, where
from bgtasks.registry import Record


class Failure(NamedTuple):
    """A background task that failed, and what tells whether somebody looked at its exception."""

    text: str
    task: asyncio.Task[Any] | None
    error: BaseException
    traceback: Any

    def was_seen(self) -> bool:
        """Say whether the exception was retrieved from the task, or raised anew by ``wait_for_all``."""
        retrieved = self.task is not None and not self.task._log_traceback
        return retrieved or self.error.__traceback__ is not self.traceback

    def __str__(self) -> str:
        lines = "".join(traceback.format_exception(type(self.error), self.error, users_traceback(self.error)))
        return f"{self.text} failed:\n{lines.rstrip()}"


class WatchedTest:
    """What was found out about the background tasks of one test."""

    def __init__(self, item: pytest.Item, mode: str) -> None:
        self.item = item
        self.mode = mode
        # Tasks that its own part started and left.
        self.left: set[Record] = set()
        self._leaks: list[str] = []
        self._failures: list[Failure] = []

    def add_leak(self, text: str) -> None:
        """Note a task that is left."""
        self._leaks.append(text)

    def add_failure(self, failure: Failure) -> None:
        """Note a task that failed."""
        self._failures.append(failure)

    def take_report(self) -> str:
        """Return what is to be reported, empty if nothing is, and forget it."""
        failures = [failure for failure in self._failures if not failure.was_seen()]
        for failure in failures:
            if failure.task is not None:
                # Reported here: the loop's "never retrieved" must not follow.
                failure.task.exception()
        parts = [str(failure) for failure in failures]
        if self._leaks:
            parts.append("\n".join([f"The test leaves {len(self._leaks)} background tasks:", *self._leaks]))
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
        """Put what was found into the report of a test that fails anyway, in place of failing it for that."""
        try:
            yield
        except BaseException:
            report = self.take_report()
            if report:
                self.item.add_report_section(when, "bgtasks", report)
            raise


class Watch:
    """The hooks of the plugin that cost something; registered when the first test asks for them."""

    def __init__(self, config: pytest.Config, mode_of: Callable[[pytest.Item], str]) -> None:
        self._mode_of = mode_of
        self._test: WatchedTest | None = None
        # Tasks that outlast the test which started them, with its name.
        self._left_by: weakref.WeakKeyDictionary[asyncio.Task[Any], str] = weakref.WeakKeyDictionary()
        self._patch(config, BackgroundTaskManager, "_report_failure", after=self._on_failure)
        self._patch(config, BackgroundTaskManager, "_on_abandoned", after=self._on_abandoned)
        # The last moment to see what a test leaves: the runner cancels all tasks of its loop.
        self._patch(config, asyncio.Runner, "close", before=self._on_runner_close)

    def _patch(
        self,
        config: pytest.Config,
        owner: type,
        name: str,
        *,
        before: Callable[..., object] | None = None,
        after: Callable[..., object] | None = None,
    ) -> None:
        original = getattr(owner, name)

        def patched(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(*args)
            result = original(*args, **kwargs)
            if after is not None:
                after(*args)
            return result

        own = name in vars(owner)
        setattr(owner, name, patched)
        config.add_cleanup(lambda: setattr(owner, name, original) if own else delattr(owner, name))

    # -- the run of a test ------------------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Watch one test, with coroutines that know where they were created."""
        mode = self._mode_of(item)
        if mode == "off":
            return (yield)
        self._test = WatchedTest(item, mode)
        depth = sys.get_coroutine_origin_tracking_depth()
        sys.set_coroutine_origin_tracking_depth(max(depth, 1))
        try:
            return (yield)
        finally:
            sys.set_coroutine_origin_tracking_depth(depth)
            self._test = None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Fail a test for what its own part left or broke; what it starts and its fixtures end is none of it."""
        test = self._test
        if test is None:
            return (yield)
        before = {record for _, record in _in_flight()}
        with test.beside_errors("call"):
            try:
                result = yield
            finally:
                test.left = {record for _, record in _in_flight()} - before
            test.judge()
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """Fail the teardown for what the end of the test's loop, or of its fixtures, brought to light."""
        test = self._test
        if test is None:
            return (yield)
        with test.beside_errors("teardown"):
            try:
                result = yield
            finally:
                for _, record in _in_flight():
                    if record in test.left:
                        if record.task is not None:
                            self._left_by[record.task] = item.nodeid
                        test.add_leak(_describe(record))
            test.judge()
        return result

    # -- what happens meanwhile -------------------------------------------------------------------------------------

    def _on_failure(self, manager: BackgroundTaskManager, record: Record, error: BaseException) -> None:
        test = self._test
        if test is None or isinstance(error, (SystemExit, KeyboardInterrupt)):
            return
        if record.group is not None:
            # An executor's: the failure belongs to the future that it gave out.
            return
        text = _describe(record)
        task = record.task
        culprit = None if task is None else self._left_by.get(task)
        if culprit is not None:
            test.item.warn(pytest.PytestWarning(f"{text}, left by {culprit}, failed: {type(error).__name__}: {error}"))
            return
        if task is not None:
            # The registry marks failures as seen when they are logged; here it matters whether the test looks at them.
            task.remove_done_callback(vars(sys.modules[type(record).__module__])["_retrieve"])
        test.add_failure(Failure(text, task, error, error.__traceback__))

    def _on_abandoned(self, manager: BackgroundTaskManager, names: dict[str, int]) -> None:
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
        for manager, record in in_flight:
            if manager._loop_of(record) is loop:
                test.add_leak(_describe(record))


def _in_flight() -> Iterator[tuple[BackgroundTaskManager, Record]]:
    """Give every task that managers own and that has not ended."""
    for reference in managers.valuerefs():
        manager = reference()
        if manager is not None:
            for record in manager._live_records():
                if not record.is_observed:
                    yield manager, record


def _describe(record: Record) -> str:
    coro = record.coro
    origin = getattr(coro, "cr_origin", None)
    created = "where it was created is not known"
    if origin:
        file, line, function = origin[0]
        created = f"created at {file}:{line} in {function}"
    text = f"Background task '{record.name}' ({record.coroutine_name}), {created}"
    return text if coro is None or getattr(coro, "cr_frame", None) is None else f"{text}, {where(coro)}"
