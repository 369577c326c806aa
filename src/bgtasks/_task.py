"""The task object that shows the user's frames, and the native coroutines that run around the user's.

The compiled registry needs these only where something follows native coroutines alone: ``python -m asyncio pstree``
(Python 3.14), which reads them out of the process, and tasks of a foreign factory. Elsewhere its records take their
place.
"""

from __future__ import annotations

import asyncio
import inspect
import types
from collections.abc import Awaitable, Generator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from bgtasks._registry_py import Record

# The modules whose frames stand between a task and the user's coroutine.
AROUND: Final = frozenset({__name__, "bgtasks._registry"})

_cancel = asyncio.Task.cancel
# Not get_coro() where it can be helped: in early releases of Python 3.12 that crashes on an eager task that has ended.
_get_wrapper = asyncio.Task._coro.__get__ if hasattr(asyncio.Task, "_coro") else asyncio.Task.get_coro


class TrackedTask(asyncio.Task[Any]):
    """An ``asyncio.Task`` that shows the user's coroutine instead of the one that runs around it.

    ``get_coro()``, ``get_stack()``, ``print_stack()`` and ``repr()`` give what they give for a bare task. The registry
    sets ``_record`` right after construction. The compiled registry has a type of its own for it (``_tracked_task.h``)
    and puts the methods of this class on it.
    """

    __slots__ = ("_record",)

    _record: Record

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
        there could settle the record. So that one is entered now, up to a pause before the user's coroutine.
        """
        wrapper: Any = _get_wrapper(self)
        if type(wrapper) is types.CoroutineType and inspect.getcoroutinestate(wrapper) == inspect.CORO_CREATED:
            self._record.paused = True
            wrapper.send(None)
        return _cancel(self, msg=msg)


# asyncio prints this name in repr() and in "Task exception was never retrieved", for which logs are searched.
TrackedTask.__name__ = "Task"


def record_of(task: Any) -> Record | None:
    """Return the record of a tracked task, also from inside the first step of an eager one; None past saving."""
    try:
        record: Record | None = task._record
    except AttributeError:
        # It has not left its constructor. Of a native coroutine around the user's the record is an argument.
        wrapper: Any = _get_wrapper(task)
        if type(wrapper) is not types.CoroutineType:
            # The record is what the task steps, or the task has forgotten what it stepped.
            record = wrapper
        else:
            record = None if wrapper.cr_frame is None else wrapper.cr_frame.f_locals.get("record")
    return record


@types.coroutine
def drive(coro: Any) -> Generator[Any, Any, Any]:
    """Run what asyncio takes for a coroutine although ``await`` may not: an object with send, throw and close."""
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
    """Give the step that the task is about to take a place to go on or to raise."""
    yield


async def run(coro: Awaitable[Any], record: Record) -> Any:
    """Run the user's coroutine and settle its record where it ends, not a loop iteration later."""
    try:
        if record.paused:
            await pause()
            record.paused = False
        return record.complete(await coro)
    except BaseException as error:
        record.fail(error)
        raise


async def run_queued(coro: Awaitable[Any], record: Record) -> Any:
    """Wait for a place among the running coroutines, then do as ``run`` does."""
    try:
        if record.paused:
            await pause()
            record.paused = False
        await record.place
        record.begin()
        return record.complete(await coro)
    except BaseException as error:
        record.fail(error)
        raise


def users_traceback(error: BaseException) -> types.TracebackType | None:
    """Return the traceback of an error from the user's first frame on."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_globals.get("__name__") in AROUND:
        traceback = traceback.tb_next
    return traceback


def starts_eagerly(loop: asyncio.AbstractEventLoop) -> bool:
    """Tell by trying whether a task built with ``eager_start=True`` runs inside its constructor.

    uvloop and others accept the argument in ``create_task`` on interpreters where it does nothing, so neither the
    version nor the signature tells. To be called while ``loop`` runs.
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
