"""Finds out what blocks an event loop: a heartbeat on each watched loop, and one thread per process that looks at them.

A task costs nothing. A loop is late when its last beat is older than the threshold. The thread tells five causes
apart:

* Something blocks the loop: its thread is inside a callback.
* The loop does not run: nobody calls ``run_forever`` at the moment.
* The loop is idle and only its heartbeat is late, because the machine is busy: its thread waits for events.
* The whole process stood still, because the machine or the process was suspended or had no processor: the watching
  thread itself woke up late, and the process used little processor time meanwhile. The loops then get a new threshold.
  If it used much, a function in C held the GIL: that blocks the loop, too.
* The thread of the loop had work, but too few processors were free for it. Linux counts how long a thread waits for
  one; that time does not count as late.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any, Final

from bgtasks._fork import at_fork
from bgtasks._locks import Lock, Signal
from bgtasks._origin import describe_loop
from bgtasks._statistics import Distribution
from bgtasks.info import LoopBlock, LoopStats

__all__ = ["Heart"]

logger: Final = logging.getLogger("bgtasks.watch")

# Frames of a stack that a report shows at most.
LONGEST_STACK: Final = 20
# Modules whose frames carry the loop or wait for events.
OF_LOOPS: Final = ("asyncio", "selectors", "bgtasks", "uvloop")


class Heart:
    """The heartbeat of one loop; made on that loop.

    Args:
        loop: the running loop.
        threshold: seconds after which a loop is blocked, > 0.
        describe: returns the id, the name and the age in seconds of a task; each may be None.

    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        threshold: float,
        describe: Callable[[asyncio.Task[Any]], tuple[int | None, str, float | None]],
    ) -> None:
        self.loop = loop
        self.threshold = threshold
        self.last_beat = time.monotonic()
        self.thread = threading.current_thread()
        # The last beat that the watching thread saw, and how long the loop's thread had waited for a processor then.
        self._seen_beat = 0.0
        self._starved = 0.0
        self._label, _ = describe_loop(loop)
        self._describe = describe
        self._lag = Distribution()
        self._blocked = 0
        self._blocked_seconds = 0.0
        self._block: LoopBlock | None = None
        # When the loop was last seen not to run.
        self._stopped = 0.0
        # The last beat before the current block, None if the loop is not blocked.
        self._since: float | None = None
        # The frame that runs a loop whose own code has no frames, while it is idle.
        self._base = 0
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._expected = self.last_beat
        self._beat()
        _watchdog.add(self)

    def _beat(self) -> None:
        if self._is_closed:
            return
        now = time.monotonic()
        self._lag.count(max(now - self._expected, 0.0))
        self.thread = threading.current_thread()
        caller = sys._getframe(1)  # noqa: SLF001  documented
        # asyncio's own frame ends with this call, and its address is used again.
        self._base = 0 if caller.f_globals.get("__name__") == "asyncio.events" else id(caller)
        self.last_beat = now
        self._expected = now + self.threshold / 2
        self._timer = self.loop.call_later(self.threshold / 2, self._beat)

    def attached(self, manager: Any) -> None:
        """Do nothing: the manager closes this object at the end of its shutdown."""

    async def flush(self, timeout: float) -> None:
        """Do nothing: there is nothing to send."""

    async def close(self, timeout: float) -> None:
        """End the heartbeat; from the loop or from another one."""
        _watchdog.remove(self)
        self._is_closed = True
        if self.loop is asyncio.get_running_loop():
            self._cancel()
        else:
            # The loop may have been closed.
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def look(self, now: float, not_before: float) -> None:
        """Report a block that began or that is over; called by the watching thread.

        Args:
            now: the time.
            not_before: beats are not expected before this time, because the whole process stood still.

        """
        beat = self.last_beat
        if beat != self._seen_beat:
            self._starved = _waited_for_processor(self.thread)
            self._seen_beat = beat
        if not self.loop.is_running():
            self._stopped = now
        late = now - max(beat, not_before, self._stopped)
        if self._since is not None and max(beat, self._stopped) > self._since:
            self._end_block(max(beat, self._stopped) - self._since)
        elif self._since is None and late > self.threshold and late - self._starved_since() > self.threshold:
            self._begin_block(now)

    def _starved_since(self) -> float:
        """Return how many seconds the loop's thread has waited for a processor since the last beat was seen."""
        return _waited_for_processor(self.thread) - self._starved

    def _begin_block(self, now: float) -> None:
        frame = sys._current_frames().get(self.thread.ident or 0)  # noqa: SLF001  documented
        if frame is None or self._is_idle(frame):
            return
        # Before the stack is formatted: the loop may go on meanwhile.
        self._since = self.last_beat
        stack = _stack_of(frame)
        task = asyncio.current_task(self.loop)
        task_id, name, age = (None, None, None) if task is None else self._describe(task)
        self._blocked += 1
        self._block = {"task_id": task_id, "task": name, "age_seconds": age, "stack": stack, "seconds": None}
        logger.warning(
            "Event loop %s has been blocked for %.3f s by %s:\n%s",
            self._label,
            now - self._since,
            _text_of(task_id, name, age),
            "\n".join(stack),
        )

    def _end_block(self, seconds: float) -> None:
        self._since = None
        self._blocked_seconds += seconds
        assert self._block is not None, "a block that ends has begun"
        self._block = {**self._block, "seconds": seconds}
        logger.warning("Event loop %s runs again: it was blocked for %.3f s", self._label, seconds)

    def _is_idle(self, frame: types.FrameType) -> bool:
        return frame.f_globals.get("__name__") == "selectors" or id(frame) == self._base

    def stats(self) -> LoopStats:
        """Return the figures."""
        return {
            "loop": self._label,
            "thread": self.thread.name,
            "threshold_seconds": self.threshold,
            "blocked": self._blocked,
            "blocked_seconds": self._blocked_seconds,
            "last_block": self._block,
            "lag": self._lag.as_dict(),
        }


