"""Random programs of retries, keys, schedules, services and rates; a model checks every run.

They run on a virtual clock, and a few on uvloop, which has none: there a second takes 20 ms.

No run is lost and none is doubled, no two of one key or one schedule run at once, no run begins before its time, and at
the end nothing is left.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from loops import LOOPS, VirtualLoop
from requirements import need
from twins import manager_module

from bgtasks import Limit, Rate, Restart, Retry

TOLERANCE = 0.002
BURST = 3
MODES = ["cython-asyncio", "cython-eager", "python-asyncio", "python-eager"]


@dataclass(eq=False)
class Work:
    """A function of the program, and what became of its runs."""

    group: Any
    fails: int = 0
    seconds: float = 0.0
    begun: list[float] = field(default_factory=list)
    ended: int = 0
    running: int = 0
    task: Any = None
    is_cancelled: bool = False
    handle: Any = None


class Program(RuleBasedStateMachine):
    """Drives one manager."""

    mode = MODES[0]
    # How long a second is.
    second = 1.0

    @initialize()
    def make(self) -> None:
        """Make the loop and the manager."""
        twin, _, kind = self.mode.partition("-")
        self.loop: Any = LOOPS[kind]() if kind == "uvloop" else VirtualLoop()
        # That of uvloop stands still during an iteration.
        self.now = time.monotonic if kind == "uvloop" else self.loop.time
        if kind == "eager":
            self.loop.set_task_factory(asyncio.eager_task_factory)
        rate = Rate(2, per=self.second, burst=BURST)
        self.manager = manager_module(twin).BackgroundTaskManager(limits={"rated": Limit(rate=rate)})
        self.numbers = itertools.count()
        self.retried: list[tuple[Work, int, float]] = []
        self.keyed: list[Work] = []
        self.rated: list[Work] = []
        self.schedules: list[tuple[Work, float, float]] = []
        self.services: list[tuple[Work, float]] = []
        self.running: dict[Any, int] = {}

    def run(self, function: Any, *args: Any) -> Any:
        """Call a function on the loop; return its result."""

        async def call() -> Any:
            return function(*args)

        return self.loop.run_until_complete(call())

    async def work(self, work: Work) -> int:
        """Run once."""
        work.begun.append(self.now())
        self.running[work.group] = self.running.get(work.group, 0) + 1
        assert self.running[work.group] == 1, f"two runs of {work.group} at once"
        try:
            await asyncio.sleep(work.seconds * self.second)
            if len(work.begun) <= work.fails:
                raise ValueError(f"run {len(work.begun)}")
        finally:
            self.running[work.group] -= 1
            work.ended += 1
        return len(work.begun)

    @rule(fails=st.integers(0, 4), attempts=st.integers(1, 4), wait=st.sampled_from([0.0, 0.5, 2.0]))
    def retry(self, fails: int, attempts: int, wait: float) -> None:
        """Submit a function that fails so often."""
        work = Work(("retry", next(self.numbers)), fails, 0.25)
        policy = Retry(on=ValueError, attempts=attempts, wait=wait * self.second, jitter=0)
        work.task = self.run(lambda: self.manager.submit(self.work, work, name="retry", retry=policy))
        self.retried.append((work, attempts, wait))

    @rule(
        key=st.sampled_from(["a", "b"]),
        on_duplicate=st.sampled_from(["join", "skip", "replace", "queue_latest"]),
        seconds=st.sampled_from([0.0, 1.0, 3.0]),
        fails=st.integers(0, 1),
    )
    def submit_key(self, key: str, on_duplicate: Any, seconds: float, fails: int) -> None:
        """Submit a function with a key."""
        work = Work(("key", key), fails, seconds)

        def submit() -> tuple[list[Work], Any]:
            # In the same step: a task may end in the first iteration of the loop.
            current = [other for other in self.keyed if other.group == work.group and not other.task.done()]
            options: Any = {"name": "key", "key": key, "on_duplicate": on_duplicate}
            return current, self.manager.submit(self.work, work, **options)

        current, task = self.run(submit)
        if current and on_duplicate == "join":
            assert task in [other.task for other in current]
        elif current and on_duplicate == "skip":
            assert task is None
        else:
            assert task not in [other.task for other in current]
            work.task = task
            self.keyed.append(work)
            for other in current:
                # At most one is held: the later one takes its place.
                other.is_cancelled |= on_duplicate == "replace" or not other.begun

    @rule()
    def submit_rated(self) -> None:
        """Submit a function whose name has a rate."""
        work = Work(("rated", next(self.numbers)), 0, 0.5)
        work.task = self.run(lambda: self.manager.submit(self.work, work, name="rated"))
        self.rated.append(work)

    @rule(
        interval=st.sampled_from([0.5, 2.0]),
        seconds=st.sampled_from([0.0, 0.75, 3.0]),
        overlap=st.sampled_from(["skip", "queue", "cancel"]),
    )
    def every(self, interval: float, seconds: float, overlap: Any) -> None:
        """Start a schedule."""
        if len(self.schedules) < 3:
            work = Work(("schedule", next(self.numbers)), 0, seconds)
            begun = self.now()
            work.handle = self.run(
                lambda: self.manager.every(
                    interval * self.second, self.work, work, name="run", first="later", overlap=overlap
                )
            )
            self.schedules.append((work, begun, interval))

    @rule(fails=st.integers(0, 3))
    def service(self, fails: int) -> None:
        """Start a service that crashes so often, and then runs."""
        if len(self.services) < 2:
            work = Work(("service", next(self.numbers)), fails, 0.5)

            async def serve() -> None:
                await self.work(work)
                await asyncio.Event().wait()

            work.handle = self.run(
                lambda: self.manager.service(serve, name="service", restart=Restart(max=10, wait=self.second))
            )
            self.services.append((work, self.now()))

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.5, 1.0, 5.0]))
    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.loop.run_until_complete(asyncio.sleep(seconds * self.second))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Cancel a task."""
        works = [work for work, _, _ in self.retried] + self.keyed + self.rated
        live = [work for work in works if not work.task.done()]
        if live:
            work = data.draw(st.sampled_from(live))
            work.is_cancelled = True
            self.run(work.task.cancel)

    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        """Pause a schedule, or resume it."""
        if self.schedules:
            work, _, _ = data.draw(st.sampled_from(self.schedules))
            self.run(work.handle.resume if work.handle.state == "paused" else work.handle.pause)

    @invariant()
    def nothing_begins_too_early(self) -> None:
        """Check the waits of attempts, the grid of ticks, and the rate in every window."""
        for work, attempts, wait in getattr(self, "retried", ()):
            assert len(work.begun) <= attempts
            for before, after in itertools.pairwise(work.begun):
                assert after >= before + (work.seconds + wait) * self.second - TOLERANCE
        for work, begun, interval in getattr(self, "schedules", ()):
            for number, when in enumerate(work.begun):
                assert when >= begun + (number + 1) * interval * self.second - TOLERANCE
            assert work.handle.runs >= len(work.begun)
        for work, begun in getattr(self, "services", ()):
            for number, when in enumerate(work.begun):
                # The waits are 1, 2 and 4 seconds, between runs of half a second.
                assert when >= begun + (number * 0.5 + 2**number - 1) * self.second - TOLERANCE
        begins = sorted(when for work in getattr(self, "rated", ()) for when in work.begun)
        for first, last in itertools.combinations(range(len(begins)), 2):
            passed = (begins[last] - begins[first] + TOLERANCE) / self.second
            assert last - first + 1 <= BURST + passed * 2 + TOLERANCE

    def teardown(self) -> None:
        """Let everything end, and check that nothing is lost, doubled or left."""
        if not hasattr(self, "loop"):
            return
        try:
            for work, _, _ in self.schedules:
                self.run(work.handle.cancel)
            self.loop.run_until_complete(self.manager.wait_for_all(return_exceptions=True))
            for work, _ in self.services:
                self.loop.run_until_complete(self.rest(work))
                assert len(work.begun) == work.fails + 1
                assert work.handle.restarts == work.fails
            stats = self.loop.run_until_complete(self.manager.shutdown(drain=100))
            assert stats["status"] == "completed"
            self.check_ends()
            assert self.manager.get_task_info() == []
            counters = self.manager.stats()
            ends = ("completed", "failed", "cancelled", "timed_out", "abandoned")
            assert counters["started"] == sum(counters[end] for end in ends)
            assert (counters["queued"], counters["waiting"], counters["running"]) == (0, 0, 0)
            assert not any(self.running.values())
            self.nothing_begins_too_early()
        finally:
            self.loop.close()

    async def rest(self, work: Work) -> None:
        """Give a service the time for all its runs, on a busy machine more."""
        await asyncio.sleep(20 * self.second)
        end = time.monotonic() + 30
        while len(work.begun) <= work.fails and time.monotonic() < end:
            await asyncio.sleep(0.01)

    def check_ends(self) -> None:
        """Compare the runs of every function with its orders."""
        for work, attempts, _ in self.retried:
            if not work.is_cancelled:
                assert len(work.begun) == min(work.fails + 1, attempts)
                assert (work.task.exception() is None) is (work.fails < attempts)
        for work in self.keyed + self.rated:
            assert work.task.done()
            assert len(work.begun) <= 1
            assert work.ended == len(work.begun)
            if not work.is_cancelled:
                assert len(work.begun) == 1
                assert not work.task.cancelled()


@pytest.mark.parametrize("mode", MODES)
def test_no_run_is_lost_or_doubled(mode):
    """Random programs, on both twins, lazily and eagerly."""
    if mode.endswith("eager") and not hasattr(asyncio, "eager_task_factory"):
        pytest.skip("Python 3.12 brought eager tasks")
    machine = type("Program", (Program,), {"mode": mode})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.mark.parametrize("mode", ["cython-uvloop", "python-uvloop"])
def test_no_run_is_lost_or_doubled_on_uvloop(mode):
    """A few random programs in real time."""
    need("uvloop")
    machine = type("Program", (Program,), {"mode": mode, "second": 0.02})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=6, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
