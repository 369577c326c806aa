"""Errors that bgtasks raises, and their texts.

::

    BgtasksError
    ├── ExecutorClosedError   (RuntimeError)  new work for an executor outside its ``with`` block
    ├── InvalidContextError   (TypeError)     ``context`` or ``contextvars_context`` of the wrong type
    ├── InvalidFunctionError  (TypeError)     something that this executor cannot run
    ├── InvalidOptionError    (ValueError)    an invalid value of an option
    ├── InvalidProgramError   (TypeError)     ``run`` got no coroutine function
    ├── InvalidTimeoutError   (ValueError)    a timeout that is not a positive number
    ├── ManagerClosedError    (RuntimeError)  new work after ``shutdown``
    ├── ManagerNotBoundError  (LookupError)   a container was asked for a manager and holds none
    ├── MissingExtraError     (ImportError)   a package of an extra is not installed
    ├── NoManagerError        (RuntimeError)  an application without a manager was asked for it
    ├── NoRunningLoopError    (RuntimeError)  no event loop here, or several to choose from
    ├── NotACoroutineError    (TypeError)     something other than a coroutine object
    ├── NotPicklableError     (TypeError)     a function or value that cannot go to another process
    ├── RunningLoopError      (RuntimeError)  ``run`` inside a running event loop
    ├── TaskRejectedError     (RuntimeError)  the manager is at its cap
    ├── UnknownTaskError      (LookupError)   the result of a task that is not kept
    ├── WatchError            (RuntimeError)  a process that cannot be watched
    └── WorkerDiedError       (RuntimeError)  the process that ran a function ended without an answer

A refused coroutine is closed, so no "was never awaited" warning follows. The texts are here, once, for both twins of
the registry.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

__all__ = [
    "BgtasksError",
    "ExecutorClosedError",
    "InvalidContextError",
    "InvalidFunctionError",
    "InvalidOptionError",
    "InvalidProgramError",
    "InvalidTimeoutError",
    "ManagerClosedError",
    "ManagerNotBoundError",
    "MissingExtraError",
    "NoManagerError",
    "NoRunningLoopError",
    "NotACoroutineError",
    "NotPicklableError",
    "RunningLoopError",
    "TaskRejectedError",
    "UnknownTaskError",
    "WatchError",
    "WorkerDiedError",
]


class BgtasksError(Exception):
    """Base of every error that bgtasks raises."""


class ExecutorClosedError(BgtasksError, RuntimeError):
    """The executor accepts work only inside its ``with`` block."""


class InvalidContextError(BgtasksError, TypeError):
    """``context`` is not a mapping, or ``contextvars_context`` is not a ``contextvars.Context``."""


class InvalidFunctionError(BgtasksError, TypeError):
    """The submitted object is not a function that this executor can run."""


class InvalidOptionError(BgtasksError, ValueError):
    """An option has an invalid value."""


class InvalidProgramError(BgtasksError, TypeError):
    """``run`` got no coroutine function that takes a manager, or a program starts itself endlessly."""


class InvalidTimeoutError(BgtasksError, ValueError):
    """A timeout is not a finite number of seconds, or is too small."""


class ManagerClosedError(BgtasksError, RuntimeError):
    """The manager was shut down and accepts no more work."""


class ManagerNotBoundError(BgtasksError, LookupError):
    """A container was asked for a manager and holds none."""


class MissingExtraError(BgtasksError, ImportError):
    """A feature needs a package of an extra that is not installed."""


class NoManagerError(BgtasksError, RuntimeError):
    """An application was asked for its task manager and has none."""


class NoRunningLoopError(BgtasksError, RuntimeError):
    """No running event loop was found, or the manager serves several and none was chosen."""


class NotACoroutineError(BgtasksError, TypeError):
    """Something other than a coroutine object was passed."""


class NotPicklableError(BgtasksError, TypeError):
    """A function, an argument or a result cannot be pickled, so it cannot go to another process or interpreter."""


class RunningLoopError(BgtasksError, RuntimeError):
    """``run`` was called in a thread that already runs an event loop."""


class TaskRejectedError(BgtasksError, RuntimeError):
    """The manager already has ``max_pending_tasks`` tasks in flight."""


class UnknownTaskError(BgtasksError, LookupError):
    """No result of this task is kept: it was submitted without ``keep_result``, or its time is over."""


class WatchError(BgtasksError, RuntimeError):
    """A process cannot be watched: it does not listen, its socket is not safe, or it refused a request."""


class WorkerDiedError(BgtasksError, RuntimeError):
    """The process that ran a function ended before it answered."""


def describe(value: object) -> str:
    """Return a short text for ``value`` without ever raising: its ``repr``, cut, or its type if that fails."""
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__} object>"
    return text if len(text) <= 200 else f"{text[:197]}..."


def text_of(error: BaseException) -> str:
    """Return the type and the message of an error, as in a traceback; only the type if its ``str`` fails."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def type_of(error: BaseException) -> str:
    """Return the name of the type of an error, with its module unless that is ``builtins``."""
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def not_a_coroutine(value: object) -> NotACoroutineError:
    """Return the error for a ``value`` that is not a coroutine object."""
    if inspect.iscoroutinefunction(value):
        name = getattr(value, "__name__", "function")
        text = f"{describe(value)} is a coroutine function, not a coroutine: call it, create_task({name}(...))"
    elif asyncio.isfuture(value):
        text = (
            f"{describe(value)} runs already: a manager starts coroutines. "
            "Await it inside a coroutine function and pass that coroutine"
        )
    else:
        text = f"a coroutine object is needed, got {type(value).__name__}: {describe(value)}"
    return NotACoroutineError(text)


