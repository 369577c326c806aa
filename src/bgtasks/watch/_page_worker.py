"""A thread that makes frames, and runs only while somebody looks; and the signs that a server ends."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

__all__ = ["Worker", "server_is_ending"]

Result = TypeVar("Result")


class Worker:
    """Runs functions in one thread of its own, which starts with the first viewer and ends with the last one.

    Not in the loop's own threads, which the program may have filled.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._threads: ThreadPoolExecutor | None = None
        self._pid = os.getpid()
        self.viewers = 0

    async def __aenter__(self) -> Self:
        if self._pid != os.getpid():
            # The thread of the parent of a fork does not run here.
            self._pid, self._threads, self.viewers = os.getpid(), None, 0
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, thread_name_prefix=self._name)
        self.viewers += 1
        return self

    async def __aexit__(self, *error: object) -> None:
        self.viewers -= 1
        if self.viewers == 0 and self._threads is not None:
            self._threads.shutdown(wait=False)
            self._threads = None

    async def run(self, function: Callable[[], Result]) -> Result:
        """Return what a function returns in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)


def server_is_ending() -> bool:
    """Return whether the server was asked to end by SIGTERM or SIGINT.

    A server waits for its open responses before it ends the lifespan, so a stream has to end on its own. uvicorn
    handles signals by a method of an object that then says ``should_exit``.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        owner = getattr(signal.getsignal(number), "__self__", None)
        if getattr(owner, "should_exit", False) is True:
            return True
    return False
