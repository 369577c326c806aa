"""The task type that shows the user's frames, and the native coroutines that run around the user's coroutine.

The compiled registry needs these coroutines only for tasks of a foreign task factory, and where ``BGTASKS_WRAPPER``
asks for them: from Python 3.14 on ``python -m asyncio pstree`` reads the coroutines of a task from the process and
follows only native ones. Its other tasks step their records.
"""

from __future__ import annotations

import asyncio
import inspect
import types
from asyncio.events import _get_running_loop
from collections.abc import Awaitable, Generator
from contextlib import suppress
from typing import Any, Final, Protocol, TypeVar

__all__ = [
    "SharedTask",
    "TrackedTask",
    "close_quietly",
    "dismiss",
    "do_nothing",
    "drive",
    "finish_unentered",
    "foreign_record",
    "grant_turn",
    "is_running",
    "record_of",
    "retrieve_failure",
    "run",
    "run_queued",
    "run_submitted",
    "starts_eagerly",
    "task_in_constructor",
    "users_traceback",
]

Result = TypeVar("Result")

# The modules whose frames stand between a task and the user's coroutine.
AROUND: Final = frozenset({__name__, "bgtasks._registry"})

# The records whose native coroutine ``enter`` is entering, so nearly always empty: to test it costs a task nothing, to
# read ``paused`` from its record costs it 6 %. A list, because several threads may append and remove.
entering: list[TaskRecord] = []

_cancel = asyncio.Task.cancel
_set_name = asyncio.Task.set_name
# The attribute if there is one: in early releases of 3.12, get_coro() crashes on an eager task that has ended.
_wrapper_attribute = getattr(asyncio.Task, "_coro", None)
_get_wrapper = asyncio.Task.get_coro if _wrapper_attribute is None else _wrapper_attribute.__get__


class TaskRecord(Protocol):
    """The part of a task's record that the coroutines here use."""

    @property
    def coro(self) -> Any:
        """The user's coroutine."""

    @property
    def turn(self) -> Any:
        """The future that a queued task waits on."""

    @property
    def registry(self) -> Any:
        """The registry that keeps the record; None after the end of the task, or if the task could not be built."""

    paused: bool

    def count_start(self) -> None:
        """Count the wait of a task that takes its first step."""

    @property
    def waiting(self) -> Any:
        """Whether the task is between two attempts."""

    def begin(self) -> None:
        """Mark a queued task as running."""

    def retry(self, error: BaseException, /) -> bool:
        """Have another attempt follow; return whether one does."""

    def begin_attempt(self) -> Any:
        """Return the coroutine of the next attempt."""

    def complete(self, result: Result, /) -> Result:
        """Finish the record of a task that returned."""

    def fail(self, error: BaseException, /) -> BaseException | None:
        """Finish the record of a task that raised; return what the task raises instead, or None."""

    def rename(self, name: str, /) -> None:
        """Give a task that the task factory built another name."""

    def finish_unentered(self, task: asyncio.Task[Any], /) -> None:
        """Finish the record of a task that never entered its coroutine."""


class TrackedTask(asyncio.Task[Any]):
    """An ``asyncio.Task`` that shows the user's coroutine instead of the one that runs around it.

    ``get_coro()``, ``get_stack()``, ``print_stack()`` and ``repr()`` return what they return for a bare task. The
    registry sets ``_record`` right after construction. The compiled registry has a task type of its own
    (``_tracked_task.h``) and puts the methods of this class on it.
    """

    __slots__ = ("_record",)

    _record: TaskRecord

    def get_coro(self) -> Any:
        """Return the user's coroutine."""
        wrapper = _get_wrapper(self)
        if wrapper is None:
            # asyncio, too, forgets the coroutine of an eager task that ended inside its constructor.
            return None
        record = record_of(self)
        return wrapper if record is None else record.coro

    # asyncio's own repr() and get_stack() read this name.
    _coro = property(get_coro)

    def cancel(self, msg: Any | None = None) -> bool:
        """Request cancellation, as ``asyncio.Task.cancel`` does.

        A task cancelled before its first step would never enter the native coroutine around the user's, so nothing in
        there could finish the record. That coroutine is therefore entered now, up to a pause before the user's.
        """
        wrapper: Any = _get_wrapper(self)
        if type(wrapper) is types.CoroutineType and inspect.getcoroutinestate(wrapper) == inspect.CORO_CREATED:
            enter(self._record, wrapper)
        if _get_running_loop() is None:
            # No code of the program runs: the loop's owner cancels what the program has left, as asyncio.run does.
            registry = self._record.registry
            if registry is not None:
                registry._on_loop_ending(self._record)  # noqa: SLF001  the hook of the registry
        return _cancel(self, msg=msg)

    def set_name(self, value: object, /) -> None:
        """Set the name, as ``asyncio.Task.set_name`` does; one that the task factory built has it everywhere."""
        _set_name(self, value)
        record = record_of(self)
        # The loops of early releases of 3.13 set None where no name was given.
        if record is not None and value is not None:
            record.rename(self.get_name())


