"""Managers that live as long as a server or a program, and end within one deadline from the signal on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Final

from bgtasks._checks import check_optional_seconds
from bgtasks._internals import ManagerInternals
from bgtasks._options import ManagerOptions, check_options
from bgtasks.manager import BackgroundTaskManager
from bgtasks.program._listening import SignalListener, name_of

__all__ = ["Ending", "check_program_options", "new_manager", "running"]

logger = logging.getLogger("bgtasks")

# Their sum stays below the 30 s that container runtimes leave between SIGTERM and SIGKILL.
DRAIN_TIMEOUT: Final = 20.0
SHUTDOWN_TIMEOUT: Final = 5.0
# Seconds of a deadline for what shutdown does after its timeout: tasks that are cancelled once more.
RESERVE: Final = 0.2


def check_program_options(options: ManagerOptions, shutdown_deadline: float | None) -> None:
    """Check the options of a manager, and the deadline.

    Raises:
        InvalidOptionError: one is outside its values.

    """
    check_options(options)
    check_optional_seconds("shutdown_deadline", shutdown_deadline, none="for the sum of both timeouts")


def new_manager(options: ManagerOptions) -> BackgroundTaskManager:
    """Return a manager that drains for 20 s and waits 5 s for cancelled tasks, unless ``options`` say otherwise."""
    usual: ManagerOptions = {"drain_timeout": DRAIN_TIMEOUT, "default_shutdown_timeout": SHUTDOWN_TIMEOUT}
    usual.update(options)
    manager = BackgroundTaskManager(**usual)
    ManagerInternals(manager).name_what_ends()
    return manager


@contextlib.asynccontextmanager
async def running(options: ManagerOptions, shutdown_deadline: float | None) -> AsyncIterator[Ending]:
    """Make a manager with ``new_manager``, and end it at the end, also after an exception of the body.

    In the main thread SIGINT and SIGTERM are noticed, and passed on to the server that handles them: see ``Ending``.

    """
    async with new_manager(options) as manager:
        ending = Ending(manager, shutdown_deadline)
        with SignalListener(asyncio.get_running_loop(), ending.on_signal):
            try:
                yield ending
            finally:
                await ending.close()


class Ending:
    """The end of a manager: one deadline for draining and cancelling, which counts from the signal.

    A server that got a signal ends its requests first. Meanwhile the manager goes on, and says in the log what is left.
    When only the time for cancelling is left, it shuts down although requests may still run. The second signal of a
    kind ends the draining, the third one the waiting for cancelled tasks.

    Args:
        manager: the manager.
        deadline: seconds from the signal, or from the first call of ``close``, to the end of the shutdown; None for the
            sum of the manager's ``drain_timeout`` and ``default_shutdown_timeout``.

    """

    def __init__(self, manager: BackgroundTaskManager, deadline: float | None) -> None:
        self.manager = manager
        self._internals = ManagerInternals(manager)
        # Long enough for both in full, whatever passes between the signal and the shutdown that it begins.
        self._deadline = sum(self._internals.times()) + 2 * RESERVE if deadline is None else deadline
        self._since: float | None = None
        self._early: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, cause: str, since: float, hint: str) -> None:
        """Count from now on, and say in the log what is left; later calls are ignored.

        Args:
            cause: why the program ends.
            since: when that began, on the monotonic clock.
            hint: what can be done about it.

        """
        if self._since is None:
            self._since = since
            self._internals.announce(cause, self._shares()[1], hint)

    def _shares(self, drain: float | None = None) -> tuple[float, float]:
        """Return the seconds for cancelled tasks and for draining: the manager's own, shortened to the deadline."""
        timeout, usual_drain = self._internals.times()
        drain = usual_drain if drain is None else drain
        since = time.monotonic() if self._since is None else self._since
        left = max(since + self._deadline - time.monotonic(), 0.0)
        if timeout + drain <= left:
            return timeout, drain
        share = max(left - RESERVE, 0.0) / (timeout + drain)
        return timeout * share, drain * share

    async def close(self, *, drain: float | None = None) -> None:
        """Shut the manager down within what is left of the deadline.

        Args:
            drain: seconds to let tasks finish, >= 0; the manager's ``drain_timeout`` by default.

        """
        if self._timer is not None:
            self._timer.cancel()
        timeout, drain = self._shares(drain)
        await self.manager.shutdown(timeout, drain=drain)
        if self._early is not None and self._early is not asyncio.current_task():
            # It has shut the manager down, and ends in this moment.
            await asyncio.wait((self._early,))

    def on_signal(self, number: int, count: int, since: float) -> None:
        """Take note of a signal that a server handles, on the loop.

        Args:
            number: the number of the signal.
            count: how often it came.
            since: when, on the monotonic clock.

        """
        name = name_of(number)
        if self._since is None:
            self.begin(name, since, f". A second {name} cancels them")
            self._timer = asyncio.get_running_loop().call_later(self._shares()[1], self._end_early)
        elif count == 2:
            logger.warning("%s again: background tasks are cancelled", name)
            self._internals.hurry()
            self._end_early()
        elif count > 2:
            self._internals.hurry()

    def _end_early(self) -> None:
        """Shut down although the server still waits for requests."""
        if self._early is None:
            self._early = asyncio.get_running_loop().create_task(self.close(drain=0.0), name="bgtasks shutdown")
