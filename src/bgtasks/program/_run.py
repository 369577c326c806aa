"""Runs a program on the fastest installed loop, with a manager that ends before the loop does."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from asyncio.events import _get_running_loop
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, Unpack

from bgtasks import errors
from bgtasks._internals import ManagerInternals
from bgtasks._options import ManagerOptions
from bgtasks.manager import BackgroundTaskManager
from bgtasks.program._draining import check_program_options, new_manager
from bgtasks.program._signals import SignalHolder

__all__ = ["run"]

logger = logging.getLogger("bgtasks")

Result = TypeVar("Result")


def run(
    main: Callable[[BackgroundTaskManager], Coroutine[Any, Any, Result]],
    *,
    debug: bool | None = None,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    shutdown_deadline: float | None = None,
    **options: Unpack[ManagerOptions],
) -> Result:
    """Run ``main(manager)`` on a new event loop, as ``asyncio.run`` would, and shut its background tasks down cleanly.

    When ``main`` returns, new work is refused; tasks get 20 s to finish, and then 5 s to end after their cancellation.
    After an exception in ``main`` they are cancelled at once. On SIGINT or SIGTERM the tasks end first, in the same
    way, while ``main`` goes on; only then is ``main`` cancelled, so they can use its open resources. A second signal
    ends the draining, a third one has its usual effect at once. A task that swallows its cancellation does not delay
    the end.

    After SIGINT, KeyboardInterrupt is raised, as by ``asyncio.run``. After SIGTERM, SystemExit is raised with status
    143, which shells and containers expect of a process that SIGTERM ended; so ``finally`` blocks and ``atexit``
    functions run. A handler that the program has set before is called instead, and ``main`` is not cancelled. If
    ``main`` fails with ``ManagerClosedError`` after a signal, the program ends as after the signal, with a warning in
    the log.

    Args:
        main: a coroutine function that takes the manager.
        debug: the loop's debug mode; None for asyncio's own choice.
        loop_factory: makes the loop; None for uvloop's if uvloop is installed, otherwise asyncio's.
        shutdown_deadline: seconds from the signal, or from the end of ``main``, to the end of the shutdown; both
            timeouts are shortened in proportion. None for their sum.
        options: those of ``BackgroundTaskManager``; by default ``drain_timeout`` is 20 and
            ``default_shutdown_timeout`` 5.

    Returns:
        The result of ``main``.

    Raises:
        InvalidProgramError: ``main`` is not a coroutine function; if it is a coroutine, it is closed.
        InvalidOptionError: an option has an invalid value.
        RunningLoopError: an event loop runs in this thread.

    Example:
        >>> async def main(manager):
        ...     manager.create_task(send("hello"), name="greeting")
        ...     return "started"
        >>> bgtasks.run(main)
        'started'

    """
    if asyncio.iscoroutine(main):
        errors.close_refused(main)
        raise errors.InvalidProgramError(
            "run() needs the function, which it calls with the manager: run(main), not run(main())"
        )
    if not callable(main):
        raise errors.InvalidProgramError(
            f"run() needs a coroutine function that takes the manager, got {errors.describe(main)}"
        )
    if _get_running_loop() is not None:
        raise errors.RunningLoopError(
            "run() starts an event loop, but one already runs in this thread: await main(manager) inside "
            "'async with BackgroundTaskManager() as manager' and 'async with drain_on_signals(manager)'"
        )
    check_program_options(options, shutdown_deadline)
    program = _Program(main, new_manager(options), shutdown_deadline)
    try:
        with asyncio.Runner(debug=debug, loop_factory=loop_factory or _fastest_loop()) as runner:
            result: Result = runner.run(program.run())
            return result
    except asyncio.CancelledError:
        if program.ended_by is None:
            raise
        status = 128 + program.ended_by
    finally:
        program.internals.release_closed_loops()
    raise SystemExit(status)


class _Program:
    """The coroutine around ``main``."""

    def __init__(
        self,
        main: Callable[[BackgroundTaskManager], Coroutine[Any, Any, Any]],
        manager: BackgroundTaskManager,
        shutdown_deadline: float | None,
    ) -> None:
        self.manager = manager
        self._deadline = shutdown_deadline
        self.internals = ManagerInternals(manager)
        # The number of the signal that ended the program.
        self.ended_by: int | None = None
        self._main = main
        self._task: asyncio.Task[Any] | None = None

    async def run(self) -> Any:
        """Run ``main``, then shut the manager down, with signals held back in between."""
        self._task = asyncio.current_task()
        signals = SignalHolder(
            self.manager, asyncio.get_running_loop(), default=self._end_main, shutdown_deadline=self._deadline
        )
        try:
            async with self.manager:
                with signals:
                    return await self._run_main(signals)
        finally:
            self._leave_stragglers()

    async def _run_main(self, signals: SignalHolder) -> Any:
        try:
            coro: Any = self._main(self.manager)
            if not inspect.isawaitable(coro):
                raise errors.InvalidProgramError(
                    f"run() needs a coroutine function: {errors.describe(self._main)} returned {errors.describe(coro)}"
                )
            result = await coro
        except BaseException as error:
            # A signal passed on at the end of the shutdown cancels this task: the error of main takes precedence.
            with contextlib.suppress(asyncio.CancelledError):
                await signals.close(drain=0.0)
            if signals.held and isinstance(error, errors.ManagerClosedError):
                logger.warning("The program tried to start a background task after the signal that ended it: %s", error)
                raise asyncio.CancelledError from error
            raise
        await signals.close()
        return result

    def _end_main(self, number: int) -> None:
        """Cancel ``main`` in place of the default action of a signal."""
        self.ended_by = number
        assert self._task is not None, "signals are handled inside run()"
        self._task.cancel()

    def _leave_stragglers(self) -> None:
        """Hide the tasks that outlast the shutdown from asyncio.Runner, which would wait for them without a limit."""
        for record in self.internals.owned_records():
            if record.task is not None:
                asyncio._unregister_task(record.task)  # noqa: SLF001  asyncio has no other way


def _fastest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ModuleNotFoundError as error:
        if error.name != "uvloop":
            raise
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
