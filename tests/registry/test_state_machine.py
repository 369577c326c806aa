"""Random programs drive both twins in lockstep; a model of tasks checks what happens.

Each twin has a loop with a clock of its own. Its actions are a trace: every step of every coroutine, every refusal,
every report, every log record, with its time. The traces of the twins must be equal. The model reads one of them, event
by event, and fails at an impossible one. After each rule, when nothing is left to do at that time, the model is
compared with everything that the managers report.

Sleeps take whole seconds, timeouts 3.5 ms more, waits 3/8 s more. A shutdown cancels on a half second, and for the
second time on a quarter. So causes do not coincide by accident; ``collide`` makes them coincide on purpose.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from internals import release_closed_loops
from lockstep import STEP, Interruption, TraceHandler, Twin, Work
from task_model import FAILURES, OUTCOMES, TOLERANCE, Expected, Model, Waiter
from twins import MODULES, registry_module, shutdown_module

from bgtasks import _registry_py, errors

# Figures that the model does not know: both twins must have the same.
MEASURED = (
    *("p50_seconds", "p90_seconds", "p99_seconds", "max_seconds"),
    *("wait_p50_seconds", "wait_p99_seconds", "wait_max_seconds", "last_error"),
)
WHERE = ("thread", "parent_id", "origin", "progress")
EAGER = hasattr(asyncio, "eager_task_factory")
TIMEOUT_OFFSET = 0.0035
SECOND_CANCEL_GRACE = 0.1 + STEP
ENDS = ("return", *FAILURES, "raise CancelledError", "cancel itself", "cancel itself and return")


def works(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Work]:
    """Return a strategy for works."""
    usual: dict[str, st.SearchStrategy[Any]] = {
        "method": st.sampled_from(["create_task", "fire"]),
        "name": st.sampled_from(["a", "b"]),
        "timeout": st.none() | st.integers(0, 4).map(lambda seconds: seconds + TIMEOUT_OFFSET),
        "has_context": st.booleans(),
        "eager": st.booleans(),
        "waits": st.lists(st.sampled_from([0, 0, 1, 2, 5, math.inf]), max_size=3).map(tuple),
        "swallows": st.sampled_from([0, 0, 1, 2]),
        "cleanup": st.sampled_from([0, 0, 2]),
        "end": st.sampled_from(["return", "return", *ENDS]),
    }
    return st.builds(Work, **(usual | fields))


CHILDREN = st.lists(works(), max_size=2).map(tuple)
WORKS = works() | works(first=CHILDREN, last=CHILDREN)
CANCELS = st.lists(st.sampled_from(["id", "name", "task"]), min_size=1, max_size=3)
BAD_OPTIONS: list[dict[str, Any]] = [
    *({"timeout": value} for value in (0, -1, math.nan, math.inf, -math.inf, "x", "1", True, False, 1j, [], 10**400)),
    *({"context": value} for value in (contextvars.Context(), 5, [("a", 1)], "text")),
]
BAD_COROUTINES: list[Callable[[], Any]] = [
    lambda: asyncio.sleep,
    lambda: asyncio.get_running_loop().create_future(),
    lambda: None,
    lambda: 5,
    lambda: contextvars.Context,
    lambda: "x" * 1000,
]


def without_percentiles(stats: Any) -> Any:
    """Return statistics without the percentiles, which depend on the durations of single tasks."""
    names = {
        name: {key: value for key, value in counters.items() if not key.endswith("_seconds")}
        for name, counters in stats["names"].items()
    }
    return {**stats, "names": names}


is_open = precondition(lambda self: self.model.phase == "open")


class TwinsInLockstep(RuleBasedStateMachine):
    """The rules: the actions of a program on a manager."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = itertools.count()
        self.logger = logging.getLogger("bgtasks")
        self.logger_state = (self.logger.level, self.logger.propagate)
        self.handler = TraceHandler()
        self.logger.addHandler(self.handler)
        # Handlers of parent loggers keep records, and with them exceptions and their frames.
        self.logger.propagate = False
        self.logger.setLevel(logging.DEBUG)
        self.twins: list[Twin] = []

    @initialize(
        factory=st.sampled_from(["none", "none", "none", "foreign", *(["eager"] if EAGER else [])]),
        options=st.fixed_dictionaries(
            {
                "max_pending_tasks": st.sampled_from([None, None, 1, 3]),
                "overflow": st.sampled_from(["raise", "drop_newest"]),
                "max_concurrency": st.sampled_from([None, None, None, 1, 2]),
                "history": st.sampled_from([0, 4]),
            }
        ),
    )
    def make_managers(self, factory: str, options: dict[str, Any]) -> None:
        """Start with a manager on each twin."""
        self.twins = [Twin(kind, factory, options) for kind in MODULES]
        self.model = Model(options)
        self.model.verbose = self.logger.level == logging.DEBUG

    @property
    def now(self) -> float:
        """The time on both clocks."""
        return self.twins[0].loop.now

    def both(self, action: Callable[[Twin], object]) -> list[Any]:
        """Run an action on both twins, compare their traces, and have the model read one."""
        answers = []
        for twin in self.twins:
            self.handler.twin = twin
            answers.append(action(twin))
        first, second = (twin.trace for twin in self.twins)
        for left, right in itertools.zip_longest(first, second):
            assert left == right, f"the twins differ: {self.twins[0].kind} {left}, {self.twins[1].kind} {right}"
        try:
            self.model.read(first)
        except Exception as error:
            error.add_note("trace: " + "\n       ".join(map(str, first)))
            raise
        for twin in self.twins:
            twin.trace.clear()
            twin.ids.update(
                (task.key, task.task_id) for task in (*self.model.live.values(), *self.model.ended.values())
            )
        return answers

    def known(self, number: int) -> tuple[str, Work] | None:
        """Pick a task, a live one if there is any."""
        tasks = [*self.model.live.values()] or [*self.model.ended.values()]
        if not tasks:
            return None
        task = tasks[number % len(tasks)]
        return task.key, task.work

    # -- rules ---------------------------------------------------------------------------------------------------------

    @rule(work=WORKS)
    def create(self, work: Work) -> None:
        """Start one task."""
        key = f"t{next(self.keys)}"
        self.both(lambda twin: twin.run(lambda: twin.create(key, work)))

    @is_open
    @rule(works=st.lists(works(), min_size=2, max_size=5))
    def create_many(self, works: list[Work]) -> None:
        """Start several tasks in one callback."""
        keys = [f"t{next(self.keys)}" for _ in works]
        self.both(lambda twin: twin.run(lambda: twin.create_all(keys, works)))

    # At a cap, only afterwards it is known whether there is a task to cancel.
    @precondition(lambda self: self.model.phase == "open" and not self.model.cap)
    @rule(work=WORKS, hows=CANCELS, pauses=st.integers(0, 4))
    def create_and_cancel(self, work: Work, hows: list[str], pauses: int) -> None:
        """Cancel a task before its first step or in one of its first iterations."""
        key = f"t{next(self.keys)}"

        def cancel(twin: Twin) -> None:
            twin.ids[key] = self.model.last_id + 1
            for how in hows:
                twin.cancel(how, key, work)

        def create(twin: Twin) -> None:
            twin.create(key, work)
            if not pauses:
                cancel(twin)

        def act(twin: Twin) -> None:
            steps: list[Callable[[], object]] = [lambda: create(twin)]
            if pauses:
                steps += [lambda: None] * (pauses - 1) + [lambda: cancel(twin)]
            twin.run(*steps)

        self.both(act)

    @rule(number=st.integers(0, 20), hows=CANCELS)
    def cancel(self, number: int, hows: list[str]) -> None:
        """Cancel a task, perhaps repeatedly in one callback."""
        picked = self.known(number)
        if picked is None:
            return
        key, work = picked

        def act(twin: Twin) -> None:
            for how in hows:
                twin.cancel(how, key, work)

        self.both(lambda twin: twin.run(lambda: act(twin)))

    @rule()
    def cancel_nothing(self) -> None:
        """Cancel ids and names that do not exist."""
        assert self.both(lambda twin: (twin.manager.cancel(10**9), twin.manager.cancel("unknown"))) == [(0, 0), (0, 0)]

    @rule(number=st.integers(0, 20))
    def resolve(self, number: int) -> None:
        """Resolve the future that a task waits for."""
        picked = self.known(number)
        if picked is not None:
            self.both(lambda twin: twin.run(lambda: twin.resolve(picked[0])))

    @rule(seconds=st.integers(1, 6))
    def advance(self, seconds: int) -> None:
        """Advance the clocks."""
        until = self.now + seconds
        self.both(lambda twin: twin.advance_to(until))

    @is_open
    @rule(
        has_timeout=st.booleans(),
        before=st.lists(st.sampled_from(["complete", "id", "task"]), max_size=2),
        after=st.lists(st.sampled_from(["complete", "id", "task"]), max_size=2),
        pauses=st.integers(0, 3),
        swallows=st.sampled_from([0, 0, 1]),
    )
    def collide(self, has_timeout: bool, before: list[str], after: list[str], pauses: int, swallows: int) -> None:
        """Complete and cancel a task in the callback in which its timeout is over, in any order."""
        key = f"t{next(self.keys)}"
        work = Work(timeout=TIMEOUT_OFFSET if has_timeout else None, waits=(math.inf, 5), swallows=swallows)
        task_id = self.model.last_id + 1

        def act(twin: Twin, actions: list[str], pauses: int) -> None:
            if pauses:
                twin.loop.call_soon(act, twin, actions, pauses - 1)
                return
            for action in actions:
                if action == "complete":
                    twin.resolve(key)
                elif key in twin.handles:
                    twin.cancel(action, key, work)

        def start(twin: Twin) -> None:
            twin.ids[key] = task_id
            if has_timeout:
                twin.collisions[task_id] = (partial(act, twin, before, 0), partial(act, twin, after, pauses))
            else:
                twin.loop.call_later(TIMEOUT_OFFSET, act, twin, before, 0)
                twin.loop.call_later(TIMEOUT_OFFSET, act, twin, after, pauses)
            twin.create(key, work)

        def run(twin: Twin) -> None:
            now = twin.loop.now
            twin.run(lambda: start(twin))
            twin.advance_to(now + 1)
            twin.collisions.clear()

        self.both(run)

    @rule(method=st.sampled_from(["create_task", "fire"]), options=st.sampled_from(BAD_OPTIONS))
    def offer_bad_options(self, method: str, options: dict[str, Any]) -> None:
        """Pass a coroutine with an invalid option."""

        async def nothing() -> None:
            raise AssertionError("a refused coroutine ran")

        self.both(lambda twin: twin.run(lambda: twin.refuse(method, nothing, options)))

    @rule(method=st.sampled_from(["create_task", "fire"]), value=st.sampled_from(BAD_COROUTINES))
    def offer_no_coroutine(self, method: str, value: Callable[[], Any]) -> None:
        """Pass an object that is no coroutine."""
        self.both(lambda twin: twin.run(lambda: twin.refuse(method, value, {})))

    @precondition(lambda self: len(self.model.waiters) < 3)
    @rule(seconds=st.none() | st.integers(0, 4), return_exceptions=st.booleans(), works=st.lists(works(), max_size=3))
    def wait_for_all(self, seconds: int | None, return_exceptions: bool, works: list[Work]) -> None:
        """Start to wait for all tasks, and start further tasks."""
        key = f"w{next(self.keys)}"
        keys = [f"t{next(self.keys)}" for _ in works]
        timeout = None if seconds is None else seconds + 0.375
        deadline = math.inf if timeout is None else self.now + timeout
        self.model.waiters[key] = Waiter(deadline, return_exceptions, saw_idle=not self.model.live)
        self.both(
            lambda twin: twin.run(
                lambda: twin.wait(key, timeout, return_exceptions), lambda: twin.create_all(keys, works)
            )
        )

    @precondition(lambda self: self.model.waiters)
    @rule()
    def cancel_waiters(self) -> None:
        """Cancel the waits for all tasks, which cancels no task."""
        for waiter in self.model.waiters.values():
            waiter.cancelled = True
        keys = list(self.model.waiters)
        self.both(lambda twin: twin.run(lambda: [twin.waiters[key].cancel() for key in keys]))

    @is_open
    @rule(drain=st.sampled_from([0.0, 0.5, 2.5]), timeout=st.sampled_from([0.25, 1.25, 4.25]), late=works())
    def shutdown(self, drain: float, timeout: float, late: Work) -> None:
        """Shut down, start a task meanwhile, and check the report and the duration."""
        key = f"t{next(self.keys)}"
        begun = self.now
        initial = len(self.model.live)
        self.model.phase = "draining"
        self.model.cancellations = [(begun + drain, False), (begun + drain + timeout, True)]

        def act(twin: Twin) -> Any:
            twin.loop.call_later(0.125, twin.create, key, late)
            watchdog = twin.loop.call_later(drain + timeout + 1, twin.loop.stop)
            stats = twin.loop.run_until_complete(twin.manager.shutdown(timeout, drain=drain))
            watchdog.cancel()
            twin.run_until_idle()
            return stats, twin.loop.now

        (stats, ended), (other_stats, _) = self.both(act)
        # Cancellations that were not needed did not happen.
        self.model.cancellations = []
        self.model.check_overdue(self.now)
        assert stats.pop("duration_seconds") == pytest.approx(ended - begun)
        assert ended - begun <= drain + timeout + SECOND_CANCEL_GRACE
        other_stats.pop("duration_seconds")
        names = sorted(task.work.name for task in self.model.live.values())
        assert stats == other_stats
        assert stats == {
            "status": "timeout" if names else "completed",
            "initial_tasks": initial,
            "completed_tasks": max(initial - len(names), 0),
            "remaining_tasks": len(names),
            "remaining_names": names,
        }
        self.model.phase = "closed"
        self.both(lambda twin: twin.advance_to(math.ceil(ended)))

    @precondition(lambda self: self.model.phase == "closed")
    @rule()
    def shutdown_again(self) -> None:
        """Shut down once more."""
        for stats in self.both(lambda twin: twin.loop.run_until_complete(twin.manager.shutdown())):
            assert stats["status"] == "already_shutdown"
            assert stats["remaining_tasks"] == len(self.model.live)

    @precondition(lambda self: self.model.phase == "closed" and not self.model.live)
    @rule(data=st.data())
    def replace_managers(self, data: st.DataObject) -> None:
        """Continue with new managers."""
        self.both(lambda twin: twin.loop.close())
        factory = self.twins[0].factory
        options = {
            "max_pending_tasks": self.model.cap,
            "overflow": self.model.overflow,
            "max_concurrency": data.draw(st.sampled_from([None, 1, 2]), label="max_concurrency"),
            "history": self.model.history,
        }
        self.make_managers(factory, options)

    @precondition(lambda self: not self.model.waiters)
    @rule()
    def close_loops(self) -> None:
        """Close the loop of each twin, running tasks or not, and continue on a new one."""
        now = self.now

        def act(twin: Twin) -> None:
            twin.loop.close()
            # A query changes nothing, and already counts the tasks as abandoned.
            before = without_percentiles(twin.manager.stats())
            release_closed_loops(twin.manager)
            assert without_percentiles(twin.manager.stats()) == before

        with self.model.closing(now):
            self.both(act)
        for twin in self.twins:
            twin.open_loop(now)

    @rule(level=st.sampled_from([logging.DEBUG, logging.WARNING]))
    def set_level(self, level: int) -> None:
        """Change the log level, and with it the ends that the registry reports."""
        self.logger.setLevel(level)
        self.model.verbose = level == logging.DEBUG

    # -- checks --------------------------------------------------------------------------------------------------------

    @invariant()
    def all_is_well(self) -> None:
        """Compare everything that the managers report with the model."""
        if self.twins:
            self.nothing_is_overdue()
            self.counters_are_right()
            self.live_tasks_are_shown()
            self.finished_tasks_leave_nothing()
            self.history_is_right()

    def nothing_is_overdue(self) -> None:
        """Check that everything has happened that was due by now."""
        self.model.check_overdue(self.now)

    def counters_are_right(self) -> None:
        """Compare the counters."""
        percentiles = []
        for twin in self.twins:
            stats = twin.manager.stats()
            assert stats["started"] == stats["in_flight"] + sum(stats[outcome] for outcome in OUTCOMES)
            percentiles.append(
                {name: {key: counters.pop(key) for key in MEASURED} for name, counters in stats["names"].items()}
            )
            assert stats == {**self.model.stats(), "waiting": 0, "retried": 0, "given_up": 0}
            assert twin.manager.dropped_count == self.model.dropped
            assert twin.manager.get_task_count() == twin.manager.pending_count == len(self.model.live)
            if self.model.limit is not None:
                assert stats["running"] <= self.model.limit
        assert percentiles[:1] == percentiles[1:]

    def live_tasks_are_shown(self) -> None:
        """Compare the infos of live tasks."""
        shown: list[list[dict[str, Any]]] = []
        for twin in self.twins:
            infos = twin.manager.get_task_info()
            shown.append([{key: info.pop(key) for key in WHERE} for info in infos])
            assert len({info.pop("loop") for info in infos}) <= 1
            expected = sorted(self.model.live.values(), key=lambda task: task.task_id)
            assert [info["task_id"] for info in infos] == [task.task_id for task in expected]
            for info, task in zip(infos, expected, strict=True):
                payload = twin.payloads[task.key]()
                assert info == {
                    "task_id": task.task_id,
                    "name": task.work.name,
                    "coroutine": "Twin.work",
                    "state": "queued" if task.begun is None else "running",
                    "age_seconds": pytest.approx(self.now - task.since, abs=TOLERANCE),
                    "timeout": task.work.timeout,
                    "time_left_seconds": self.time_left(task),
                    "context": {"payload": payload} if task.work.has_context else {},
                    "attempt": 1,
                    "next_attempt_seconds": None,
                    "done": False,
                    "cancelled": False,
                    "service": False,
                }
                handle = twin.manager.get_task(task.task_id)
                assert handle is twin.handles.get(task.key, handle)
                assert handle is not None
                assert not handle.done()
                assert handle.get_name() == task.work.name
                assert twin.manager.get_task_id(handle) == task.task_id
        assert shown[:1] == shown[1:]

    def time_left(self, task: Any) -> Any:
        """Return the expected ``time_left_seconds``."""
        timeout = task.work.timeout
        if timeout is None or task.begun is None:
            return timeout
        return pytest.approx(max(timeout - (self.now - task.since), 0), abs=TOLERANCE)

    def finished_tasks_leave_nothing(self) -> None:
        """Check the outcomes of ended tasks, and that their payloads are freed."""
        for twin in self.twins:
            # Children first: the frame of a child that failed inside a step of its parent keeps the parent's frame.
            for key in sorted(twin.handles.keys() - self.model.live.keys(), key=len, reverse=True):
                task = self.model.ended[key]
                # Even while the task is kept. But the traceback of an error keeps the payload, also that of a child
                # which failed inside a step of its parent, and a wait for all tasks keeps errors.
                is_free = task.outcome == "completed" and not twin.waiters
                assert not is_free or twin.payloads[key]() is None, f"{twin.kind} keeps what {key} held"
                self.check_handle(twin.handles.pop(key), task)
            for key in twin.waiters.keys() - self.model.waiters.keys():
                del twin.waiters[key]
            for key in twin.futures.keys() - self.model.live.keys():
                del twin.futures[key]
            # A child that its parent started while it failed keeps the parent's error.
            held = {key for key in twin.payloads if any(child.startswith(f"{key}.") for child in self.model.live)}
            over = set() if twin.waiters else twin.payloads.keys() - self.model.live.keys() - held
            if any(self.model.ended[key].outcome == "abandoned" for key in over & self.model.ended.keys()):
                # A task that is never done and the future that it waits for refer to each other.
                gc.collect()
            for key in over:
                assert twin.payloads.pop(key)() is None, f"{twin.kind} keeps what {key} held"

    def check_handle(self, handle: asyncio.Task[Any], task: Expected) -> None:
        """Check that an asyncio task ended as in the model."""
        if task.outcome == "abandoned":
            assert not handle.done()
        elif task.outcome in ("cancelled", "timed_out") or task.work.end == "cancel itself and return":
            assert handle.cancelled()
        elif task.outcome == "failed":
            assert errors.text_of(handle.exception() or Interruption()) == task.error
        else:
            assert handle.result() == task.key

    def history_is_right(self) -> None:
        """Compare the histories of finished tasks."""
        by_id = {task.task_id: task for task in self.model.ended.values()}
        histories = [twin.manager.get_history() for twin in self.twins]
        for entries in histories:
            assert len(entries) == min(self.model.history, len(by_id))
            for entry in entries:
                task = by_id[entry["task_id"]]
                assert entry.pop("ended_at") == pytest.approx(time.time(), abs=3600)
                assert entry.pop("duration_seconds") == pytest.approx(task.duration, abs=TOLERANCE)
                assert entry == {
                    "task_id": task.task_id,
                    "name": task.work.name,
                    "coroutine": "Twin.work",
                    "outcome": task.outcome,
                    "error": task.error,
                }
        assert histories[:1] == histories[1:]

    def teardown(self) -> None:
        """End every task, and check that nothing is left."""
        try:
            # Only if no check failed before.
            if self.twins and sys.exception() is None:
                self.end_all()
        finally:
            self.logger.removeHandler(self.handler)
            for twin in self.twins:
                twin.loop.close()
                # Tasks that a failed run left.
                release_closed_loops(twin.manager)
                twin.module.time = shutdown_module(twin.kind).time = time
            self.logger.setLevel(self.logger_state[0])
            self.logger.propagate = self.logger_state[1]

    def end_all(self) -> None:
        """Cancel all tasks until none is left."""
        for waiter in self.model.waiters.values():
            waiter.cancelled = True
        self.both(lambda twin: twin.run(lambda: [waiter.cancel() for waiter in twin.waiters.values()]))
        for _ in range(20):
            for key, task in list(self.model.live.items()):
                self.both(lambda twin, key=key, work=task.work: twin.run(lambda: twin.cancel("id", key, work)))
                self.nothing_is_overdue()
            if not self.model.live:
                break
            self.advance(6)
        self.all_is_well()
        assert not self.model.live
        for twin in self.twins:
            twin.advance_to(self.now + 1)
            assert not twin.loop._scheduled
            assert not asyncio.all_tasks(twin.loop)
        assert not _registry_py._in_use


# If it fails, reducing the example takes minutes.
@pytest.mark.timeout(300)
def test_twins_behave_like_the_model() -> None:
    """Both twins behave the same, and as the model says, under random programs."""
    assert registry_module("cython") is not registry_module("python")
    run_state_machine_as_test(
        TwinsInLockstep,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            print_blob=True,
            derandomize="CI" in os.environ,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )
