"""Functions that run again and again: one timer per loop, however many schedules there are."""

# ruff: noqa: SLF001  a schedule and its timers know each other's private parts

from __future__ import annotations

import asyncio
import heapq
import logging
import math
import random
import time
from array import array
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal, NamedTuple, TypeAlias, get_args

from bgtasks import errors
from bgtasks._checks import as_seconds, check_callable, check_choice, check_seconds
from bgtasks._coroutines import next_attempt, refuse_function
from bgtasks.info import Outcome
from bgtasks.registry import Record, Submission

__all__ = ["FirstRun", "OnRunError", "Overlap", "RunOutcome", "Schedule", "ScheduleOptions", "Schedules"]

logger = logging.getLogger("bgtasks")

# What a schedule does at a tick while its last run has not ended: nothing; run after its end; cancel it, and then run.
Overlap: TypeAlias = Literal["skip", "queue", "cancel"]
# What a schedule does after a failed run.
OnRunError: TypeAlias = Literal["continue", "stop"]
FirstRun: TypeAlias = Literal["now", "later"]

# How many ended runs a schedule remembers.
MOST_OUTCOMES: Final = 10
# A wall clock may be set: the time of the next run is looked up again after this many seconds.
LONGEST_WAIT: Final = 60.0
# Ticks of the same half of a millisecond are one entry of the timers.
SLOTS_PER_SECOND: Final = 2000
# Where no timer is set, and while it is not to be set.
NO_SLOT: Final = 1 << 62
ANY_SLOT: Final = -1


class RunOutcome(NamedTuple):
    """How a run of a schedule ended; ``error`` is the text of a failure."""

    outcome: Outcome
    duration_seconds: float
    error: str | None


class ScheduleOptions(NamedTuple):
    """The options of one call of ``every``."""

    name: str | None
    timeout: float | None
    context: Mapping[str, Any] | None
    first: FirstRun
    jitter: float
    overlap: Overlap
    on_error: OnRunError
    next_time: Callable[[datetime], datetime] | None
    lock: Callable[[], Awaitable[object]] | None


class Schedule:
    """A function that ``manager.every`` runs again and again. It belongs to the thread of its loop.

    Each worker process of a server has a schedule of its own.
    """

    # There may be 100,000 of them.
    __slots__ = (
        "_args",
        "_begun",
        "_current",
        "_durations",
        "_ended_runs",
        "_failures",
        "_fired",
        "_function",
        "_kwargs",
        "_options",
        "_seconds",
        "_slot",
        "_state",
        "_submission",
        "_target",
        "_tick",
        "_timers",
        "_wants_run",
        "_when",
        "late",
        "locked_out",
        "name",
        "runs",
        "skipped",
    )

    def __init__(
        self,
        timers: Any,
        seconds: float | None,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Any,
    ) -> None:
        self._timers = timers
        self._seconds = seconds
        self._function = function
        self._args = args
        self._kwargs = kwargs
        self._options = options
        #: The name of its runs.
        self.name: str = str(options.name or getattr(function, "__qualname__", type(function).__qualname__))
        #: How many runs have begun.
        self.runs: int = 0
        #: How many ticks began no run because the last one had not ended.
        self.skipped: int = 0
        #: How many ticks came so late that the next one was due, and were dropped.
        self.late: int = 0
        #: How many runs ``lock`` did not let in.
        self.locked_out: int = 0
        # The durations of the last ended runs, by their number modulo MOST_OUTCOMES: no object for each of them. And of
        # those that did not complete, the outcome and the text of the error; None before the first.
        self._ended_runs = 0
        self._durations = array("d", bytes(8 * MOST_OUTCOMES))
        self._failures: dict[int, tuple[Any, str | None]] | None = None
        self._state: Literal["active", "paused", "stopped"] = "active"
        # The last tick on the grid, the next one, its time on the loop's clock, and its slot among the timers.
        self._begun = timers.now()
        self._fired = -1
        self._tick = 0 if options.first == "now" else 1
        self._target: datetime | None = None
        self._when = self._begun
        self._slot = NO_SLOT
        self._current: Record | None = None
        self._wants_run = False
        # That of every run: no two run at once.
        self._submission: Submission = timers.make_submission(function, (), {}, None, self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self._state}, {self.runs} runs>"

    @property
    def state(self) -> Literal["active", "paused", "stopped"]:
        """``"active"``, ``"paused"``, or ``"stopped"``: by ``cancel``, by shutdown, or by a failure."""
        return self._state

    @property
    def outcomes(self) -> list[RunOutcome]:
        """The last ten ended runs, the newest last."""
        last = self._ended_runs
        indices = [number % MOST_OUTCOMES for number in range(max(last - MOST_OUTCOMES, 0), last)]
        failures = self._failures or {}
        found = []
        for index in indices:
            outcome, text = failures.get(index, ("completed", None))
            found.append(RunOutcome(outcome, self._durations[index], text))
        return found

    @property
    def next_run_seconds(self) -> float | None:
        """Seconds until the next tick; None if there is none."""
        return max(self._when - self._timers.now(), 0.0) if self._state == "active" else None

    @property
    def is_running(self) -> bool:
        """True while a run has not ended."""
        return self._current is not None

    def pause(self) -> None:
        """Have no more ticks until ``resume``; a run goes on."""
        if self._state == "active":
            self._state = "paused"
            self._timers.discard(self)

    def resume(self) -> None:
        """Go on with the next tick; those in the meantime are not made up."""
        if self._state == "paused":
            self._state = "active"
            self._find_next(self._timers.now(), count_late=False)
            self._timers.add(self)

    def cancel(self) -> None:
        """End the schedule; a run goes on."""
        if self._state != "stopped":
            self._state = "stopped"
            self._wants_run = False
            self._timers.discard(self)
            self._timers.schedules.pop(self, None)

    def run_now(self) -> None:
        """Begin a run now, as a tick does; the next tick stays when it is.

        Raises:
            BgtasksError: the manager accepts no task.

        """
        if self._current is None:
            self._run()
        elif self._options.overlap == "skip":
            self.skipped += 1
        else:
            self._wants_run = True
            if self._options.overlap == "cancel":
                self._current.cancel("the next run of its schedule is due")

    # -- called by the manager and the timers -----------------------------------------------------------------------

    def _start(self) -> None:
        """Set the first tick."""
        if self._options.next_time is not None and self._options.first == "later":
            self._find_next(self._begun, count_late=False)
        else:
            self._when = self._begun + self._tick * (self._seconds or 0.0) + self._jitter()
        # One that is due now belongs to the next iteration of the loop.
        is_due = self._when <= self._begun
        if self._state == "active":
            self._timers.add(self, math.floor(self._when * SLOTS_PER_SECOND) if is_due else None)

    def _on_tick(self, now: float) -> None:
        """Begin a run, and set the next tick."""
        if self._target is not None and not self._is_target_reached(now):
            self._timers.add(self)
            return
        try:
            if self._current is None:
                self._run()
            else:
                self.run_now()
        except errors.BgtasksError as error:
            logger.warning("A run of the schedule '%s' could not begin: %s", self.name, error)
        self._fired = tick = self._tick
        if self._state == "active":
            if self._seconds is not None and (when := self._begun + (tick + 1) * self._seconds) > now:
                self._tick = tick + 1
                self._when = when + self._jitter() if self._options.jitter else when
            else:
                self._find_next(now, count_late=True)
            # A failed next_time has stopped it.
            if self._state == "active":
                self._timers.add(self)

    def _jitter(self) -> float:
        return random.uniform(0.0, self._options.jitter)

    def _find_next(self, now: float, count_late: bool) -> None:
        """Find the next tick after ``now``."""
        if self._options.next_time is not None:
            self._find_target(now)
            return
        assert self._seconds is not None, "a schedule has an interval or a function"
        # Not by the clock alone: a float may be a little below the time of the tick that has just been.
        following = self._fired + 1
        when = self._begun + following * self._seconds
        if when <= now:
            following = max(following, math.floor((now - self._begun) / self._seconds) + 1)
            when = self._begun + following * self._seconds
            if count_late:
                self.late += following - self._fired - 1
        self._tick = following
        self._when = when + self._jitter() if self._options.jitter else when

    def _find_target(self, now: float) -> None:
        """Ask the function for the next time."""
        assert self._options.next_time is not None, "it was given"
        wall = datetime.now(UTC).astimezone()
        try:
            target = self._options.next_time(wall)
            # A naive time is meant in the local time zone.
            self._target = target.astimezone()
            if self._target <= wall:
                raise ValueError(f"{target} is not after {wall}")
        except Exception:
            logger.exception("The schedule '%s' stops: its next_time failed", self.name)
            self.cancel()
            return
        self._wait_for_target(now, wall)

    def _is_target_reached(self, now: float) -> bool:
        assert self._target is not None, "it was set"
        wall = datetime.now(UTC).astimezone()
        if wall >= self._target:
            return True
        self._wait_for_target(now, wall)
        return False

    def _wait_for_target(self, now: float, wall: datetime) -> None:
        assert self._target is not None, "it was set"
        self._when = now + min((self._target - wall).total_seconds(), LONGEST_WAIT)

    # -- runs -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._wants_run = False
        options, submission = self._options, self._submission
        if options.lock is None:
            coro = next_attempt(self._function, self._args, self._kwargs)
        else:
            coro = self._run_locked(options.lock)
        self._timers.fire(coro, self.name, options.timeout, options.context, submission)
        self.runs += 1
        record: Record = submission.record
        # An eager task may have ended.
        if record.submission is not None:
            self._current = record

    async def _run_locked(self, lock: Callable[[], Awaitable[object]]) -> Any:
        """Run the function if this process gets the lock."""
        if not await lock():
            self.locked_out += 1
            return None
        return await next_attempt(self._function, self._args, self._kwargs)

    def _ended(self, record: Record, error: BaseException | None) -> None:
        """Note the outcome of a run, and begin the one that waits for its end; called by the registry."""
        outcome = record.outcome
        self._current = None
        self._submission.result = None
        index = self._ended_runs % MOST_OUTCOMES
        self._ended_runs += 1
        self._durations[index] = record.duration
        if outcome == "completed" and self._failures is None and not self._wants_run:
            return
        self._note(index, outcome, error)
        if outcome in ("failed", "timed_out") and self._options.on_error == "stop":
            self.cancel()
        elif outcome == "abandoned":
            # Its loop was closed.
            self.cancel()
        elif self._wants_run and self._state != "stopped":
            # Not in the step of the ending task.
            self._timers.loop.call_soon(self._run_waiting)

    def _note(self, index: int, outcome: str, error: BaseException | None) -> None:
        """Note how a run ended."""
        failures = self._failures or {}
        if outcome == "completed":
            failures.pop(index, None)
        else:
            text = errors.text_of(error) if outcome == "failed" and error is not None else None
            failures[index] = (outcome, text)
        self._failures = failures or None

    def _run_waiting(self) -> None:
        if self._wants_run and self._current is None and self._state != "stopped":
            try:
                self._run()
            except errors.BgtasksError as error:
                logger.warning("A run of the schedule '%s' could not begin: %s", self.name, error)


class _Timers:
    """The schedules of one loop by the time of their next ticks, and one timer of the loop.

    A slot is a number of half milliseconds on the loop's clock; a tick is never early, and less than a slot late.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        make_submission: Callable[..., Submission],
        fire: Callable[..., Any],
        fire_during: Callable[[Callable[[Any], object], Any], None],
    ) -> None:
        self.loop = loop
        # uvloop's own clock stands still during an iteration, and counts whole milliseconds.
        self.now: Callable[[], float] = time.monotonic if type(loop).__module__ == "uvloop" else loop.time
        self.make_submission = make_submission
        self.fire = fire
        self._fire_during = fire_during
        # A dict, not a set, because it keeps their order.
        self.schedules: dict[Schedule, None] = {}
        # The schedules of each slot, and a heap of the slots, some of which may be gone.
        self._slots: dict[int, dict[Schedule, None]] = {}
        self._heap: list[int] = []
        self._timer: asyncio.Handle | None = None
        self._timer_slot = NO_SLOT

    def add(self, schedule: Schedule, slot: int | None = None) -> None:
        """Have ``_on_tick`` of a schedule called at its time, or in a given slot."""
        if slot is None:
            slot = math.ceil(schedule._when * SLOTS_PER_SECOND)
        schedule._slot = slot
        if slot in self._slots:
            self._slots[slot][schedule] = None
            return
        self._slots[slot] = {schedule: None}
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._slots):
            self._heap = list(self._slots)
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, slot)
        if slot < self._timer_slot:
            self._set_timer()

    def discard(self, schedule: Schedule) -> None:
        """Have no tick of a schedule."""
        slot = schedule._slot
        schedule._slot = NO_SLOT
        schedules = self._slots.get(slot)
        if schedules is None:
            # It has no tick, or is about to be called.
            return
        del schedules[schedule]
        if not schedules:
            del self._slots[slot]
        if not self._slots and self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._timer_slot = NO_SLOT
            self._heap.clear()

    def _set_timer(self) -> None:
        """Have ``_on_timer`` called at the earliest slot."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._heap and self._heap[0] not in self._slots:
            heapq.heappop(self._heap)
        if not self._heap:
            self._timer_slot = NO_SLOT
            return
        self._timer_slot = self._heap[0]
        wait = self._timer_slot / SLOTS_PER_SECOND - self.now()
        if wait <= 0:
            self._timer = self.loop.call_soon(self._on_timer)
        else:
            # Loops wait for whole milliseconds. uvloop rounds, and would come early.
            self._timer = self.loop.call_later(math.ceil(wait * 1000) / 1000, self._on_timer)

    def _on_timer(self) -> None:
        """Call the schedules that are due, each at most once, and set the timer again."""
        # Not by each call of add().
        self._timer_slot = ANY_SLOT
        self._timer = None
        due = self._take_due(self.now())
        try:
            if due:
                self._fire_during(self._call, due)
        except BaseException:
            self._put_back(due)
            raise
        finally:
            self._set_timer()

    def _call(self, due: list[tuple[int, dict[Schedule, None]]]) -> None:
        now = self.now()
        for slot, schedules in due:
            for schedule in schedules:
                # Not if one before it has cancelled it.
                if schedule._slot == slot:
                    schedule._slot = NO_SLOT
                    schedule._on_tick(now)

    def _take_due(self, now: float) -> list[tuple[int, dict[Schedule, None]]]:
        due = []
        # The same division as that of the wait: otherwise rounding could leave a slot that is not due without a wait.
        while self._heap and self._heap[0] / SLOTS_PER_SECOND <= now:
            slot = heapq.heappop(self._heap)
            if slot in self._slots:
                due.append((slot, self._slots.pop(slot)))
        return due

    def _put_back(self, due: list[tuple[int, dict[Schedule, None]]]) -> None:
        """Have those called later that an error kept from their tick."""
        for slot, schedules in due:
            for schedule in schedules:
                if schedule._slot == slot:
                    self.add(schedule, slot)


class Schedules:
    """The schedules of one manager.

    Args:
        make_submission: makes a submission: ``(function, args, kwargs, retry, listener)``.
        fire: starts its task: ``(coro, name, timeout, context, submission)``.
        fire_during: calls a function with an argument, and starts what it fires right after it.

    """

    def __init__(
        self,
        make_submission: Callable[..., Submission],
        fire: Callable[..., Any],
        fire_during: Callable[[Callable[[Any], object], Any], None],
    ) -> None:
        self._make_submission = make_submission
        self._fire = fire
        self._fire_during = fire_during
        self._by_loop: dict[asyncio.AbstractEventLoop, _Timers] = {}

    def start(
        self,
        seconds: float | None,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: ScheduleOptions,
    ) -> Schedule:
        """Check the arguments of ``every``, and start a schedule on the running loop."""
        _check(seconds, function, options)
        loop = asyncio.get_running_loop()
        timers = self._by_loop.get(loop)
        if timers is None:
            for other in [other for other in self._by_loop if other.is_closed()]:
                del self._by_loop[other]
            timers = self._by_loop[loop] = _Timers(loop, self._make_submission, self._fire, self._fire_during)
        schedule = Schedule(timers, None if seconds is None else float(seconds), function, args, kwargs, options)
        timers.schedules[schedule] = None
        schedule._start()
        return schedule

    def all(self) -> list[Schedule]:
        """Return the schedules that have not stopped."""
        return [schedule for timers in list(self._by_loop.values()) for schedule in list(timers.schedules)]

    def stop(self) -> None:
        """Stop all schedules, each on its own loop; their runs go on."""
        here = asyncio.get_running_loop()
        for loop, timers in list(self._by_loop.items()):
            for schedule in list(timers.schedules):
                if loop is here:
                    schedule.cancel()
                elif not loop.is_closed():
                    loop.call_soon_threadsafe(schedule.cancel)
        self._by_loop.clear()


def _check(seconds: Any, function: Any, options: ScheduleOptions) -> None:
    """Check the arguments of ``every``.

    Raises:
        BgtasksError: one of them is wrong.

    """
    if (seconds is None) is (options.next_time is None):
        raise errors.InvalidOptionError(
            "every() takes either the seconds between two runs, or None and next_time=, a function of a datetime"
        )
    if seconds is not None:
        check_seconds("seconds", seconds, positive=True)
    if not callable(function):
        refuse_function(function, "every")
    if options.timeout is not None and not as_seconds(options.timeout):
        raise errors.invalid_timeout(options.timeout)
    if options.context is not None and not isinstance(options.context, Mapping):
        raise errors.invalid_context(options.context)
    check_choice("first", options.first, get_args(FirstRun))
    check_seconds("jitter", options.jitter)
    check_choice("overlap", options.overlap, get_args(Overlap))
    check_choice("on_error", options.on_error, get_args(OnRunError))
    check_callable("next_time", options.next_time)
    check_callable("lock", options.lock)
