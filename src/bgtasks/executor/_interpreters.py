"""Interpreters with a GIL of their own, where Python has them (3.14)."""

from __future__ import annotations

import concurrent.futures
import sys
from collections.abc import Callable
from typing import Any

from bgtasks import errors
from bgtasks.executor._call import Call
from bgtasks.executor._pickled import answer_to, payload_of, unpacked


class InterpreterRunner:
    """Runs functions in one interpreter, which ``InterpreterPoolExecutor`` keeps."""

    def __init__(self, pool: concurrent.futures.Executor) -> None:
        self._pool = pool

    def run(self, call: Call) -> Any:
        """Run the function and return its result or raise its error."""
        return unpacked(self._pool.submit(answer_to, payload_of(call)).result())

    def interrupt(self) -> None:
        """Do nothing: an interpreter cannot be stopped from outside."""

    def close(self) -> None:
        """End the interpreter."""
        self._pool.shutdown()


def interpreter_runner() -> Callable[[], InterpreterRunner]:
    """Return what makes the runners; refuse where there are no such interpreters."""
    pool: Callable[..., concurrent.futures.Executor] | None = getattr(
        concurrent.futures, "InterpreterPoolExecutor", None
    )
    if pool is None:
        raise errors.InvalidOptionError(
            f"kind='interpreters' needs Python 3.14 or later, this is {sys.version.partition(' ')[0]}: "
            "take 'processes' for functions that compute, or 'threads'"
        )
    return lambda: InterpreterRunner(pool(max_workers=1))
