"""The flusher: the one task of a publisher, which pops batches from the queue and has them delivered."""

from __future__ import annotations

import asyncio
import logging
import time
from asyncio.events import _get_running_loop
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import Any, Final, Protocol, TypeVar, Unpack

from bgtasks._locks import Lock
from bgtasks.events._batches import BatchLimits
from bgtasks.events._delivery import Delivery
from bgtasks.events._event_queue import EventQueue
from bgtasks.events._guard import at_work
from bgtasks.events._linger import Linger
from bgtasks.events._loop_thread import loop_thread
from bgtasks.events._losses import LossReporter
from bgtasks.events._pending import Pending
from bgtasks.events._routes import Route
from bgtasks.events._writers import DELAY_AFTER_BUG
from bgtasks.info import TaskFactoryOptions

__all__ = ["Flusher", "MakeRoute"]

logger = logging.getLogger("bgtasks.events")

Result = TypeVar("Result")

# Seconds that a flusher cancelled from outside (a loop that ends, cancel_all) may take to empty its queue.
LAST_FLUSH: Final = 1.0
# Seconds after which a flusher cancelled from outside starts again for the remaining events, if its loop goes on.
ABSENCE: Final = 0.1
# Without a loop, events wait this number of seconds for one before a thread with a loop of its own sends them; that one
# stays for so long after the last event.
WAIT_FOR_LOOP: Final = 0.2
IDLE_IN_THREAD: Final = 1.0
# Seconds for which the flusher keeps the loop at a time, or one batch if that takes longer.
SLICE: Final = 0.001

# Strong references to the tasks: the loop holds only weak ones.
_running: set[asyncio.Task[None]] = set()
# Strong references to flushers that have events and no loop, also those of publishers that are no longer referred to:
# their events are sent at the interpreter's exit.
_waiting: set[Flusher] = set()

# Makes the route of one run of the flusher, in its task: from the linger, and a check whether the run is current.
MakeRoute = Callable[[Linger, Callable[[], bool]], Route]


class TaskManager(Protocol):
    """The part of a manager that the flusher uses: a task that is shown there and not owned."""

    def task_factory(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, None], **kwargs: Unpack[TaskFactoryOptions]
    ) -> asyncio.Task[None]:
        """Return the task of a coroutine."""
        ...


