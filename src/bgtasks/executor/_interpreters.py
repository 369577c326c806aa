"""Runs functions in interpreters with their own GIL (Python 3.14)."""

from __future__ import annotations

import concurrent.futures
import sys
import threading
from collections.abc import Callable
from multiprocessing import spawn
from typing import Any, Final

from bgtasks import errors
from bgtasks.executor._call import Call
from bgtasks.executor._pickled import answer_to, packed, payload_of, unpacked

# The preparations that an interpreter needs; others, such as the working directory, apply to the whole process.
PREPARATIONS: Final = ("sys_path", "sys_argv", "init_main_from_name", "init_main_from_path")

# True in an interpreter that is being prepared: it runs the program's file then, without its main part.
_is_preparing = False


class InterpreterRunner:
    """Runs functions in one interpreter, which ``InterpreterPoolExecutor`` keeps.

    The interpreter finds the program's modules, the main module included, as a spawned process does.
    """

    def __init__(self, pool: concurrent.futures.Executor) -> None:
        self._pool = pool
        self._is_prepared = False

    def run(self, call: Call) -> Any:
        """Run the function and return its result or raise its error."""
        if not self._is_prepared:
            self._answer(packed(_prepare, (_preparations(),), {}))
            self._is_prepared = True
        return self._answer(payload_of(call))

    def _answer(self, payload: bytes) -> Any:
        return unpacked(self._pool.submit(answer_to, payload).result())

    def interrupt(self) -> None:
        """Do nothing: an interpreter cannot be stopped from outside."""

    def location(self, worker: threading.Thread) -> str:
        """Return where the function stands that runs for this worker thread, as text for the log."""
        return "in an interpreter of its own"

    def close(self) -> None:
        """End the interpreter."""
        self._pool.shutdown()


def _preparations() -> dict[str, Any]:
    data = spawn.get_preparation_data("")
    return {key: data[key] for key in PREPARATIONS if key in data}


def _prepare(preparations: dict[str, Any]) -> None:
    """Make the program's modules known, the main one included; runs in the interpreter."""
    global _is_preparing
    _is_preparing = True
    try:
        spawn.prepare(preparations)
    finally:
        _is_preparing = False


def interpreter_runner() -> Callable[[], InterpreterRunner]:
    """Return the factory of the runners; refuse a Python without such interpreters."""
    pool: Callable[..., concurrent.futures.Executor] | None = getattr(
        concurrent.futures, "InterpreterPoolExecutor", None
    )
    if pool is None:
        raise errors.InvalidOptionError(
            f"kind='interpreters' needs Python 3.14 or later, this is {sys.version.partition(' ')[0]}: "
            "use 'processes' for functions that compute, or 'threads'"
        )
    if _is_preparing:
        raise errors.InvalidProgramError(
            "the program starts interpreters while its file is imported, and each interpreter imports that file: "
            'put the code that starts the program under if __name__ == "__main__":'
        )
    return lambda: InterpreterRunner(pool(max_workers=1))
