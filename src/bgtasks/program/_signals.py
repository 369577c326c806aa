"""SIGINT and SIGTERM held back until the background tasks have ended, then passed to their former handlers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from types import FrameType
from typing import Any

from bgtasks._checks import check_optional_seconds
from bgtasks._internals import ManagerInternals
from bgtasks.manager import BackgroundTaskManager
from bgtasks.program._draining import Ending
from bgtasks.program._listening import SIGNALS, name_of

__all__ = ["SignalHolder", "drain_on_signals"]

logger = logging.getLogger("bgtasks")


@contextlib.asynccontextmanager
async def drain_on_signals(
    manager: BackgroundTaskManager, *, shutdown_deadline: float | None = None
) -> AsyncIterator[bool]:
    """Hold SIGINT and SIGTERM back, inside this context, until the manager has shut down.

    The first signal calls ``manager.shutdown()``: new work is refused, tasks get the manager's ``drain_timeout`` to
    finish and its ``default_shutdown_timeout`` to end after their cancellation. Then the signal is passed on: an
    earlier handler is called, ``asyncio.run`` raises its KeyboardInterrupt, and the default action ends the process.
    The second signal ends the draining, the third one is not held back. Handlers on the loop
    (``loop.add_signal_handler``) are not replaced and run at once. When the context ends, the earlier handlers are
    restored; a handler that was set inside the context stays. An ignored signal stays ignored.

    The body of the context is not cancelled; it goes on while the manager drains. The context does not end before the
    shutdown that a signal began. Without a signal it does not touch the manager.

    Args:
        manager: the manager to shut down; give it a ``drain_timeout``, which is 0 by default.
        shutdown_deadline: seconds from the signal to the end of the shutdown, which shortens both timeouts in
            proportion; None for their sum.

    Raises:
        InvalidOptionError: ``shutdown_deadline`` is no number of seconds.

    Yields:
        True if signals are held back. False outside the main thread, where Python does not allow it: a warning is
        logged.

    Example:
        >>> async def main():
        ...     async with BackgroundTaskManager(drain_timeout=20.0) as manager:
        ...         async with drain_on_signals(manager):
        ...             await serve(manager)
        >>> asyncio.run(main())

    """
    check_optional_seconds("shutdown_deadline", shutdown_deadline, none="for the sum of both timeouts")
    holder = SignalHolder(
        manager, asyncio.get_running_loop(), default=signal.raise_signal, shutdown_deadline=shutdown_deadline
    )
    with holder:
        try:
            yield holder.is_active
        finally:
            if holder.held:
                await holder.close()


class SignalHolder:
    """Handles SIGINT and SIGTERM: shuts a manager down at the first one, and passes them on afterwards.

    Args:
        manager: the manager to shut down.
        loop: the loop that runs in this thread.
        default: called with the number of a signal that had no handler, in place of the default action.
        shutdown_deadline: as for ``Ending``.

    """

    def __init__(
        self,
        manager: BackgroundTaskManager,
        loop: asyncio.AbstractEventLoop,
        *,
        default: Callable[[int], object],
        shutdown_deadline: float | None,
    ) -> None:
        self.held: list[int] = []
        self._manager = manager
        self._internals = ManagerInternals(manager)
        self._internals.name_what_ends()
        self._ending = Ending(manager, shutdown_deadline)
        # When the first signal came, on the monotonic clock.
        self._first_at = 0.0
        self._loop = loop
        self._default = default
        self._previous: dict[int, Any] = {}
        self._closing: asyncio.Task[None] | None = None
        self._is_over = False

    @property
    def is_active(self) -> bool:
        """True if a signal would be held back."""
        return bool(self._previous)

    def __enter__(self) -> None:
        """Handle the signals whose handlers can be restored."""
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "Signals can be handled in the main thread only: none will drain %r, whose loop runs in another thread",
                self._manager,
            )
            return
        for number in SIGNALS:
            previous = signal.getsignal(number)
            if previous is None:
                logger.warning("%s has a handler that Python cannot restore; it is left alone", name_of(number))
            elif previous is not signal.SIG_IGN:
                self._previous[number] = previous
                signal.signal(number, self._on_signal)

    def __exit__(self, *_: object) -> None:
        """Restore the handlers, and pass the held signals on."""
        self._restore()
        self._pass_held_on()
        self._is_over = True

    async def close(self, *, drain: float | None = None) -> None:
        """Shut the manager down, unless a signal has begun to, and wait for the end."""
        self._begin(drain)
        assert self._closing is not None, "it was just begun"
        # Not awaited directly: a cancellation of this wait must not cancel the shutdown.
        await asyncio.wait((self._closing,))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Called between any two instructions, where few calls are safe. call_soon_threadsafe() also wakes the loop.
        if self._is_over or self._loop.is_closed():
            self._pass_on(number, frame)
        else:
            self._first_at = self._first_at or time.monotonic()
            self._loop.call_soon_threadsafe(self._hold, number)

    def _hold(self, number: int) -> None:
        if self._is_over:
            self._pass_on(number, None)
            return
        is_first = not self.held
        if number not in self.held:
            self.held.append(number)
        name = name_of(number)
        if is_first:
            self._ending.begin(name, self._first_at, f". A second {name} cancels them")
            self._begin(None)
            return
        logger.warning("%s again: background tasks are cancelled", name)
        self._restore()
        self._internals.hurry()

    def _begin(self, drain: float | None) -> None:
        if self._closing is None:
            self._closing = self._loop.create_task(self._ending.close(drain=drain), name="bgtasks shutdown")
            # In a callback of the loop: a SystemExit or KeyboardInterrupt of a handler then belongs to no task.
            self._closing.add_done_callback(lambda _: self._pass_held_on())

    def _pass_held_on(self) -> None:
        """Let the held signals take effect, once."""
        if self.held and not self._is_over:
            self._is_over = True
            self._restore()
            for number in self.held:
                self._pass_on(number, None)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous[number]
        if callable(previous):
            previous(number, frame)
        else:
            self._default(number)

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            # A handler that was set later may have saved this one: leave it, because this one passes signals on.
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, previous)
