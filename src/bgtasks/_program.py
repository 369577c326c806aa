"""A program on the fastest loop there is, with a manager that ends before the loop does."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, Unpack

from bgtasks import errors
from bgtasks._draining import ManagerOptions, new_manager
from bgtasks._signals import SignalWatch
from bgtasks.manager import BackgroundTaskManager

logger = logging.getLogger("bgtasks")

Result = TypeVar("Result")


def run(
    main: Callable[[BackgroundTaskManager], Coroutine[Any, Any, Result]],
    *,
    debug: bool | None = None,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    **options: Unpack[ManagerOptions],
) -> Result:
    """Run ``main(manager)`` on a new event loop, as ``asyncio.run`` would, and end its background tasks in good order.

    When ``main`` returns, new work is refused, and tasks get 20 s to finish and then 5 s to heed their cancellation.
    After an exception in ``main`` they are cancelled at once. On SIGINT or SIGTERM the tasks end first, in the same
    way, while ``main`` goes on; only then ``main`` is cancelled, so what it holds open is there for them. A second
    signal cuts the draining short, a third one has its usual effect at once. A task that swallows its cancellation
    does not hold the end up.

    After SIGINT, KeyboardInterrupt is raised, as by ``asyncio.run``; after SIGTERM, SystemExit with status 143, by
    which shells and containers know a process that SIGTERM ended, so that ``finally`` blocks and ``atexit`` functions
    run. A handler that the program itself has set before is called instead, and ``main`` is not cancelled. If ``main``
    fails with ``ManagerClosedError`` after a signal, that is its end by the signal, with a warning in the log.

    Args:
        main: a coroutine function that takes the manager.
        debug: the loop's debug mode; None for asyncio's own choice.
        loop_factory: makes the loop; None for uvloop's where that is installed, else asyncio's.
        options: those of ``BackgroundTaskManager``; by default ``drain_timeout`` is 20 and
            ``default_shutdown_timeout`` 5.

    Returns:
        What ``main`` returns.

    Raises:
        InvalidProgramError: ``main`` is no coroutine function; if it is a coroutine, it is closed.
        InvalidOptionError: an option is outside its values.
        RunningLoopError: an event loop runs in this thread.

    Example:
        >>> async def main(manager):
        ...     manager.create_task(send("hello"), name="greeting")
        >>> bgtasks.run(main)

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
    if asyncio._get_running_loop() is not None:
        raise errors.RunningLoopError(
            "run() starts an event loop, and one runs in this thread already: there, await main(manager) inside "
            "'async with BackgroundTaskManager() as manager' and 'async with drain_on_signals(manager)'"
        )
    program = _Program(main, new_manager(options))
    try:
        with asyncio.Runner(debug=debug, loop_factory=loop_factory or _fastest_loop()) as runner:
            result: Result = runner.run(program.run())
            return result
    except asyncio.CancelledError:
        if program.ended_by is None:
            raise
        status = 128 + program.ended_by
    finally:
        # Asked for its tasks, the manager lets go of those of the closed loop, and names them.
        program.manager.get_task_count()
    raise SystemExit(status)


class _Program:
    """The coroutine around ``main``."""

    def __init__(
        self, main: Callable[[BackgroundTaskManager], Coroutine[Any, Any, Any]], manager: BackgroundTaskManager
    ) -> None:
        self.manager = manager
        self.ended_by: int | None = None
        self._main = main
        self._task: asyncio.Task[Any] | None = None

    async def run(self) -> Any:
        """Run ``main``, then shut the manager down, with signals held back in between."""
        self._task = asyncio.current_task()
        watch = SignalWatch(self.manager, asyncio.get_running_loop(), default=self._end_main)
        try:
            async with self.manager:
                with watch:
                    return await self._run_main(watch)
        finally:
            self._leave_stragglers()

    async def _run_main(self, watch: SignalWatch) -> Any:
        try:
            coro: Any = self._main(self.manager)
            if not inspect.isawaitable(coro):
                raise errors.InvalidProgramError(
                    f"run() needs a coroutine function: {errors.describe(self._main)} returned {errors.describe(coro)}"
                )
            result = await coro
        except BaseException as error:
            # A signal passed on at the end of the shutdown cancels this task: what main raised goes before that.
            with contextlib.suppress(asyncio.CancelledError):
                await watch.close(drain=0.0)
            if watch.held and isinstance(error, errors.ManagerClosedError):
                logger.warning(
                    "The program wanted to start a background task after the signal that ended it: %s", error
                )
                raise asyncio.CancelledError from error
            raise
        await watch.close()
        return result

    def _end_main(self, number: int) -> None:
        """Cancel ``main`` in place of the default action of a signal."""
        self.ended_by = number
        assert self._task is not None, "signals are taken inside run()"
        self._task.cancel()

    def _leave_stragglers(self) -> None:
        """Hide from the loop's owner the tasks that outlast the shutdown: it would wait for them without a limit."""
        for record in self.manager._live_records():
            if not record.is_observed and record.task is not None:
                asyncio._unregister_task(record.task)


def _fastest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ModuleNotFoundError as error:
        if error.name != "uvloop":
            raise
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