def invalid_timeout(value: object) -> InvalidTimeoutError:
    """Return the error for a task's timeout that is not a positive number of seconds."""
    return InvalidTimeoutError(
        f"timeout must be a finite number of seconds, greater than 0, or None for no timeout; got {describe(value)}"
    )


def invalid_context(value: object) -> InvalidContextError:
    """Return the error for a ``context`` that is not a mapping."""
    if type(value).__name__ == "Context" and type(value).__module__ == "_contextvars":
        text = (
            "context is the mapping that goes into log records, got a contextvars.Context: "
            "pass that object as contextvars_context="
        )
    else:
        text = f"context must be a mapping or None, got {type(value).__name__}: {describe(value)}"
    return InvalidContextError(text)


def invalid_contextvars_context(value: object) -> InvalidContextError:
    """Return the error for a ``contextvars_context`` that is not a ``contextvars.Context``."""
    return InvalidContextError(
        f"contextvars_context must be a contextvars.Context or None, got {type(value).__name__}: {describe(value)}; "
        "a mapping for log records is passed as context="
    )


def unhashable_key(key: object) -> InvalidOptionError:
    """Return the error for a key that no dict accepts."""
    return InvalidOptionError(f"key must be hashable, such as a str or a tuple of them; got {describe(key)}")


def no_running_loop() -> NoRunningLoopError:
    """Return the error for a task started in a thread without an event loop."""
    return NoRunningLoopError(
        "no event loop runs in this thread: call from a coroutine or a callback of the loop, "
        "or hand the work over from a thread with create_task_threadsafe()"
    )


def manager_closed(name: str) -> ManagerClosedError:
    """Return the error for new work after ``shutdown``."""
    return ManagerClosedError(
        f"the manager was shut down and accepts no more tasks (name {describe(name)}): "
        "start work before shutdown(), or make a new manager"
    )


def manager_not_bound(wanted: type) -> ManagerNotBoundError:
    """Return the error for a container that holds no manager of the class ``wanted``."""
    return ManagerNotBoundError(
        f"no {wanted.__name__} is bound in the active InjectQ container: "
        "bind one with bgtasks.injection.bind(container), or activate the container that holds one"
    )


def missing_extra(extra: str, package: str, purpose: str) -> MissingExtraError:
    """Return the error for a package that is needed for ``purpose`` ("publish events") and not installed."""
    return MissingExtraError(f'{package} is needed to {purpose}: pip install "bgtasks-registry[{extra}]"')


def spawn_waits_for_itself(spawner: str, coro: Any, cap: int | None) -> TaskRejectedError:
    """Return the error for a task that would wait in ``spawn`` for its own end."""
    return TaskRejectedError(
        f"spawn() of {describe(coro)} would wait for itself: as many tasks as may be in flight "
        f"(max_pending_tasks={cap}) wait in spawn(), the calling {describe(spawner)} included, so none can end. Raise "
        "the limit above the number of tasks that spawn others, or spawn from outside of them"
    )


def close_refused(coro: Any) -> None:
    """Close a coroutine that will not run, so that Python does not warn that it was never awaited."""
    coro.close()
