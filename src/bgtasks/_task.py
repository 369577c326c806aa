"""The task object that shows the user's frames, and the native coroutine that runs around the user's.

A compiled coroutine would be a little faster, but the interpreter's own tools (``task.get_stack()``,
``asyncio.print_call_graph``, ``python -m asyncio pstree``) do not see through one, so these stay in Python.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bgtasks._registry_py import Record

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

        A task cancelled before its first step never enters the coroutine around the user's, so nothing in there could
        settle the record: a done callback does it then, and only then.
        """
        wrapper: Any = _get_wrapper(self)
        if not self.done() and not wrapper.cr_suspended and not wrapper.cr_running:
            self.add_done_callback(self._record.settle)
        return _cancel(self, msg=msg)


# asyncio prints this name in repr() and in "Task exception was never retrieved", for which logs are searched.
TrackedTask.__name__ = "Task"


def record_of(task: Any) -> Record | None:
    """Return the record of a tracked task, also from inside the first step of an eager one; None past saving."""
    try:
        record: Record = task._record
    except AttributeError:
        # It has not left its constructor: the record is an argument of the coroutine around the user's.
        wrapper: Any = _get_wrapper(task)
        return None if wrapper is None or wrapper.cr_frame is None else wrapper.cr_frame.f_locals.get("record")
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


async def run(coro: Awaitable[Any], record: Record) -> Any:
    """Run the user's coroutine and settle its record where it ends, not a loop iteration later."""
    try:
        return record.complete(await coro)
    except BaseException as error:
        record.fail(error)
        raise


async def run_queued(coro: Awaitable[Any], record: Record) -> Any:
    """Wait for a place among the running coroutines, then do as ``run`` does."""
    try:
        await record.place
        record.begin()
        return record.complete(await coro)
    except BaseException as error:
        record.fail(error)
        raise


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
