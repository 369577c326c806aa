"""One twin: a manager on a loop of its own, and the trace of everything that happens there."""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import inspect
import itertools
import logging
import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from loops import VirtualLoop
from twins import manager_module, shutdown_module

from bgtasks import errors

# All timers of a loop are on multiples of it. A power of two, so that floats are exact.
STEP = 1 / 64


class Interruption(BaseException):
    """Not an ``Exception``, but it does not stop the loop."""


class Payload:
    """An object in the coroutine and the context of a task, which must be freed after the task."""

    def __repr__(self) -> str:
        return "payload"


@dataclass(frozen=True)
class Work:
    """The plan of a task: how it is started, and what its coroutine does.

    ``waits`` are seconds; 0 is a bare suspension, infinity a wait for a future. The first ``swallows`` cancellations
    are ignored, but each ends the current wait; the next one is followed by ``cleanup`` seconds of sleep. ``first`` and
    ``last`` are the children that the task starts at its start and at its end.
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


class OrderedTimer(asyncio.TimerHandle):
    """A timer that keeps its position among those of the same time; the registry's come last, even if set anew."""

    numbers = itertools.count()

    def __init__(self, when: float, callback: Callable[..., object], *args: Any) -> None:
        super().__init__(when, callback, *args)
        self.order = (when, getattr(callback, "__name__", None) == "wake", next(self.numbers))

    def __lt__(self, other: OrderedTimer) -> bool:
        return self.order < other.order


class OrderedLoop(VirtualLoop):
    """A virtual loop whose timers are on whole steps, so that no time is rounded, and always run in the same order."""

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> OrderedTimer:
        """Set a timer, on the next step at the earliest."""
        timer = OrderedTimer(math.ceil(when / STEP) * STEP, callback, args, self, context)
        heapq.heappush(self._scheduled, timer)
        timer._scheduled = True
        return timer


class Twin:
    """A manager on one twin, on a loop of its own, and the trace of what happens there."""

    def __init__(self, kind: str, factory: str, options: dict[str, Any]) -> None:
        self.kind = kind
        self.factory = factory
        self.module = manager_module(kind)
        # The manager's own clock: the interval between warnings and the duration of a shutdown.
        clock: Any = SimpleNamespace(monotonic=lambda: self.loop.now, time=time.time)
        self.module.time = shutdown_module(kind).time = clock
        self.trace: list[tuple[Any, ...]] = []
        self.handles: dict[str, asyncio.Task[Any]] = {}
        self.waiters: dict[str, asyncio.Task[Any]] = {}
        self.futures: dict[str, asyncio.Future[None]] = {}
        self.payloads: dict[str, weakref.ref[Payload]] = {}
        self.ids: dict[str, int] = {}
        self.entered: set[str] = set()
        self.open_loop(1000.0)
        # Actions just before and just after a timeout takes effect, by task id.
        self.collisions: dict[int, tuple[Callable[[], object], Callable[[], object]]] = {}
        twin = self

        class Manager(self.module.BackgroundTaskManager):
            def _on_timeout(self, record: Any) -> None:
                before, after = twin.collisions.pop(record.task_id, (list, list))
                before()
                super()._on_timeout(record)
                after()

            def _report(self, record: Any, error: BaseException | None) -> None:
                twin.note("report", record.task_id, record.outcome)
                super()._report(record, error)

        self.manager = Manager(on_error=self.on_error, **options)
        # Every end is reported: the end of a coroutine that was never entered is visible in no other way.
        self.manager._muted = None

    def open_loop(self, now: float) -> None:
        """Continue on a new loop."""
        self.loop = OrderedLoop()
        self.loop.now = now
        self.loop.set_exception_handler(
            lambda loop, context: self.note("loop_error", context["message"], repr(context.get("exception")))
        )
        if self.factory == "eager":
            self.loop.set_task_factory(asyncio.eager_task_factory)
        elif self.factory == "foreign":
            self.loop.set_task_factory(lambda loop, coro, **options: asyncio.Task(coro, loop=loop, **options))

    def note(self, *event: Any) -> None:
        """Add an event to the trace."""
        self.trace.append((self.loop.now, *event))

    def on_error(self, info: Any, error: BaseException) -> None:
        """Note a call of the manager's hook."""
        self.note("hook", info["task_id"], info["state"], info["done"], type(error).__name__)

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self, *actions: Callable[[], object]) -> None:
        """Run each action in an iteration of its own, then run until nothing is left to do at this time."""
        for action in actions:
            self.loop.call_soon(action)
            self.iterate()
        self.run_until_idle()

    def iterate(self) -> None:
        """Run one iteration of the loop."""
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()

    def run_until_idle(self) -> None:
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
        self.run_until_idle()

    # -- what the rules do ---------------------------------------------------------------------------------------------

    def create(self, key: str, work: Work) -> None:
        """Start a task, and note the result."""
        payload = Payload()
        self.payloads[key] = weakref.ref(payload)
        coro = self.work(key, work, payload)
        self.note("create", key, work, self.manager.get_task_count())
        try:
            # Not in a local variable: the error of an eager task keeps this frame, which must not keep the task.
            self.handles[key] = getattr(self.manager, work.method)(coro, **work.options(payload))
        except errors.BgtasksError as error:
            self.note("refused", key, type(error).__name__, str(error), inspect.getcoroutinestate(coro))
            return
        if key not in self.entered and inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED:
            self.note("dropped", key, self.handles[key])
        if work.method == "fire":
            del self.handles[key]

    def create_all(self, keys: list[str], works: list[Work]) -> None:
        """Start several tasks."""
        for key, work in zip(keys, works, strict=True):
            self.create(key, work)

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
        """Resolve the future that a task waits for."""
        future = self.futures.get(key)
        if future is not None and not future.done():
            self.note("resolve", key)
            future.set_result(None)

    def wait(self, key: str, timeout: float | None, return_exceptions: bool) -> None:
        """Start to wait for all tasks."""
        self.waiters[key] = self.loop.create_task(self.wait_and_note(key, timeout, return_exceptions))

    async def wait_and_note(self, key: str, timeout: float | None, return_exceptions: bool) -> None:
        """Wait for all tasks and note the result, in the same step."""
        try:
            result = await self.manager.wait_for_all(timeout=timeout, return_exceptions=return_exceptions)
        except BaseException as error:
            self.note("waited", key, errors.text_of(error))
        else:
            self.note("waited", key, f"returned {[errors.text_of(error) for error in result]}")

    def refuse(self, method: str, value: Callable[[], Any], options: dict[str, Any]) -> None:
        """Pass a wrong argument, and note the answer."""
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
        """Do the steps of a ``Work``, and note each."""
        self.note("start", key)
        self.entered.add(key)
        swallowed = 0
        how = "return"
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
        except BaseException as error:
            how = type(error).__name__
            if work.cleanup and isinstance(error, asyncio.CancelledError):
                self.note("cleanup", key)
                await asyncio.sleep(work.cleanup)
            raise
        finally:
            for number, child in enumerate(work.last):
                self.create(f"{key}.last{number}", child)
            self.note("end", key, how)

    async def pause(self, key: str, seconds: float) -> None:
        """Wait for a time or for a future."""
        if seconds == math.inf:
            self.futures[key] = self.loop.create_future()
            await self.futures[key]
        else:
            await asyncio.sleep(seconds)

    async def end(self, key: str, work: Work) -> None:
        """End as the ``Work`` says."""
        if work.end == "fail":
            raise ValueError(key)
        if work.end == "raise GeneratorExit":
            raise GeneratorExit(key)
        if work.end == "raise BaseException":
            raise Interruption(key)
        if work.end == "raise CancelledError":
            raise asyncio.CancelledError(key)
        if work.end.startswith("cancel itself"):
            self.note("cancel_itself", key)
            # Not in a local variable: the error's traceback keeps this frame, and the frame would keep the task.
            asyncio.current_task().cancel()
            if work.end == "cancel itself":
                await asyncio.sleep(0)


class TraceHandler(logging.Handler):
    """Adds log records to the trace of the twin that runs, as text: a record would keep the exception alive."""

    twin: Twin

    def emit(self, record: logging.LogRecord) -> None:
        """Note level, message and task id."""
        task_id: int | None = getattr(record, "task_id", None)
        self.twin.note("log", record.levelno, record.getMessage(), task_id)
