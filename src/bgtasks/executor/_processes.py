"""Runs functions in a process per worker thread: for functions that compute or have to be stopped."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Final

from bgtasks import errors
from bgtasks._locks import Lock
from bgtasks.executor._call import Call
from bgtasks.executor._pickled import answer_to, payload_of, unpacked

# The message that no more functions follow.
END: Final = b""
# Seconds, at most, after which a process notices that its parent has ended.
PARENT_INTERVAL: Final = 0.5


class ProcessRunner:
    """Runs functions in its own process, started with the first one, and again after it died.

    ``concurrent.futures.ProcessPoolExecutor`` cannot stop a running function, and makes the interpreter wait for it at
    exit. A process that belongs to one thread can be ended for one function.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: Any = None
        self._pipe: Connection | None = None
        self._is_interrupted = False

    def run(self, call: Call) -> Any:
        """Run the function and return its result or raise its error."""
        with self._lock:
            if self._is_interrupted:
                raise errors.WorkerDiedError(f"{call.__qualname__} was abandoned before a process ran it")
            pipe = self._start() if self._pipe is None else self._pipe
        try:
            pipe.send_bytes(payload_of(call))
            outcome = pipe.recv_bytes()
        except (EOFError, OSError):
            code = self._stop()
            raise errors.WorkerDiedError(
                f"the process that ran {call.__qualname__} ended without an answer, exit code {code}: "
                "it was killed, or ended itself"
            ) from None
        return unpacked(outcome)

    def interrupt(self) -> None:
        """End the process, and with it the function that runs; start no other process."""
        with self._lock:
            self._is_interrupted = True
            if self._process is not None:
                self._process.terminate()

    def location(self, worker: threading.Thread) -> str:
        """Return where the function stands that runs for this worker thread, as text for the log."""
        process = self._process
        return "in a process that has ended" if process is None else f"in process {process.pid}"

    def close(self) -> None:
        """Ask the process to end, and wait until it has."""
        if self._pipe is not None:
            with contextlib.suppress(OSError):
                self._pipe.send_bytes(END)
            self._stop()

    def _start(self) -> Connection:
        # Not forked: this process has threads, and their locks would stay locked in the child.
        context = multiprocessing.get_context("spawn")
        pipe, child_end = context.Pipe()
        process = context.Process(target=_serve, args=(child_end,), name="bgtasks-worker", daemon=True)
        try:
            with _ctrl_c_blocked():
                process.start()
        except BaseException:
            pipe.close()
            raise
        finally:
            child_end.close()
        self._process = process
        self._pipe = pipe
        return pipe

    def _stop(self) -> int | None:
        """Wait for the end of the process; return its exit code, None if another thread learned it first."""
        with self._lock:
            process, pipe = self._process, self._pipe
            self._process = self._pipe = None
        if pipe is None:
            return None
        pipe.close()
        # Joined and not closed: at the interpreter's exit multiprocessing joins it at the same time, in the main
        # thread, and a process that was closed, or whose end only one of the two learns of, is an error there.
        process.join()
        code: int | None = process.exitcode
        return code


@contextlib.contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Block SIGINT in this thread and in processes that it starts meanwhile, until they ignore it."""
    if sys.platform == "win32":
        yield
        return
    # This would unblock it, once; it does nothing from then on.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection) -> None:
    """Answer one packed function after another; runs in the process."""
    # Ctrl-C goes to the whole process group; the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, name="bgtasks-parent", daemon=True).start()
    # A parent that is gone needs no answer.
    with contextlib.suppress(EOFError, OSError):
        while (payload := pipe.recv_bytes()) != END:
            pipe.send_bytes(answer_to(payload))


def _end_with_parent() -> None:
    """End this process, whatever runs in it, when the process that started it has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "another process started this one"
    # A process that the parent forked holds the other end of what is waited for: the parent's id tells, too.
    number = os.getppid()
    while parent.is_alive() and os.getppid() == number:
        parent.join(PARENT_INTERVAL)
    os._exit(1)
