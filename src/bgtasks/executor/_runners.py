"""How a worker thread runs a function: itself, or in a process or an interpreter that it keeps for that."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import CoroutineType
from typing import Any, Literal, Protocol

from bgtasks import errors
from bgtasks.executor._call import Call

Kind = Literal["threads", "processes", "interpreters"]


class Runner(Protocol):
    """Runs one call after another, for one worker thread."""

    def run(self, call: Call) -> Any:
        """Run the function and return its result or raise its error."""

    def interrupt(self) -> None:
        """Stop the function that runs, if that can be done; called from another thread."""

    def close(self) -> None:
        """Let go of what the runner holds; no call runs."""


class ThreadRunner:
    """Runs functions in the worker thread itself, each in its submitter's context."""

    def run(self, call: Call) -> Any:
        """Run the function and return its result or raise its error."""
        if call.next_tick:
            # Lets go of the GIL once, so that the submitter goes first.
            time.sleep(0)
        assert call.context is not None, "the call is not closed"
        result = call.context.run(call.fn, *call.args, **call.kwargs)
        if type(result) is CoroutineType:
            result.close()
            raise errors.InvalidFunctionError(wants_a_loop(call.__qualname__))
        return result

    def interrupt(self) -> None:
        """Do nothing: a thread cannot be interrupted."""

    def close(self) -> None:
        """Do nothing: nothing is held."""


def wants_a_loop(function: str) -> str:
    """Return the text of the error for a coroutine function given to the sync executor."""
    return (
        f"{function} gives a coroutine, and BackgroundExecutor has no event loop to run it: "
        "AsyncBackgroundExecutor runs coroutine functions"
    )


def default_concurrency(kind: Kind) -> int:
    """Return how many functions run at once where nobody said: what the executors of ``concurrent.futures`` take."""
    processors = (getattr(os, "process_cpu_count", None) or os.cpu_count)() or 1
    return min(32, processors + 4) if kind == "threads" else processors


def runners_of(kind: Kind) -> Callable[[], Runner]:
    """Return what makes the runners of this kind."""
    if kind == "threads":
        return ThreadRunner
    if kind == "processes":
        from bgtasks.executor._processes import ProcessRunner

        return ProcessRunner
    if kind == "interpreters":
        from bgtasks.executor._interpreters import interpreter_runner

        return interpreter_runner()
    raise errors.InvalidOptionError(
        f"kind must be 'threads', 'processes' or 'interpreters'; got {errors.describe(kind)}"
    )
