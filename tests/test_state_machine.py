"""Both twins driven in lockstep through random programs, and held against one model of what tasks do.

Each twin has a loop with a clock of its own. What it did is a trace: every step of every coroutine, every refusal, every
log record, with its time. The traces of the twins must be equal, and the model reads one of them event by event and
refuses what may not happen. After each rule, when nothing is left to do at that time, the model is compared with all that
the managers tell.

So that causes do not meet by accident, sleeps take whole seconds, timeouts 3.5 ms more than that, waits end on a half
second, the second cancellation of a shutdown on three quarters. ``collide`` makes them meet on purpose.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import itertools
import logging
import math
import os
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from loops import VirtualLoop
from twins import MODULES, manager_module, registry_module

from bgtasks import _registry_py, errors

EAGER = hasattr(asyncio, "eager_task_factory")
TIMEOUT_OFFSET = 0.0035
# A timeout of TIMEOUT_OFFSET is over at the next whole millisecond.
TICK = 0.004
TOLERANCE = 1e-6
IDS_A_LOOP = 1024
DROP_WARNING_INTERVAL = 5.0
SECOND_CANCEL_GRACE = 0.1

OUTCOMES = ("completed", "failed", "cancelled", "timed_out", "abandoned")
FAILURES = {"fail": "ValueError", "raise GeneratorExit": "GeneratorExit", "raise BaseException": "Interruption"}
ENDS = ("return", *FAILURES, "raise CancelledError", "cancel itself", "cancel itself and return")
LOG_TEXTS = {
    "completed": "Background task '{name}' completed after {duration:.3f} s",
    "cancelled": "Background task '{name}' was cancelled after {duration:.3f} s",
    "timed_out": "Background task '{name}' ended after its timeout, {duration:.3f} s old",
    "failed": "Background task '{name}' failed after {duration:.3f} s: {error}",
}


class Interruption(BaseException):
    """No ``Exception``, and yet it does not stop the loop."""


class Payload:
    """What a task holds, in its coroutine and in its context, and nothing may hold after it."""


@dataclass(frozen=True)
class Work:
    """A task to be: how it is started, and what its coroutine does.

    ``waits`` are seconds; 0 is a bare suspension, infinity a wait until the test says so. ``swallows`` cancellations are
    ignored, each ends the wait it meets; the next one is followed by ``cleanup`` seconds of sleep. ``first`` and ``last``
    are the children it starts when it starts and when it ends.
    """

    method: str = "create_task"
    name: str = "a"
    timeout: float | None = None
    has_context: bool = False
    eager: bool = False
    waits: tuple[float, ...] = ()
    swallows: int = 0
    cleanup: int = 0
    end: str = "return"
    first: tuple[Work, ...] = ()
    last: tuple[Work, ...] = ()

    def options(self, payload: Payload) -> dict[str, Any]:
        """Return the keyword arguments of ``method``."""
        options: dict[str, Any] = {"name": self.name, "timeout": self.timeout}
        if self.has_context:
            options["context"] = {"payload": payload}
        if self.method == "create_task":
            options["eager_start"] = self.eager
        return options


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


class Twin:
    """One twin: its manager on a loop of its own, and the trace of what happened there."""

    def __init__(self, kind: str, factory: str, options: dict[str, Any]) -> None:
        self.kind = kind
        self.factory = factory
        self.module = manager_module(kind)
        # The manager's own clock: the interval between warnings and the duration of a shutdown.
        clock: Any = SimpleNamespace(monotonic=lambda: self.loop.now, time=time.time)
        self.module.time = clock
        self.trace: list[tuple[Any, ...]] = []
        self.handles: dict[str, asyncio.Task[Any]] = {}
        self.waiters: dict[str, asyncio.Task[Any]] = {}
        self.futures: dict[str, asyncio.Future[None]] = {}
        self.payloads: dict[str, weakref.ref[Payload]] = {}
        self.ids: dict[str, int] = {}
        self.open_loop(1000.0)
        self.manager = self.module.BackgroundTaskManager(on_error=self.on_error, **options)

    def open_loop(self, now: float) -> None:
        """Go on with a new loop."""
        self.loop = VirtualLoop()
        self.loop.now = now
        self.loop.set_exception_handler(
            lambda loop, context: self.note("loop_error", context["message"], repr(context.get("exception")))
        )
        if self.factory == "eager":
            self.loop.set_task_factory(asyncio.eager_task_factory)
        elif self.factory == "foreign":
            self.loop.set_task_factory(lambda loop, coro, **options: asyncio.Task(coro, loop=loop, **options))

    def note(self, *event: Any) -> None:
        """Put an event into the trace."""
        self.trace.append((round(self.loop.now, 6), *event))

    def on_error(self, info: Any, error: BaseException) -> None:
        """Note what the hook of the manager is given."""
        self.note("hook", info["task_id"], info["state"], info["done"], type(error).__name__)

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self, *actions: Callable[[], object]) -> None:
        """Run each action in an iteration of its own, then go on until nothing is left to do at this time."""
        for action in actions:
            self.loop.call_soon(action)
            self.iterate()
        self.settle()

    def iterate(self) -> None:
        """Run one iteration of the loop."""
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()

    def settle(self) -> None:
        """Run the loop until it would have to wait for its clock."""
        for _ in range(1000):
            self.iterate()
            if not self.loop._ready:
                return
        raise AssertionError("the loop does not come to rest")

    def advance_to(self, when: float) -> None:
        """Run the loop until its clock shows ``when``."""
        self.loop.call_at(when, self.loop.stop)
        self.loop.run_forever()
        self.settle()

    # -- what the rules do ---------------------------------------------------------------------------------------------

    def create(self, key: str, work: Work) -> None:
        """Start a task, and note how that went."""
        payload = Payload()
        self.payloads[key] = weakref.ref(payload)
        coro = self.work(key, work, payload)
        dropped = self.manager.dropped_count
        self.note("create", key, work, self.manager.get_task_count())
        try:
            task = getattr(self.manager, work.method)(coro, **work.options(payload))
        except errors.BgtasksError as error:
            self.note("refused", key, type(error).__name__, str(error), inspect.getcoroutinestate(coro))
            return
        if self.manager.dropped_count > dropped:
            self.note("dropped", key, task, inspect.getcoroutinestate(coro))
        elif task is not None:
            self.handles[key] = task

    def cancel(self, how: str, key: str, work: Work) -> None:
        """Cancel a task by its id or its handle, or all tasks of its name."""
        if how == "task" and key not in self.handles:
            how = "id"
        self.note("cancel", how, key)
        if how == "task":
            answer = int(self.handles[key].cancel("the test says so"))
        else:
            answer = self.manager.cancel(self.ids[key] if how == "id" else work.name)
        self.note("cancelled", answer)

    def resolve(self, key: str) -> None:
        """Give a task what it waits for."""
        future = self.futures.get(key)
        if future is not None and not future.done():
            self.note("resolve", key)
            future.set_result(None)

    def wait(self, key: str, timeout: float | None, return_exceptions: bool) -> None:
        """Start to wait for all tasks."""
        self.waiters[key] = waiter = self.loop.create_task(
            self.manager.wait_for_all(timeout=timeout, return_exceptions=return_exceptions)
        )
        waiter.add_done_callback(lambda done: self.note("waited", key, ending(done)))

    def refuse(self, method: str, value: Callable[[], Any], options: dict[str, Any]) -> None:
        """Hand in what is not to be taken, and note the answer."""
        coro = value()
        dropped = self.manager.dropped_count
        self.note("offer", method, inspect.iscoroutine(coro), sorted(options))
        try:
            getattr(self.manager, method)(coro, **options)
        except errors.BgtasksError as error:
            self.note("answer", type(error).__name__, str(error))
        else:
            self.note("answer", "dropped" if self.manager.dropped_count > dropped else "taken", "")
        if inspect.iscoroutine(coro):
            assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED

    async def work(self, key: str, work: Work, payload: Payload) -> str:
        """Do what a ``Work`` says and note each step."""
        self.note("start", key)
        swallowed = 0
        try:
            for number, child in enumerate(work.first):
                self.create(f"{key}.first{number}", child)
            for seconds in work.waits:
                try:
                    await self.pause(key, seconds)
                except asyncio.CancelledError:
                    if swallowed == work.swallows:
                        raise
                    swallowed += 1
                    self.note("swallow", key)
                else:
                    self.note("step", key)
            await self.end(key, work)
            return key
        except asyncio.CancelledError:
            if work.cleanup:
                self.note("cleanup", key)
                await asyncio.sleep(work.cleanup)
            raise
        finally:
            how = "return" if sys.exception() is None else type(sys.exception()).__name__
            for number, child in enumerate(work.last):
                self.create(f"{key}.last{number}", child)
            self.note("end", key, how)

    async def pause(self, key: str, seconds: float) -> None:
        """Wait as long as told."""
        if seconds == math.inf:
            self.futures[key] = self.loop.create_future()
            await self.futures[key]
        else:
            await asyncio.sleep(seconds)

    async def end(self, key: str, work: Work) -> None:
        """End as told."""
        if work.end == "fail":
            raise ValueError(key)
        if work.end == "raise GeneratorExit":
            raise GeneratorExit(key)
        if work.end == "raise BaseException":
            raise Interruption(key)
        if work.end == "raise CancelledError":
            raise asyncio.CancelledError(key)
        if work.end.startswith("cancel itself"):
            task = asyncio.current_task()
            assert task is not None
            self.note("cancel_itself", key)
            task.cancel()
            if work.end == "cancel itself":
                await asyncio.sleep(0)


def ending(task: asyncio.Task[Any]) -> str:
    """Return how a task ended: its exception or its result as a text."""
    if task.cancelled():
        return "cancelled"
    error = task.exception()
    return f"returned {task.result()!r}" if error is None else errors.text_of(error)


@dataclass
class Expected:
    """A task as the model knows it."""

    key: str
    work: Work
    task_id: int
    created: float
    # fire() put its start off: cancelled before that it ends at once.
    deferred: bool
    begun: float | None = None
    position: int = 0
    # When what it waits for comes.
    wake_at: float = math.inf
    swallowed: int = 0
    cancels: int = 0
    expired: bool = False
    # A CancelledError is on its way.
    interrupted: bool = False
    cancelled_itself: bool = False
    cleaning: bool = False
    how: str = ""
    outcome: str = ""
    duration: float = 0.0
    reports: int = 0

    def next_wait(self, now: float) -> None:
        """Go on to the wait at ``position``."""
        waits = self.work.waits
        self.wake_at = now + waits[self.position] if self.position < len(waits) else now

    def count_cancel(self) -> None:
        """Note a call of ``cancel()``."""
        self.cancels += 1
        self.interrupted = True

    @property
    def since(self) -> float:
        """When its age and its timeout began to count."""
        return self.created if self.begun is None else self.begun

    @property
    def deadline(self) -> float:
        """When its timeout is over."""
        return math.inf if self.work.timeout is None or self.expired else self.since + self.work.timeout

    @property
    def error(self) -> str | None:
        """What the log says of a failure."""
        return f"{self.how}: {self.key}" if self.outcome == "failed" else None

    def log_text(self) -> str:
        """Return the message of the log record at its end."""
        return LOG_TEXTS[self.outcome].format(name=self.work.name, duration=self.duration, error=self.error)


@dataclass
class Waiter:
    """Somebody in ``wait_for_all``, as the model knows it."""

    deadline: float
    return_exceptions: bool
    failures: list[str] = field(default_factory=list)
    cancelled: bool = False


def same_time(left: float, right: float) -> bool:
    """Tell whether two times are one."""
    return left == right or abs(left - right) < TOLERANCE


class Model:
    """What may happen and what must have happened: reads the trace of a twin."""

    def __init__(self, factory: str, options: dict[str, Any]) -> None:
        self.cap: int = options["max_pending_tasks"]
        self.overflow: str = options["overflow"]
        self.limit: int | None = options["max_concurrency"]
        self.history: int = options["history"]
        self.defers = EAGER and factory == "none" and self.limit is None
        self.verbose = True
        self.live: dict[str, Expected] = {}
        self.ended: dict[str, Expected] = {}
        self.waiters: dict[str, Waiter] = {}
        self.started: Counter[str] = Counter()
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.dropped = 0
        self.last_drop_warning = -math.inf
        self.last_id = 0
        self.loops = 1
        self.phase = "open"
        # What is to come next in the trace, if anything is.
        self.due: list[tuple[Any, ...]] = []
        # The cancellations of a shutdown: (time, whether stragglers are logged).
        self.cancellations: list[tuple[float, bool]] = []
        self.matched = 0

    def read(self, trace: Iterable[tuple[Any, ...]]) -> None:
        """Take in events; an impossible one is an AssertionError."""
        for now, kind, *details in trace:
            try:
                self.make_due_cancellations(now)
                if self.due and self.due[0][0] == kind:
                    assert tuple(details) == self.due.pop(0)[1:]
                else:
                    getattr(self, f"on_{kind}")(now, *details)
            except AssertionError as error:
                raise AssertionError(f"at {now}: {kind} {details} may not happen here: {error}") from error

    def make_due_cancellations(self, now: float) -> None:
        """Cancel what a shutdown cancels by ``now``."""
        while self.cancellations and self.cancellations[0][0] <= now + TOLERANCE:
            _, logged = self.cancellations.pop(0)
            self.phase = "cancelling"
            if logged:
                self.due += [("straggler", task.work.name) for task in self.live.values()]
            for task in self.live.values():
                task.count_cancel()

    # -- starting ------------------------------------------------------------------------------------------------------

    def verdict(self, now: float, count: int, inside: bool) -> str:
        """Say what becomes of a task that is handed in."""
        if self.phase == "closing":
            return "NoRunningLoopError"
        if self.phase != "open" and not (self.phase == "draining" and inside):
            return "ManagerClosedError"
        if not self.cap or count < self.cap:
            return "taken"
        if self.overflow == "raise":
            return "TaskRejectedError"
        self.dropped += 1
        if now - self.last_drop_warning >= DROP_WARNING_INTERVAL - TOLERANCE:
            self.last_drop_warning = now
            self.due.append(("drop_warning", self.dropped))
        return "dropped"

    def on_create(self, now: float, key: str, work: Work, count: int) -> None:
        verdict = self.verdict(now, count, "." in key)
        if verdict == "taken":
            self.last_id += 1
            self.started[work.name] += 1
            deferred = self.defers and work.method == "fire"
            self.live[key] = Expected(key, work, self.last_id, now, deferred)
        elif verdict == "dropped":
            self.due.append(("dropped", key, None, inspect.CORO_CLOSED))
        else:
            self.due.append(("was_refused", key, verdict))

    def on_refused(self, now: float, key: str, kind: str, text: str, state: str) -> None:
        assert self.due.pop(0) == ("was_refused", key, kind)
        assert state == inspect.CORO_CLOSED
        assert text

    def on_offer(self, now: float, method: str, is_coroutine: bool, options: list[str]) -> None:
        if not is_coroutine:
            verdict = "NotACoroutineError"
        else:
            verdict = self.verdict(now, len(self.live), False)
            if verdict == "taken":
                verdict = "InvalidTimeoutError" if options == ["timeout"] else "InvalidContextError"
        self.due.append(("verdict", verdict))

    def on_answer(self, now: float, kind: str, text: str) -> None:
        assert self.due.pop(0) == ("verdict", kind)

    # -- running -------------------------------------------------------------------------------------------------------

    def on_start(self, now: float, key: str) -> None:
        task = self.live[key]
        assert task.begun is None
        assert not task.interrupted
        task.begun = now
        task.next_wait(now)
        if self.limit is not None:
            assert sum(other.begun is not None for other in self.live.values()) <= self.limit

    def on_step(self, now: float, key: str) -> None:
        task = self.live[key]
        assert not task.interrupted
        assert same_time(task.wake_at, now)
        task.position += 1
        task.next_wait(now)

    def on_resolve(self, now: float, key: str) -> None:
        self.live[key].wake_at = now

    def on_swallow(self, now: float, key: str) -> None:
        task = self.live[key]
        assert task.interrupted
        assert task.swallowed < task.work.swallows
        task.interrupted = False
        task.swallowed += 1
        task.position += 1
        task.next_wait(now)

    def on_cleanup(self, now: float, key: str) -> None:
        task = self.live[key]
        self.check_cancelled(task)
        task.interrupted = False
        task.cleaning = True
        task.wake_at = now + task.work.cleanup

    def check_cancelled(self, task: Expected) -> None:
        """Check that a task is right to raise CancelledError from its waits or its end."""
        if task.position == len(task.work.waits) and not task.interrupted:
            assert task.work.end == "raise CancelledError"
        else:
            assert task.interrupted
            assert task.cancelled_itself or task.swallowed == task.work.swallows

    def on_cancel_itself(self, now: float, key: str) -> None:
        task = self.live[key]
        assert not task.interrupted
        assert task.position == len(task.work.waits)
        task.cancelled_itself = True
        task.cancels += 1
        task.interrupted = task.work.end == "cancel itself"

    def on_end(self, now: float, key: str, how: str) -> None:
        task = self.live[key]
        if self.phase == "closing":
            assert how == "GeneratorExit"
            return
        if how == "CancelledError":
            if not task.cleaning:
                assert not task.work.cleanup
                self.check_cancelled(task)
            else:
                assert task.interrupted or same_time(task.wake_at, now)
            outcome = "timed_out" if task.expired and task.cancels <= 1 else "cancelled"
        else:
            assert not task.interrupted
            assert not task.cleaning
            assert task.position == len(task.work.waits)
            assert same_time(task.wake_at, now)
            assert how == FAILURES.get(task.work.end, "return")
            outcome = "completed" if how == "return" else "failed"
        self.finish(task, now, outcome, how)

    def finish(self, task: Expected, now: float, outcome: str, how: str) -> None:
        """Move a task to those that ended."""
        task.how, task.outcome = how, outcome
        task.duration = now - task.since
        self.ended[task.key] = self.live.pop(task.key)
        self.outcomes[task.work.name, outcome] += 1
        if outcome == "failed":
            for waiter in self.waiters.values():
                waiter.failures.append(f"{how}: {task.key}")

    def finish_unstarted(self, task: Expected, now: float) -> None:
        """End a task whose coroutine was not entered."""
        assert task.begun is None
        assert task.interrupted
        self.finish(task, now, "cancelled", "CancelledError")

    # -- stopping ------------------------------------------------------------------------------------------------------

    def on_cancel(self, now: float, how: str, key: str) -> None:
        named = (self.live.get(key) or self.ended[key]).work.name
        if how == "name":
            matching = [task for task in self.live.values() if task.work.name == named]
        else:
            matching = [self.live[key]] if key in self.live else []
        self.matched = len(matching)
        for task in matching:
            task.count_cancel()
            if task.deferred and task.begun is None:
                self.finish_unstarted(task, now)

    def on_cancelled(self, now: float, answer: int) -> None:
        assert answer == self.matched

    def on_waited(self, now: float, key: str, text: str) -> None:
        waiter = self.waiters.pop(key)
        if waiter.cancelled:
            assert text == "cancelled"
        elif not self.live:
            failures = [] if waiter.return_exceptions else waiter.failures
            assert text == (failures[0] if failures else "returned None")
        else:
            assert same_time(waiter.deadline, now)
            assert text == "returned None"

    # -- what is told --------------------------------------------------------------------------------------------------

    def on_log(self, now: float, level: int, text: str, task_id: int | None) -> None:
        if task_id is None:
            self.check_general_log(now, level, text)
            return
        assert self.verbose or level >= logging.WARNING
        task = next(task for task in (*self.live.values(), *self.ended.values()) if task.task_id == task_id)
        name = task.work.name
        if text == f"Background task '{name}' timed out after {task.work.timeout} seconds":
            assert level == logging.WARNING
            assert task.deadline - TOLERANCE <= now <= task.deadline + 0.001 + TOLERANCE
            task.expired = True
            task.count_cancel()
        elif text.startswith(f"Background task '{name}' still runs at the end of shutdown, at {__file__}:"):
            assert level == logging.WARNING
            assert self.due.pop(0) == ("straggler", name)
        else:
            if task.key in self.live:
                self.finish_unstarted(task, now)
            assert text == task.log_text()
            assert level == (logging.ERROR if task.outcome == "failed" else logging.DEBUG)
            task.reports += 1
            assert task.reports == 1
            if task.outcome == "failed":
                self.due.append(("hook", task_id, "failed", True, task.how))

    def check_general_log(self, now: float, level: int, text: str) -> None:
        """Check a log record that is not about one task."""
        assert level == logging.WARNING
        if "Dropped" in text:
            kind, count = self.due.pop(0)
            assert kind == "drop_warning"
            assert text.startswith(f"{self.cap} tasks are in flight (max_pending_tasks), no room for ")
            assert text.endswith(f"Dropped {count} so far; the next warning comes in 5 s at the earliest.")
        elif text.startswith("A closed"):
            assert self.phase == "closing"
            counts = Counter(task.work.name for task in self.live.values())
            names = ", ".join(f"{name} ({count})" for name, count in counts.items())
            assert text == (
                f"A closed event loop left {len(self.live)} background tasks behind; they are abandoned: {names}"
            )
        else:
            ending_now = [waiter for waiter in self.waiters.values() if same_time(waiter.deadline, now)]
            assert ending_now
            assert text.startswith(f"{len(self.live)} tasks still run after waiting ")

    # -- when nothing is left to do --------------------------------------------------------------------------------------

    def settle(self, now: float) -> None:
        """Check that all that had to happen by ``now`` has happened."""
        self.make_due_cancellations(now)
        for task in list(self.live.values()):
            if task.begun is None and task.interrupted:
                assert not self.verbose, f"{task.key} was cancelled and not reported"
                self.finish_unstarted(task, now)
        assert not self.due, f"{self.due} did not happen"
        begun = [task for task in self.live.values() if task.begun is not None]
        queued = [task for task in self.live.values() if task.begun is None]
        for task in begun:
            assert not task.interrupted, f"{task.key} was not cancelled"
            assert task.wake_at > now + TOLERANCE, f"{task.key} did not go on"
            assert task.deadline + 0.001 + TOLERANCE > now, f"the timeout of {task.key} did not come"
        if queued:
            assert self.limit is not None, f"{queued[0].key} did not start"
            assert len(begun) == self.limit, "a place is free and a task is queued"
            assert max(task.task_id for task in begun) < min(task.task_id for task in queued)
        for key, waiter in self.waiters.items():
            assert self.live, f"{key} still waits for nothing"
            assert waiter.deadline > now, f"{key} waits for too long"
        for task in self.ended.values():
            expected = 1 if self.verbose or task.outcome == "failed" else task.reports
            assert task.reports == expected or task.outcome == "abandoned", f"{task.key} was not reported"

    def abandon(self, now: float) -> None:
        """Let go of all tasks: their loop was closed."""
        for task in list(self.live.values()):
            self.finish(task, now, "abandoned", "")
        self.last_id = self.loops * IDS_A_LOOP
        self.phase = self.phase_before_closing

    def close_loop(self) -> None:
        """Take note that the loop is closed and that what is left on it will be told of."""
        self.phase_before_closing = self.phase
        self.phase = "closing"

    def stats(self) -> dict[str, Any]:
        """Return what ``stats()`` must say, but for the percentiles."""
        queued = sum(task.begun is None for task in self.live.values())
        total = {outcome: 0 for outcome in OUTCOMES}
        names: dict[str, dict[str, int]] = {}
        for name, started in self.started.items():
            counters = {outcome: self.outcomes[name, outcome] for outcome in OUTCOMES}
            in_flight = sum(task.work.name == name for task in self.live.values())
            names[name] = {"started": started, "in_flight": in_flight, **counters}
            for outcome, number in counters.items():
                total[outcome] += number
        return {
            "started": sum(self.started.values()),
            "in_flight": len(self.live),
            "running": len(self.live) - queued,
            "queued": queued,
            **total,
            "dropped": self.dropped,
            "names": names,
        }


class TraceHandler(logging.Handler):
    """Puts log records into the trace of the twin that runs, as text: a record would keep the exception alive."""

    twin: Twin

    def emit(self, record: logging.LogRecord) -> None:
        task_id: int | None = getattr(record, "task_id", None)
        self.twin.note("log", record.levelno, record.getMessage(), task_id)


BAD_OPTIONS: list[dict[str, Any]] = [
    *({"timeout": value} for value in (0, -1, math.nan, -math.inf, "x", "1", True, False, 1j, [], 10**400)),
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


class TwinsInLockstep(RuleBasedStateMachine):
    """The rules: what a program may do with a manager."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = itertools.count()
        self.logger = logging.getLogger("bgtasks")
        self.logger_state = (self.logger.level, self.logger.propagate)
        self.handler = TraceHandler()
        self.logger.addHandler(self.handler)
        # Handlers further up keep records, and with them exceptions and all that their frames hold.
        self.logger.propagate = False
        self.logger.setLevel(logging.DEBUG)
        self.twins: list[Twin] = []

    @initialize(
        factory=st.sampled_from(["none", "none", "none", "foreign", *(["eager"] if EAGER else [])]),
        options=st.fixed_dictionaries(
            {
                "max_pending_tasks": st.sampled_from([0, 0, 1, 3]),
                "overflow": st.sampled_from(["raise", "drop_new"]),
                "max_concurrency": st.sampled_from([None, None, None, 1, 2]),
                "history": st.sampled_from([0, 4]),
            }
        ),
    )
    def make_managers(self, factory: str, options: dict[str, Any]) -> None:
        self.twins = [Twin(kind, factory, options) for kind in MODULES]
        self.model = Model(factory, options)
        self.model.verbose = self.logger.level == logging.DEBUG

    @property
    def now(self) -> float:
        return round(self.twins[0].loop.now, 6)

    def both(self, action: Callable[[Twin], object]) -> list[Any]:
        """Do something with both twins, compare what it led to, and have the model read it."""
        answers = []
        for twin in self.twins:
            self.handler.twin = twin
            answers.append(action(twin))
        first, second = (twin.trace for twin in self.twins)
        for left, right in itertools.zip_longest(first, second):
            assert left == right, f"the twins differ: {self.twins[0].kind} {left}, {self.twins[1].kind} {right}"
        try:
            self.model.read(first)
        except (AssertionError, KeyError) as error:
            error.add_note("trace: " + "\n       ".join(map(str, first)))
            raise
        for twin in self.twins:
            twin.trace.clear()
            twin.ids.update(
                (task.key, task.task_id) for task in (*self.model.live.values(), *self.model.ended.values())
            )
        return answers

    def known(self, number: int) -> tuple[str, Work] | None:
        """Pick a task, rather one that lives."""
        tasks = [*self.model.live.values()] or [*self.model.ended.values()]
        if not tasks:
            return None
        task = tasks[number % len(tasks)]
        return task.key, task.work

    # -- rules ---------------------------------------------------------------------------------------------------------

    @rule(work=WORKS)
    def create(self, work: Work) -> None:
        key = f"t{next(self.keys)}"
        self.both(lambda twin: twin.run(lambda: twin.create(key, work)))

    @rule(works=st.lists(works(), min_size=2, max_size=5))
    def create_many(self, works: list[Work]) -> None:
        keys = [f"t{next(self.keys)}" for _ in works]

        def create(twin: Twin) -> None:
            for key, work in zip(keys, works, strict=True):
                twin.create(key, work)

        self.both(lambda twin: twin.run(lambda: create(twin)))

    @rule(work=WORKS, hows=CANCELS, pauses=st.integers(0, 4))
    def create_and_cancel(self, work: Work, hows: list[str], pauses: int) -> None:
        """Cancel a task before its first step or in one of its first iterations."""
        key = f"t{next(self.keys)}"
        if self.model.cap or self.model.phase != "open":
            # Whether it was taken is known only afterwards.
            return

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
        assert self.both(lambda twin: (twin.manager.cancel(10**9), twin.manager.cancel("nobody"))) == [(0, 0), (0, 0)]

    @rule(number=st.integers(0, 20))
    def resolve(self, number: int) -> None:
        picked = self.known(number)
        if picked is not None:
            self.both(lambda twin: twin.run(lambda: twin.resolve(picked[0])))

    @rule(seconds=st.integers(1, 6))
    def advance(self, seconds: int) -> None:
        until = self.now + seconds
        self.both(lambda twin: twin.advance_to(until))

    @rule(
        has_timeout=st.booleans(),
        before=st.lists(st.sampled_from(["complete", "id", "task"]), max_size=2),
        after=st.lists(st.sampled_from(["complete", "id", "task"]), max_size=2),
        pauses=st.integers(0, 3),
        swallows=st.sampled_from([0, 0, 1]),
    )
    def collide(self, has_timeout: bool, before: list[str], after: list[str], pauses: int, swallows: int) -> None:
        """Have completion and cancellation arrive in the iteration in which a timeout is over, in any order."""
        key = f"t{next(self.keys)}"
        timeout = TIMEOUT_OFFSET if has_timeout else None
        work = Work(timeout=timeout, waits=(math.inf, 5), swallows=swallows)
        now = self.now

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
            twin.ids[key] = self.model.last_id + 1
            twin.create(key, work)
            # Before and after the registry's own timer, and within the resolution of the clock: in one iteration.
            twin.loop.call_at(now + TICK - 1e-10, act, twin, before, 0)
            twin.loop.call_at(now + TICK + 1e-10, act, twin, after, pauses)

        def run(twin: Twin) -> None:
            twin.run(lambda: start(twin))
            twin.advance_to(now + 1)

        self.both(run)

    @rule(method=st.sampled_from(["create_task", "fire"]), options=st.sampled_from(BAD_OPTIONS))
    def offer_bad_options(self, method: str, options: dict[str, Any]) -> None:
        async def nothing() -> None:
            raise AssertionError("a refused coroutine ran")

        self.both(lambda twin: twin.run(lambda: twin.refuse(method, nothing, options)))

    @rule(method=st.sampled_from(["create_task", "fire"]), value=st.sampled_from(BAD_COROUTINES))
    def offer_no_coroutine(self, method: str, value: Callable[[], Any]) -> None:
        self.both(lambda twin: twin.run(lambda: twin.refuse(method, value, {})))

    @precondition(lambda self: len(self.model.waiters) < 3)
    @rule(seconds=st.none() | st.integers(0, 4), return_exceptions=st.booleans())
    def wait_for_all(self, seconds: int | None, return_exceptions: bool) -> None:
        key = f"w{next(self.keys)}"
        timeout = None if seconds is None else seconds + 0.5
        deadline = math.inf if timeout is None else self.now + timeout
        self.model.waiters[key] = Waiter(deadline, return_exceptions)
        self.both(lambda twin: twin.run(lambda: twin.wait(key, timeout, return_exceptions)))

    @precondition(lambda self: self.model.waiters)
    @rule()
    def cancel_waiters(self) -> None:
        for waiter in self.model.waiters.values():
            waiter.cancelled = True
        keys = list(self.model.waiters)
        self.both(lambda twin: twin.run(lambda: [twin.waiters[key].cancel() for key in keys]))

    @precondition(lambda self: self.model.phase == "open")
    @rule(drain=st.sampled_from([0.0, 0.5, 2.5]), timeout=st.sampled_from([0.25, 1.25, 4.25]))
    def shutdown(self, drain: float, timeout: float) -> None:
        begun = self.now
        initial = len(self.model.live)
        self.model.phase = "draining"
        self.model.cancellations = [(begun + drain, False), (begun + drain + timeout, True)]

        def act(twin: Twin) -> Any:
            watchdog = twin.loop.call_later(drain + timeout + 1, twin.loop.stop)
            stats = twin.loop.run_until_complete(twin.manager.shutdown(timeout, drain=drain))
            watchdog.cancel()
            twin.settle()
            return stats, twin.loop.now

        (stats, ended), (other_stats, _) = self.both(act)
        # What was quiet in time was not cancelled.
        self.model.cancellations = []
        assert stats.pop("duration_seconds") == pytest.approx(ended - begun)
        assert ended - begun < drain + timeout + SECOND_CANCEL_GRACE + TOLERANCE
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
        for stats in self.both(lambda twin: twin.loop.run_until_complete(twin.manager.shutdown())):
            assert stats["status"] == "already_shutdown"
            assert stats["remaining_tasks"] == len(self.model.live)

    @precondition(lambda self: self.model.phase == "closed" and not self.model.live)
    @rule(data=st.data())
    def replace_managers(self, data: st.DataObject) -> None:
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
        """Close the loop of each twin, whatever runs there, and go on with a new one."""
        now = self.now
        self.model.close_loop()

        def act(twin: Twin) -> None:
            twin.loop.close()
            # The first question afterwards finds out.
            twin.manager.stats()

        self.both(act)
        if self.model.last_id > (self.model.loops - 1) * IDS_A_LOOP:
            self.model.abandon(now)
            self.model.loops += 1
        else:
            self.model.phase = self.model.phase_before_closing
        for twin in self.twins:
            twin.open_loop(now)

    @rule(level=st.sampled_from([logging.DEBUG, logging.WARNING]))
    def set_level(self, level: int) -> None:
        for task in self.model.ended.values():
            task.reports = 1
        self.logger.setLevel(level)
        self.model.verbose = level == logging.DEBUG

    # -- checks --------------------------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_overdue(self) -> None:
        if self.twins:
            self.model.settle(self.now)

    @invariant()
    def counters_are_right(self) -> None:
        percentiles = []
        for twin in self.twins:
            stats = twin.manager.stats()
            assert stats["started"] == stats["in_flight"] + sum(stats[outcome] for outcome in OUTCOMES)
            percentiles.append(
                {
                    name: [counters.pop("p50_seconds"), counters.pop("p99_seconds")]
                    for name, counters in stats["names"].items()
                }
            )
            assert stats == self.model.stats()
            assert twin.manager.dropped_count == self.model.dropped
            assert twin.manager.get_task_count() == twin.manager.pending_count == len(self.model.live)
            if self.model.limit is not None:
                assert stats["running"] <= self.model.limit
        assert percentiles[:1] == percentiles[1:]

    @invariant()
    def live_tasks_are_told_of(self) -> None:
        for twin in self.twins:
            infos = twin.manager.get_task_info()
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
                    "context": {"payload": payload} if task.work.has_context else {},
                    "done": False,
                    "cancelled": False,
                }
                handle = twin.manager.get_task(task.task_id)
                assert handle is twin.handles.get(task.key, handle)
                assert handle is not None
                assert not handle.done()
                assert handle.get_name() == task.work.name
                assert twin.manager.get_task_id(handle) == task.task_id

    @invariant()
    def finished_tasks_leave_nothing(self) -> None:
        for twin in self.twins:
            for key in twin.handles.keys() - self.model.live.keys():
                self.check_handle(twin.handles.pop(key), self.model.ended[key])
            for key in twin.waiters.keys() - self.model.waiters.keys():
                del twin.waiters[key]
            for key in twin.futures.keys() - self.model.live.keys():
                del twin.futures[key]
            if not twin.waiters:
                # A waiter keeps the first failure until it can raise it.
                for key in twin.payloads.keys() - self.model.live.keys():
                    assert twin.payloads.pop(key)() is None, f"{twin.kind} keeps what {key} held"

    def check_handle(self, handle: asyncio.Task[Any], task: Expected) -> None:
        """Check that an asyncio task ended as the model says."""
        if task.outcome == "abandoned":
            assert not handle.done()
        elif task.outcome in ("cancelled", "timed_out") or task.work.end == "cancel itself and return":
            assert handle.cancelled() or (task.outcome == "failed" and handle.done())
        elif task.outcome == "failed":
            assert errors.text_of(handle.exception() or Interruption()) == task.error
        else:
            assert handle.result() == task.key

    @invariant()
    def history_is_right(self) -> None:
        if not self.twins:
            return
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
                    "error": task.error if task.outcome == "failed" else self.cancellation_text(task, entry),
                }
        assert histories[:1] == histories[1:]

    def cancellation_text(self, task: Expected, entry: dict[str, Any]) -> str | None:
        """Return the error text of a task that did not fail: none."""
        return None

    def teardown(self) -> None:
        """End every task; then nothing may be left anywhere."""
        try:
            if self.twins:
                self.end_all()
        finally:
            self.logger.removeHandler(self.handler)
            self.logger.setLevel(self.logger_state[0])
            self.logger.propagate = self.logger_state[1]
            for twin in self.twins:
                twin.module.time = time
                if not twin.loop.is_closed():
                    twin.loop.close()

    def end_all(self) -> None:
        for waiter in self.model.waiters.values():
            waiter.cancelled = True
        self.both(lambda twin: twin.run(lambda: [waiter.cancel() for waiter in twin.waiters.values()]))
        for _ in range(20):
            for key, task in list(self.model.live.items()):
                self.both(lambda twin, key=key, work=task.work: twin.run(lambda: twin.cancel("id", key, work)))
            if not self.model.live:
                break
            self.advance(6)
        self.nothing_is_overdue()
        self.counters_are_right()
        self.finished_tasks_leave_nothing()
        assert not self.model.live
        for twin in self.twins:
            twin.advance_to(self.now + 1)
            assert not twin.loop._scheduled
            assert not asyncio.all_tasks(twin.loop)
        assert not _registry_py._in_use


def test_twins_do_what_the_model_says() -> None:
    """Both twins do the same and what the model says, whatever a program does with them."""
    assert registry_module("cython") is not registry_module("python")
    run_state_machine_as_test(
        TwinsInLockstep,
        settings=settings(
            max_examples=100,
            stateful_step_count=30,
            deadline=None,
            print_blob=True,
            derandomize="CI" in os.environ,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )
