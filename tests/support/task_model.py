"""A model of tasks: it reads the trace of a twin and fails at an impossible event."""

from __future__ import annotations

import inspect
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lockstep import STEP, Work

OUTCOMES = ("completed", "failed", "cancelled", "timed_out", "abandoned")
# The ways in which a coroutine can fail, and the types that it raises.
FAILURES = {"fail": "ValueError", "raise GeneratorExit": "GeneratorExit", "raise BaseException": "Interruption"}
LOG_TEXTS = {
    "completed": "Background task '{name}' completed after {duration:.3f} s",
    "cancelled": "Background task '{name}' was cancelled after {duration:.3f} s",
    "timed_out": "Background task '{name}' ended after its timeout, {duration:.3f} s old",
    "failed": "Background task '{name}' failed after {duration:.3f} s: {error}",
}
TOLERANCE = 1e-6
# The registry is at most a millisecond late, the loop at most a step.
LATENESS = 0.001 + STEP
IDS_A_LOOP = 1024
DROP_WARNING_INTERVAL = 5.0


@dataclass
class Expected:
    """The state of a task in the model."""

    key: str
    work: Work
    task_id: int
    created: float
    begun: float | None = None
    position: int = 0
    # The time at which its wait ends.
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
    reported: bool = False

    def next_wait(self, now: float) -> None:
        """Continue with the wait at ``position``."""
        waits = self.work.waits
        self.wake_at = now + waits[self.position] if self.position < len(waits) else now

    def count_cancel(self) -> None:
        """Note a call of ``cancel()``."""
        self.cancels += 1
        self.interrupted = True

    @property
    def since(self) -> float:
        """The time from which its age and its timeout count."""
        return self.created if self.begun is None else self.begun

    @property
    def deadline(self) -> float:
        """The time at which its timeout is over."""
        return math.inf if self.work.timeout is None or self.expired else self.since + self.work.timeout

    @property
    def error(self) -> str | None:
        """The text of a failure in the log."""
        return f"{self.how}: {self.key}" if self.outcome == "failed" else None

    def log_text(self) -> str:
        """Return the message of the log record at its end."""
        text = LOG_TEXTS[self.outcome].format(name=self.work.name, duration=self.duration, error=self.error)
        has_context = self.outcome == "failed" and self.work.has_context
        return f"{text}; context: {{'payload': payload}}" if has_context else text


@dataclass
class Waiter:
    """The state of a call of ``wait_for_all`` in the model."""

    deadline: float
    return_exceptions: bool
    failures: list[str] = field(default_factory=list)
    cancelled: bool = False
    # There was a moment without tasks since the wait began.
    saw_idle: bool = False


def same_time(left: float, right: float) -> bool:
    """Return whether two times are equal."""
    return left == right or abs(left - right) < TOLERANCE


