"""Runs functions in a process per worker thread: for functions that compute or have to be stopped."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from multiprocessing.connection import Connection
from typing import Any

from bgtasks import errors
from bgtasks.executor._call import Call
from bgtasks.executor._pickled import answer_to, payload_of, unpacked

# The message that no more functions follow.
END = b""


class ProcessRunner:
    """Runs functions in its own process, started with the first one, and again after it died.

    ``concurrent.futures.ProcessPoolExecutor`` cannot stop a running function, and makes the interpreter wait for it at
    exit. A process that belongs to one thread can be ended for one function.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
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
        """Wait for the end of the process; return its exit code."""
        with self._lock:
            process, pipe = self._process, self._pipe
            self._process = self._pipe = None
        if pipe is None:
            return None
        pipe.close()
        process.join()
        code: int | None = process.exitcode
        process.close()
        return code


def _serve(pipe: Connection) -> None:
    """Answer one packed function after another; runs in the process."""
    # Ctrl-C goes to the whole process group; the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            payload = pipe.recv_bytes()
        except EOFError:
            return
        if payload == END:
            return
        pipe.send_bytes(answer_to(payload))
