"""How far a task has come, said by the task itself."""

from __future__ import annotations

import asyncio
import math
from asyncio.events import _get_running_loop

from bgtasks._task import TrackedTask, foreign_record, record_of
from bgtasks.errors import InvalidOptionError, describe
from bgtasks.info import Progress

__all__ = ["progress"]


def progress(done: float, total: float | None = None, text: str | None = None) -> bool:
    """Say how far the running task has come; ``get_task_info()`` shows it as ``progress`` until the task ends.

    Args:
        done: how much is done, in units of your choice.
        total: how much there is to do; None if that is not known.
        text: what is being done.

    Returns:
        True; False if no task of a manager runs here: the call then does nothing, so that functions which report their
        progress can also be called directly.

    Raises:
        InvalidOptionError: ``done`` or ``total`` is not a finite number, or ``text`` not a string.

    Example:
        >>> async def index(files):
        ...     for done, file in enumerate(files):
        ...         bgtasks.progress(done, len(files), file)
        ...         await read(file)

    """
    _check_number("done", done)
    if total is not None:
        _check_number("total", total)
    if text is not None and not isinstance(text, str):
        raise InvalidOptionError(f"text must be a string or None; got {describe(text)}")
    loop = _get_running_loop()
    task = None if loop is None else asyncio.current_task(loop)
    if task is None:
        return False
    record = record_of(task) if _is_tracked(task) else foreign_record(task)
    if record is None:
        return False
    fact: Progress = {"done": done, "total": total, "text": text}
    record.note("progress", fact)
    return True


def _is_tracked(task: asyncio.Task[object]) -> bool:
    # The compiled registry has a type of its own, with the methods of TrackedTask.
    return getattr(type(task), "get_coro", None) is TrackedTask.__dict__["get_coro"]


def _check_number(option: str, value: object) -> None:
    try:
        # An int may be too large for a float, and then for what shows it.
        is_finite = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        is_finite = False
    if not is_finite:
        raise InvalidOptionError(f"{option} must be a finite number; got {describe(value)}")