class Model:
    """Reads the trace of a twin and checks each event: whether it may happen, and whether due events happened."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.cap: int | None = options["max_pending_tasks"]
        self.overflow: str = options["overflow"]
        self.limit: int | None = options["max_concurrency"]
        self.history: int = options["history"]
        self.verbose = True
        self.live: dict[str, Expected] = {}
        self.ended: dict[str, Expected] = {}
        self.waiters: dict[str, Waiter] = {}
        self.started: Counter[str] = Counter()
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.dropped = 0
        self.last_drop_warning = -math.inf
        self.last_id = 0
        self.phase = "open"
        # The events that must come next in the trace.
        self.due: list[tuple[Any, ...]] = []
        # The cancellations of a shutdown: (time, whether stragglers are logged).
        self.cancellations: list[tuple[float, bool]] = []
        self.matched = 0

    def read(self, trace: Iterable[tuple[Any, ...]]) -> None:
        """Read events; an impossible one is an AssertionError."""
        for now, kind, *details in trace:
            try:
                self.make_due_cancellations(now)
                if self.due and self.due[0][0] == kind:
                    expected = self.due.pop(0)[1:]
                    assert tuple(details) == expected, f"expected {expected}"
                else:
                    getattr(self, f"on_{kind}")(now, *details)
            except Exception as error:
                raise AssertionError(f"at {now}: {kind} {details} may not happen here {error}") from error

    def make_due_cancellations(self, now: float) -> None:
        """Make the cancellations of a shutdown that are due by ``now``."""
        while self.cancellations and self.cancellations[0][0] <= now + TOLERANCE:
            _, logged = self.cancellations.pop(0)
            self.phase = "cancelling"
            if logged:
                self.due += [("straggler", task.work.name) for task in self.live.values()]
            for task in self.live.values():
                task.count_cancel()

    # -- starting ------------------------------------------------------------------------------------------------------

    def verdict(self, now: float, count: int, inside: bool, method: str) -> str:
        """Return the fate of a new task: taken, dropped or the error."""
        if self.phase == "closing":
            return "NoRunningLoopError"
        if self.phase != "open" and not (self.phase == "draining" and inside):
            return "ManagerClosedError"
        if not self.cap or count < self.cap:
            return "taken"
        if self.overflow == "raise" or method != "fire":
            return "TaskRejectedError"
        self.dropped += 1
        if now - self.last_drop_warning >= DROP_WARNING_INTERVAL - TOLERANCE:
            self.last_drop_warning = now
            self.due.append(("drop_warning", self.dropped))
        return "dropped"

    def on_create(self, now: float, key: str, work: Work, count: int) -> None:
        """Read that a task is created."""
        verdict = self.verdict(now, count, "." in key, work.method)
        if verdict == "taken":
            self.last_id += 1
            self.started[work.name] += 1
            self.live[key] = Expected(key, work, self.last_id, now)
        elif verdict == "dropped":
            self.due.append(("dropped", key, False))
        else:
            self.due.append(("was_refused", key, verdict))

    def on_refused(self, now: float, key: str, kind: str, text: str, state: str) -> None:
        """Read that a task was refused, and its coroutine closed."""
        assert self.due.pop(0) == ("was_refused", key, kind)
        assert state == inspect.CORO_CLOSED
        assert text

    def on_offer(self, now: float, method: str, is_coroutine: bool, options: list[str]) -> None:
        """Read that a wrong argument is passed."""
        if not is_coroutine:
            verdict = "NotACoroutineError"
        else:
            verdict = self.verdict(now, len(self.live), False, method)
            if verdict == "taken":
                verdict = "InvalidTimeoutError" if options == ["timeout"] else "InvalidContextError"
        self.due.append(("verdict", verdict))

    def on_answer(self, now: float, kind: str, text: str) -> None:
        """Read the answer to a wrong argument."""
        assert self.due.pop(0) == ("verdict", kind)

    # -- running -------------------------------------------------------------------------------------------------------

    def on_start(self, now: float, key: str) -> None:
        """Read that a coroutine is entered."""
        task = self.live[key]
        assert task.begun is None
        assert not task.interrupted
        task.begun = now
        task.next_wait(now)
        if self.limit is not None:
            assert sum(other.begun is not None for other in self.live.values()) <= self.limit

    def on_step(self, now: float, key: str) -> None:
        """Read that a wait of a coroutine is over."""
        task = self.live[key]
        assert not task.interrupted
        assert same_time(task.wake_at, now)
        task.position += 1
        task.next_wait(now)

    def on_resolve(self, now: float, key: str) -> None:
        """Read that the future of a coroutine is resolved."""
        self.live[key].wake_at = now

    def on_swallow(self, now: float, key: str) -> None:
        """Read that a coroutine ignores a cancellation."""
        task = self.live[key]
        assert task.interrupted
        assert task.swallowed < task.work.swallows
        task.interrupted = False
        task.swallowed += 1
        task.position += 1
        task.next_wait(now)

    def on_cleanup(self, now: float, key: str) -> None:
        """Read that a coroutine sleeps before it ends as cancelled."""
        task = self.live[key]
        self.check_cancelled(task)
        task.interrupted = False
        task.cleaning = True
        task.wake_at = now + task.work.cleanup

    def check_cancelled(self, task: Expected) -> None:
        """Check that a task may raise CancelledError from its waits or its end."""
        if task.position == len(task.work.waits) and not task.interrupted:
            assert task.work.end == "raise CancelledError"
        else:
            assert task.interrupted
            assert task.cancelled_itself or task.swallowed == task.work.swallows

    def on_cancel_itself(self, now: float, key: str) -> None:
        """Read that a coroutine cancels its own task."""
        task = self.live[key]
        assert not task.interrupted
        assert task.position == len(task.work.waits)
        task.cancelled_itself = True
        task.cancels += 1
        task.interrupted = task.work.end == "cancel itself"

    def on_end(self, now: float, key: str, how: str) -> None:
        """Read that a coroutine ends."""
        task = self.live[key]
        if self.phase == "closing":
            assert how == ("CancelledError" if task.cleaning else "GeneratorExit")
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
        """Move a task to the ended ones."""
        task.how, task.outcome = how, outcome
        task.duration = now - task.since
        self.ended[task.key] = self.live.pop(task.key)
        self.outcomes[task.work.name, outcome] += 1
        for waiter in self.waiters.values():
            waiter.saw_idle |= not self.live
            if outcome == "failed":
                waiter.failures.append(f"{how}: {task.key}")
            elif outcome == "timed_out":
                work = task.work
                text = f"background task {work.name!r} timed out after {work.timeout} seconds"
                waiter.failures.append(f"TimeoutError: {text}")

    # -- stopping ------------------------------------------------------------------------------------------------------

    def on_cancel(self, now: float, how: str, key: str) -> None:
        """Read that the test cancels by task, by id or by name."""
        named = (self.live.get(key) or self.ended[key]).work.name
        if how == "name":
            matching = [task for task in self.live.values() if task.work.name == named]
        else:
            matching = [self.live[key]] if key in self.live else []
        self.matched = len(matching)
        for task in matching:
            task.count_cancel()

    def on_cancelled(self, now: float, answer: int) -> None:
        """Read how many tasks were cancelled."""
        assert answer == self.matched

    def on_waited(self, now: float, key: str, text: str) -> None:
        """Read that a wait for all tasks ended."""
        waiter = self.waiters.pop(key)
        if waiter.cancelled:
            assert text == "CancelledError: "
        elif waiter.saw_idle and waiter.failures and not waiter.return_exceptions:
            assert text == waiter.failures[0]
        else:
            assert waiter.saw_idle or same_time(waiter.deadline, now)
            assert text == f"returned {waiter.failures if waiter.return_exceptions else []}"

    def on_loop_error(self, now: float, text: str, error: str) -> None:
        """Read that the exception handler of the loop was called."""
        raise AssertionError("nothing may reach the loop's exception handler")

    # -- reports -------------------------------------------------------------------------------------------------------

    def on_report(self, now: float, task_id: int, outcome: str) -> None:
        """Read that the registry reported an end to the manager."""
        task = next(task for task in (*self.live.values(), *self.ended.values()) if task.task_id == task_id)
        if task.key in self.live:
            # Its coroutine was not entered.
            assert task.begun is None
            assert task.interrupted
            self.finish(task, now, "cancelled", "CancelledError")
        assert outcome == task.outcome
        assert not task.reported
        task.reported = True
        if outcome == "failed":
            self.due.append(("log", logging.ERROR, task.log_text(), task_id))
            self.due.append(("hook", task_id, outcome, True, task.how))
        elif self.verbose:
            self.due.append(("log", logging.DEBUG, task.log_text(), task_id))
        if outcome == "timed_out":
            self.due.append(("hook", task_id, outcome, True, "TimeoutError"))

    def on_log(self, now: float, level: int, text: str, task_id: int | None) -> None:
        """Read a warning; records of other levels are expected after a report."""
        assert level == logging.WARNING
        task = next((task for task in self.live.values() if task.task_id == task_id), None)
        if task is None:
            self.check_general_log(now, text)
        elif text.startswith(f"Background task '{task.work.name}' timed out after {task.work.timeout} seconds, at "):
            assert task.deadline - TOLERANCE <= now <= task.deadline + LATENESS
            task.expired = True
            task.count_cancel()
        else:
            assert self.due.pop(0) == ("straggler", task.work.name)
            assert text.startswith(f"Background task '{task.work.name}' still runs at the end of shutdown, at ")

    def check_general_log(self, now: float, text: str) -> None:
        """Check a log record that is not about one task."""
        if "Dropped" in text:
            kind, count = self.due.pop(0)
            assert kind == "drop_warning"
            count_text = "1 task is" if self.cap == 1 else f"{self.cap} tasks are"
            assert text.startswith(f"{count_text} in flight (max_pending_tasks), no capacity for ")
            assert text.endswith(f"Dropped {count} so far; the next warning comes in 5 s at the earliest.")
        elif text.startswith("A closed"):
            assert self.phase == "closing"
            counts = Counter(task.work.name for task in self.live.values())
            names = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
            left = f"{len(self.live)} background task{'' if len(self.live) == 1 else 's'}"
            assert text == f"A closed event loop left {left} behind, abandoned: {names}"
        elif text.startswith(("Shutdown: ", "Shutdown cancelled ")) or " left after " in text:
            # Draining names what is left and what it cancels, which the other log records tell.
            listed = text.rpartition(": ")[2]
            names = {task.work.name for task in (*self.live.values(), *self.ended.values())}
            assert {part.partition(" (")[0] for part in listed.split(", ")} <= names
        else:
            ending_now = [waiter for waiter in self.waiters.values() if same_time(waiter.deadline, now)]
            assert ending_now
            count = len(self.live)
            some = "1 background task still runs" if count == 1 else f"{count} background tasks still run"
            assert text.startswith(f"{some} after waiting ")

    # -- when nothing is left to do ------------------------------------------------------------------------------------

    def check_overdue(self, now: float) -> None:
        """Check that everything that was due by ``now`` has happened."""
        self.make_due_cancellations(now)
        assert not self.due, f"{self.due} did not happen"
        for task in self.live.values():
            assert not task.interrupted, f"{task.key} was not cancelled"
        begun = [task for task in self.live.values() if task.begun is not None]
        queued = [task for task in self.live.values() if task.begun is None]
        for task in begun:
            assert task.wake_at > now + TOLERANCE, f"{task.key} did not go on"
            assert task.deadline + LATENESS > now, f"the timeout of {task.key} did not come"
        if queued:
            assert self.limit is not None, f"{queued[0].key} did not start"
            assert len(begun) == self.limit, "a slot is free and a task is queued"
            assert max(task.task_id for task in begun) < min(task.task_id for task in queued)
        for key, waiter in self.waiters.items():
            assert self.live, f"{key} still waits for nothing"
            assert waiter.deadline > now, f"{key} waits for too long"
        for task in self.ended.values():
            assert task.reported or task.outcome == "abandoned", f"{task.key} was not reported"

    @contextmanager
    def closing(self, now: float) -> Iterator[None]:
        """Expect the loop to be closed in the block; its remaining tasks are abandoned then."""
        phase, self.phase = self.phase, "closing"
        yield
        self.phase = phase
        for task in list(self.live.values()):
            self.finish(task, now, "abandoned", "")
        # Each loop takes ids from a range of its own.
        self.last_id = -(-self.last_id // IDS_A_LOOP) * IDS_A_LOOP

    def stats(self) -> dict[str, Any]:
        """Return the expected ``stats()``, without the percentiles."""
        queued = sum(task.begun is None for task in self.live.values())
        total = dict.fromkeys(OUTCOMES, 0)
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
