"""Failed allocations, one at a time: the n-th one of a call raises MemoryError, all others succeed."""

from __future__ import annotations

import gc
import threading
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any

import pytest

from bgtasks._locks import Lock

try:
    import _testcapi
except ImportError:
    _testcapi = None  # type: ignore[assignment]

NEEDS_TESTCAPI = pytest.mark.skipif(
    not hasattr(_testcapi, "set_nomemory"), reason="this Python was built without _testcapi, which fails allocations"
)

# Where it was not compiled, CPython's own locks stay locked if there is no memory at the end of a ``with``.
HAS_SAFE_LOCKS = Lock.__module__ == "bgtasks._lock"
# The number of free tuples of one length that CPython keeps.
KEPT_TUPLES = 2_000
# A sweep is over when this number of calls in a row met no failed allocation.
CALM = 10
# What asyncio itself says of a task whose constructor failed; nobody else could keep it from that.
ASYNCIOS_OWN = ("Task was destroyed but it is pending!", "cannot reuse already awaited coroutine")


def call_failing(number: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function whose allocation of this number fails."""
    # With the three-tuples taken that CPython keeps for later, the end of a ``with`` allocates, too. They would have
    # the garbage collector run in the call, and the callbacks of others fail.
    gc.disable()
    taken = [(number, number, n) for n in range(KEPT_TUPLES if HAS_SAFE_LOCKS else 0)]
    _testcapi.set_nomemory(number, number + 1)
    try:
        return function(*args, **kwargs)
    finally:
        _testcapi.remove_mem_hooks()
        del taken
        gc.enable()


def locked_elsewhere() -> list[Any]:
    """Return the locks of bgtasks that another thread cannot acquire at once."""
    locked: list[Any] = []

    def acquire() -> None:
        for lock in [found for found in gc.get_objects() if type(found) is Lock]:
            if lock.acquire(blocking=False):
                lock.release()
            else:
                locked.append(lock)

    thread = threading.Thread(target=acquire)
    thread.start()
    thread.join()
    return locked


@types.coroutine
def step_failing(number: int, step: int, coro: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Run a coroutine one step of which has an allocation that fails; nothing else fails, the loop least of all."""
    taken, value = 0, None
    error: BaseException | None = None
    while True:
        advance: Callable[..., Any] = coro.send if error is None else coro.throw
        argument = value if error is None else error
        try:
            awaited = call_failing(number, advance, argument) if taken == step else advance(argument)
        except StopIteration as end:
            return end.value
        except MemoryError:
            # Its frame could not be made: it never began.
            coro.close()
            raise
        taken += 1
        value = error = None
        try:
            value = yield awaited
        except BaseException as thrown:
            error = thrown


class Sweep:
    """The numbers of allocations, one after another, until calls succeed."""

    def __init__(self) -> None:
        self.failed = 0
        self._calm = 0

    def __iter__(self) -> Iterator[int]:
        """Give one number after another."""
        number = 0
        while self._calm < CALM:
            self._calm += 1
            yield number
            number += 1
        assert self.failed, "no allocation failed"

    def meet(self, error: Exception | None) -> None:
        """Take note of the outcome of a call."""
        if error is not None:
            self.failed += 1
            self._calm = 0


def others_errors(errors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take the errors out that reached a loop's exception handler, and return those that are not asyncio's own."""
    gc.collect()
    found = [
        context
        for context in errors
        if not any(text in f"{context['message']} {context.get('exception')}" for text in ASYNCIOS_OWN)
    ]
    errors.clear()
    return found