def _waited_for_processor(thread: threading.Thread) -> float:
    """Return how many seconds a thread has waited for a processor since its start; 0 where that is not known."""
    try:
        with open(f"/proc/self/task/{thread.native_id}/schedstat", "rb") as file:
            return int(file.read().split()[1]) * 1e-9
    except (OSError, ValueError, IndexError):
        return 0.0


def _text_of(task_id: int | None, name: str | None, age: float | None) -> str:
    if name is None:
        return "a callback"
    if task_id is None or age is None:
        return f"task {name!r} (of no manager)"
    return f"task {name!r} (id {task_id}, age {age:.1f} s)"


def _stack_of(frame: types.FrameType) -> list[str]:
    """Return the frames inside the loop, the innermost of the user first."""
    lines: list[str] = []
    current: types.FrameType | None = frame
    while current is not None and len(lines) < LONGEST_STACK:
        package = str(current.f_globals.get("__name__")).partition(".")[0]
        if package == "asyncio" and current.f_code.co_name in ("_run", "_run_once", "run_forever", "run"):
            break
        if package not in OF_LOOPS:
            lines.append(f'  File "{current.f_code.co_filename}", line {current.f_lineno}, in {current.f_code.co_name}')
        current = current.f_back
    return lines


class _Watchdog:
    """The thread that looks at the heartbeats; it runs while there are any."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._hearts: list[Heart] = []
        self._thread: threading.Thread | None = None
        self._changed = Signal()

    def add(self, heart: Heart) -> None:
        with self._lock:
            self._hearts.append(heart)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="bgtasks-loops", daemon=True)
                self._thread.start()
        self._changed.set()

    def remove(self, heart: Heart) -> None:
        with self._lock:
            self._hearts = [other for other in self._hearts if other is not heart]
        self._changed.set()

    def _run(self) -> None:
        not_before = time.monotonic()
        while True:
            with self._lock:
                self._hearts = [heart for heart in self._hearts if not heart.loop.is_closed()]
                hearts = list(self._hearts)
                if not hearts:
                    self._thread = None
                    return
            interval = min(heart.threshold for heart in hearts) / 4
            begun, used = time.monotonic(), time.process_time()
            self._changed.wait(interval)
            now = time.monotonic()
            slept = now - begun
            if slept > 2 * interval and time.process_time() - used < slept / 2:
                not_before = now
            for heart in hearts:
                try:
                    heart.look(now, not_before)
                except Exception:
                    logger.exception("Watching an event loop failed")


_watchdog = _Watchdog()


def _begin_anew() -> None:
    global _watchdog
    _watchdog = _Watchdog()


at_fork(in_child=_begin_anew)