class SharedTask(TrackedTask):
    """The task of a key, which several coroutines may await: the cancellation of one does not cancel the task."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the end of the task; a cancellation ends this wait alone."""
        if not self.done():
            if self is asyncio.current_task():
                raise RuntimeError(f"Task cannot await on itself: {self!r}")
            # Not asyncio.shield(): from Python 3.14 on it reports a failure that the registry has logged already.
            ended: asyncio.Future[None] = self.get_loop().create_future()

            def wake(task: asyncio.Task[Any]) -> None:
                if not ended.done():
                    ended.set_result(None)

            self.add_done_callback(wake)
            try:
                yield from ended
            finally:
                self.remove_done_callback(wake)
        return self.result()

    __iter__ = __await__


# asyncio prints this name in repr() and in "Task exception was never retrieved", and people search logs for it.
TrackedTask.__name__ = SharedTask.__name__ = "Task"


def record_of(task: Any) -> Any:
    """Return the record of a tracked task, also inside the first step of an eager one; None if it is unknown."""
    try:
        return task._record  # noqa: SLF001  the slot of TrackedTask
    except AttributeError:
        # The task has not left its constructor.
        wrapper: Any = _get_wrapper(task)
    if type(wrapper) is not types.CoroutineType:
        # The task steps its record, or has forgotten its coroutine.
        return wrapper
    # The record is an argument of the native coroutine.
    return None if wrapper.cr_frame is None else wrapper.cr_frame.f_locals.get("record")


def task_in_constructor(record: TaskRecord, loop: asyncio.AbstractEventLoop | None) -> asyncio.Task[Any] | None:
    """Return the task of a record that has none yet: an eager one in its first step, or None."""
    for task in asyncio.all_tasks(loop):
        if isinstance(task, asyncio.Task) and record_of(task) is record:
            return task
    return None


def foreign_record(task: Any) -> Any:
    """Return the record of a task that a foreign factory built, None if no manager started it."""
    wrapper = task.get_coro()
    if getattr(wrapper, "cr_code", None) not in _NATIVE or wrapper.cr_frame is None:
        return None
    return wrapper.cr_frame.f_locals.get("record")


@types.coroutine
def drive(coro: Any) -> Generator[Any, Any, Any]:
    """Run an object with send, throw and close, which asyncio accepts as a coroutine although ``await`` may not."""
    try:
        step = coro.send(None)
        while True:
            try:
                sent = yield step
            except GeneratorExit:
                coro.close()
                raise
            except BaseException as error:
                step = coro.throw(error)
            else:
                step = coro.send(sent)
    except StopIteration as end:
        return end.value


@types.coroutine
def pause() -> Generator[None, None, None]:
    """Suspend once: the step that the task is about to take goes on or raises here."""
    yield


async def run(coro: Awaitable[Any], record: TaskRecord) -> Any:
    """Run the user's coroutine and finish its record when it ends, not a loop iteration later."""
    try:
        if entering and record.paused:
            await pause()
            record.paused = False
            if record.registry is None:
                return None
        record.count_start()
        return record.complete(await coro)
    except BaseException as error:
        replacement = record.fail(error)
        if replacement is None:
            raise
        try:
            raise replacement from error
        finally:
            # Its traceback keeps this frame: the frame must not keep it.
            del replacement


async def run_queued(coro: Awaitable[Any], record: TaskRecord) -> Any:
    """Wait for the turn of a queued task, then do as ``run`` does."""
    try:
        if entering and record.paused:
            await pause()
            record.paused = False
            if record.registry is None:
                return None
        await record.turn
        record.begin()
        return record.complete(await coro)
    except BaseException as error:
        replacement = record.fail(error)
        if replacement is None:
            raise
        try:
            raise replacement from error
        finally:
            del replacement


async def run_submitted(coro: Awaitable[Any], record: TaskRecord) -> Any:
    """Run one attempt of a submitted function after another, with waits in between, then do as ``run`` does."""
    try:
        if entering and record.paused:
            await pause()
            record.paused = False
            if record.registry is None:
                return None
        return await _attempt(coro, record)
    except BaseException as error:
        replacement = record.fail(error)
        if replacement is None:
            raise
        try:
            raise replacement from error
        finally:
            del replacement


async def _attempt(coro: Any, record: TaskRecord) -> Any:
    """Run one attempt after another, the first one at its turn."""
    if record.turn is not None:
        await record.turn
        record.begin()
    else:
        record.count_start()
    while True:
        try:
            return record.complete(await coro)
        except BaseException as error:
            if not record.retry(error):
                raise
        await record.turn
        coro = record.begin_attempt()
        if type(coro) is not types.CoroutineType:
            coro = drive(coro)


_NATIVE: Final = (run.__code__, run_queued.__code__, run_submitted.__code__)


def do_nothing() -> None:
    """Do nothing."""


def is_running(task: asyncio.Task[Any]) -> bool:
    """Return whether the current step is one of this task."""
    loop = _get_running_loop()
    return loop is not None and asyncio.current_task(loop) is task


def grant_turn(loop: Any, turn: asyncio.Future[None] | None) -> bool:
    """Let a queued task run; return False if its loop is closed."""
    try:
        if loop is _get_running_loop():
            _resolve(turn)
        else:
            loop.call_soon_threadsafe(_resolve, turn)
    except RuntimeError:
        return False
    return True


def _resolve(turn: asyncio.Future[None] | None) -> None:
    if turn is not None and not turn.done():
        turn.set_result(None)


def close_quietly(coro: Any) -> None:
    """Close a coroutine of a closed loop; drop its errors, which nothing could handle any more."""
    with suppress(BaseException):
        coro.close()


def enter(record: TaskRecord, wrapper: types.CoroutineType[Any, Any, Any]) -> None:
    """Enter a native coroutine up to its pause, before the user's."""
    record.paused = True
    entering.append(record)
    try:
        wrapper.send(None)
    finally:
        entering.remove(record)


def dismiss(record: TaskRecord, wrapper: Any) -> None:
    """Have the native coroutine of a record that is taken back do nothing.

    It is entered up to its pause instead of closed: the constructor of a task may fail when the loop has the first step
    already, and that step would raise in a closed coroutine.
    """
    if type(wrapper) is types.CoroutineType and inspect.getcoroutinestate(wrapper) == inspect.CORO_CREATED:
        enter(record, wrapper)
    else:
        wrapper.close()


def finish_unentered(record: TaskRecord, wrapper: Any, task: asyncio.Task[Any]) -> None:
    """Finish the record of a task that a foreign factory built, which may never have entered the coroutine it got."""
    wrapper.close()
    record.finish_unentered(task)


def retrieve_failure(task: asyncio.Task[Any]) -> None:
    """Mark a failure as retrieved: it was reported, and asyncio's "never retrieved" must not follow."""
    if not task.cancelled():
        task.exception()


def users_traceback(error: BaseException) -> types.TracebackType | None:
    """Return the traceback of an error from the user's first frame on."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_globals.get("__name__") in AROUND:
        traceback = traceback.tb_next
    return traceback


def starts_eagerly(loop: asyncio.AbstractEventLoop) -> bool:
    """Return whether a task built with ``eager_start=True`` runs inside its constructor; tried on the running ``loop``.

    uvloop and others accept the argument in ``create_task`` on interpreters that ignore it, so neither the version nor
    the signature answers the question.
    """

    async def probe() -> None:
        return None

    coro = probe()
    options: dict[str, Any] = {"eager_start": True}
    try:
        task = asyncio.Task(coro, loop=loop, **options)
    except TypeError:
        coro.close()
        return False
    return task.done() or not task.cancel()
