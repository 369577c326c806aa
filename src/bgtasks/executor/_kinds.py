"""The kinds of runners: the worker thread itself, or a process or an interpreter of that thread."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from types import CoroutineType
from typing import Any, Literal, TypeAlias, get_args

from bgtasks._checks import check_choice
from bgtasks._locations import location_of_thread
from bgtasks.executor._call import Call, Runner
from bgtasks.executor._refusals import wants_loop

__all__ = ["ExecutorKind", "default_concurrency", "runners_of"]

ExecutorKind: TypeAlias = Literal["threads", "processes", "interpreters"]


class ThreadRunner:
    """Runs functions in the worker thread itself, each in its submitter's context."""

    def run(self, call: Call) -> Any:
        """Run the function and return its result or raise its error."""
        if call.next_tick:
            # Releases the GIL once, so that the submitter goes first.
            time.sleep(0)
        assert call.context is not None, "the call is not closed"
        result = call.context.run(call.fn, *call.args, **call.kwargs)
        if type(result) is CoroutineType:
            result.close()
            raise wants_loop(call.__qualname__)
        return result

    def interrupt(self) -> None:
        """Do nothing: a thread cannot be interrupted."""

    def location(self, worker: threading.Thread) -> str:
        """Return where the function stands that runs for this worker thread, as text for the log."""
        return location_of_thread(worker.ident)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def default_concurrency(kind: ExecutorKind) -> int:
    """Return how many functions run at once by default: as many as in the executors of ``concurrent.futures``."""
    processors = (getattr(os, "process_cpu_count", None) or os.cpu_count)() or 1
    return min(32, processors + 4) if kind == "threads" else processors


def runners_of(kind: ExecutorKind) -> Callable[[], Runner]:
    """Return the factory of the runners of this kind.

    Raises:
        InvalidOptionError: there is no such kind, or not in this Python.

    """
    check_choice("kind", kind, get_args(ExecutorKind))
    if kind == "processes":
        from bgtasks.executor._processes import ProcessRunner

        return ProcessRunner
    if kind == "interpreters":
        from bgtasks.executor._interpreters import interpreter_runner

        return interpreter_runner()
    return ThreadRunner