class Flusher:
    """Empties a queue into a sink, on one loop at a time.

    It starts at the first event that is emitted on a loop, and again on another loop when its own is gone. A batch that
    was on its way is then written again, with the same id. Without a loop it runs in a thread that has one, until
    nothing is left to send.

    Args:
        name: the publisher's name.
        queue: the queue to empty.
        limits: when a batch is due.
        pending: the batches that have left the queue and are not accounted for.
        delivery: writes batches.
        losses: warns of lost events, on the loop of the flusher.
        make_route: makes the route of the batches to the sink.

    """

    # Shows the task; None for a plain task of the loop.
    manager: TaskManager | None = None

    def __init__(
        self,
        name: str,
        queue: EventQueue,
        limits: BatchLimits,
        pending: Pending,
        delivery: Delivery,
        losses: LossReporter,
        make_route: MakeRoute,
    ) -> None:
        self._name = name
        self._queue = queue
        self._limits = limits
        self._pending = pending
        self._delivery = delivery
        self._losses = losses
        self._make_route = make_route
        # Permanent: the child of a fork cannot start it again either.
        self._is_stopped = False
        self.after_fork()

    def after_fork(self) -> None:
        """Forget the task: it does not exist in the child of a fork."""
        _waiting.discard(self)
        # Re-entrant: what is collected while a life begins may emit.
        self._start_lock = Lock()
        # Of the current run; None if there is none.
        self._linger: Linger | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._has_lived = False
        # When the oldest event came, on the monotonic clock, if there is one and no current life.
        self._waiting_since: float | None = None
        # The thread for programs without a loop is to have a look.
        self._is_awaited = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop it runs on, None if it does not run."""
        return None if self._linger is None else self._loop

    def oldest_age(self) -> float:
        """Return an upper bound of the age of the oldest queued event, in seconds."""
        linger, loop, oldest = self._linger, self._loop, self._pending.since()
        if linger is None or loop is None:
            since_when = self._waiting_since
            return 0.0 if since_when is None else time.monotonic() - since_when
        since = linger.since if oldest is None else min(linger.since, oldest)
        return max(loop.time() - since, 0.0)

    # -- starting and stopping ------------------------------------------------------------------------------------

    def notify(self) -> None:
        """Notify the linger, or start on the loop of this thread; called by the queue, in any thread."""
        try:
            self._notify()
        except Exception:
            # The event is in the queue, and its emit says so. What should have been done at once is done a little
            # later, or at the next event.
            self._wait_for_loop()

    def _notify(self) -> None:
        linger = self._linger
        if linger is not None and self._is_alive():
            try:
                linger.notify()
            except RuntimeError:
                # The loop was closed just now.
                pass
            else:
                return
        here = _get_running_loop()
        if here is None:
            # There is no loop to run on; the next event tries again.
            self._wait_for_loop()
        else:
            self._start(here)

    def ensure_running(self) -> None:
        """Start on the running loop, unless it was stopped or runs on a loop that is alive."""
        if not self._is_stopped and (self._linger is None or not self._is_alive()):
            self._start(asyncio.get_running_loop())

    def _is_alive(self) -> bool:
        """Return whether its loop runs, or may run again: no other loop runs in this thread instead."""
        loop, task = self._loop, self._task
        if loop is None or loop.is_closed() or (task is not None and task.done()):
            return False
        return loop.is_running() or _get_running_loop() is None

    def _wait_for_loop(self) -> None:
        """Send what is there in the thread, unless a loop comes along before; have the queue call accordingly."""
        while self._is_stopped or not self._pending.is_needed:
            self._waiting_since = None
            if self._is_stopped or not self._queue.arm(1, 0):
                return
        _waiting.add(self)
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()
        self._await_loop()
        # The thread has a look in any case: events that are emitted where no loop runs need not call.
        self._queue.arm_loop()
        linger = self._linger
        if linger is not None and self._is_alive():
            # A life began meanwhile, in another thread, and this has replaced the call that it waits for.
            with suppress(Exception):
                linger.notify()

    def _await_loop(self) -> None:
        """Have the thread for programs without a loop look, if no loop comes along before."""
        if not self._is_awaited:
            self._is_awaited = True
            try:
                loop_thread.call_later(WAIT_FOR_LOOP, self._look)
            except RuntimeError:
                # At the end of the interpreter no thread starts any more; the rest is sent there.
                self._is_awaited = False

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start on the thread's loop if there is something to do and no other loop that may do it."""
        self._is_awaited = False
        if self._is_stopped:
            return
        own, task, linger = self._loop, self._task, self._linger
        if linger is not None and own is not None and not own.is_closed() and task is not None and not task.done():
            linger.notify()
        elif self._pending.is_needed:
            self._start(loop)
        else:
            self._wait_for_loop()

    async def leave_thread(self) -> None:
        """End the life in the thread for programs without a loop, if there is one: the running loop is the better one.

        What it was writing stays pending.
        """
        loop, task = self._loop, self._task
        if self._linger is None or loop is None or task is None or not loop_thread.is_on(loop):
            return
        coro = self._end_life(task)
        future = loop_thread.run(loop, coro)
        if future is None:
            # It has ended by itself.
            coro.close()
        else:
            await asyncio.wait((asyncio.wrap_future(future),))

    async def run_on_loop(self, function: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Run a coroutine function on the flusher's loop, or here if that does not run; return what it returns."""
        loop = self.loop
        if loop is None or loop is asyncio.get_running_loop() or not loop.is_running():
            return await function()
        coro = function()
        future = loop_thread.run(loop, coro)
        if future is None:
            if loop.is_closed() or loop is not self.loop:
                return await coro
            future = asyncio.run_coroutine_threadsafe(coro, loop)
        return await asyncio.wrap_future(future)

    async def _end_life(self, task: asyncio.Task[None]) -> None:
        self._linger = None
        task.cancel()
        await asyncio.wait((task,), timeout=LAST_FLUSH)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._start_lock:
            if self._linger is not None and self._is_alive():
                return
            if self._has_lived:
                # The client belongs to the loop of the task, which is gone.
                self._delivery.forget_client()
            limits = self._limits
            since = self._waiting_since
            waited = 0.0 if since is None else time.monotonic() - since
            self._linger = self._task = None
            linger = Linger(self._queue, loop, limits.events, limits.batch_bytes, limits.linger, waited)
            try:
                self._loop = loop
                self._linger = linger
                self._has_lived = True
                self._losses.use(loop)
                # In an empty context: the task and its callbacks must not keep the context of the request that emitted
                # first.
                Context().run(self._begin, loop, linger)
            except BaseException:
                self._linger = None
                raise
            self._waiting_since = None
        _waiting.discard(self)

    def _begin(self, loop: asyncio.AbstractEventLoop, linger: Linger) -> None:
        in_thread = loop_thread.is_on(loop)
        on_end, name = partial(self._end, linger), f"publisher {self._name}"
        coro = self._run(linger, in_thread)
        try:
            # The manager is one of the program's loops: that of the thread would make it two.
            if self.manager is None or in_thread:
                task: asyncio.Task[None] = asyncio.Task(coro, loop=loop, name=name)
            else:
                task = self.manager.task_factory(loop, coro, name=name)
        except BaseException:
            coro.close()
            raise
        try:
            _running.add(task)
            task.add_done_callback(on_end)
            if in_thread:
                task.add_done_callback(_release_thread)
                loop_thread.retain()
        except BaseException:
            # Its linger is not current any more: it ends at once.
            task.cancel()
            raise
        self._task = task

    def _end(self, linger: Linger, task: asyncio.Task[None]) -> None:
        _running.discard(task)
        if linger is not self._linger:
            return
        # The task was cancelled, by ``stop`` or from outside, or nothing was left to send in the thread.
        self._waiting_since = time.monotonic() - self.oldest_age()
        self._linger = None
        self._wait_for_loop()
        # A stopped flusher does not come back: the publisher spools or drops what is left.
        if self._pending.is_needed and not self._is_stopped and not loop_thread.is_on(task.get_loop()):
            # The queue did not call for events that came between the end of the task and this callback. A loop that
            # ends does not run the timer.
            task.get_loop().call_later(ABSENCE, self._come_back, context=Context())
        # Coroutines that wait for progress start the next run: another event may never come.
        self._pending.on_progress()

    def _come_back(self) -> None:
        if self._pending.is_needed:
            self.ensure_running()

    def hurry(self, urgent: bool) -> None:
        """Make batches due at once and retries frequent, or neither of them any more; from any thread."""
        self._delivery.hurry(urgent)
        linger, loop = self._linger, self._loop
        if linger is not None and loop is not None:
            # A closed loop has nothing to hurry.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(linger.hurry, urgent)

    def hurry_once(self) -> None:
        """Make the queued events due at once; from any thread."""
        linger, loop = self._linger, self._loop
        if linger is None or loop is None:
            return
        if loop is _get_running_loop():
            linger.hurry_once()
        else:
            # A closed loop has nothing to hurry.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(linger.hurry_once)

    async def stop(self, timeout: float) -> None:
        """Cancel the task and wait for its end; on its loop.

        Args:
            timeout: seconds; a task that does not end in time is abandoned, and the outcomes it reports are ignored.

        """
        task = self._task
        self._is_stopped = True
        _waiting.discard(self)
        if task is not None and not task.done() and task.get_loop() is asyncio.get_running_loop():
            task.cancel()
            await asyncio.wait((task,), timeout=timeout)
        self._linger = None

    # -- the task -------------------------------------------------------------------------------------------------

    async def _run(self, linger: Linger, in_thread: bool) -> None:
        at_work.set(self._queue)
        route = self._make_route(linger, lambda: linger is self._linger)
        try:
            await self._flush_for_ever(linger, route, IDLE_IN_THREAD if in_thread else None)
        except asyncio.CancelledError:
            await route.interrupt()
            # A call in flight may have left the connection in the middle of an answer.
            await self._delivery.close()
            if linger is self._linger and not self._is_stopped:
                await self._flush_once_more(route)
            raise
        finally:
            await route.stop()
            await self._delivery.close()

    async def _flush_for_ever(self, linger: Linger, route: Route, idle: float | None) -> None:
        """Flush until another life begins, or until nothing came for ``idle`` seconds."""
        # An abandoned run, whose write swallowed its cancellation, ends when the write returns.
        resumed = time.perf_counter()
        while linger is self._linger:
            try:
                is_due = route.has_waiting or await _is_due(linger, idle)
                if not is_due and route.is_idle and not self._pending.is_needed:
                    return
                await route.step()
            except Exception:
                # A bug in bgtasks or in a hook must not stop the other batches.
                logger.exception("The flusher of publisher %r failed and goes on", self._name)
                await asyncio.sleep(DELAY_AFTER_BUG)
            # A sink that never suspends must not block the loop. But the flusher must not yield after each batch: a
            # program that emits more than a batch per iteration would fill the queue. Not by the loop's clock: uvloop's
            # does not advance within an iteration.
            if not self._queue or time.perf_counter() - resumed >= SLICE:
                await asyncio.sleep(0)
                resumed = time.perf_counter()

    async def _flush_once_more(self, route: Route) -> None:
        was_urgent = self._delivery.is_urgent
        self._delivery.hurry(True)
        try:
            async with asyncio.timeout(LAST_FLUSH):
                while self._pending.is_needed:
                    await route.step()
                    if not len(self._queue):
                        await route.wait_idle()
        except TimeoutError:
            logger.warning(
                "The loop of publisher %r ends with %d events in the queue; close the publisher first",
                self._name,
                self._queue.counters()["queue_events"],
            )
        finally:
            self._delivery.hurry(was_urgent)


def _release_thread(_: asyncio.Task[None]) -> None:
    loop_thread.release()


async def _is_due(linger: Linger, timeout: float | None) -> bool:
    """Wait until a batch is due, at most ``timeout`` seconds; return whether one is."""
    if timeout is None:
        await linger.wait()
        return True
    try:
        async with asyncio.timeout(timeout):
            await linger.wait()
    except TimeoutError:
        return False
    return True
