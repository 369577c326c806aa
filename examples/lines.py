"""Reads the lines of a file, or of a pipe that may be silent for long."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from io import FileIO
from typing import Final, TypeVar

from source_lines import Event, encode

__all__ = ["Lines"]

Result = TypeVar("Result")

CHUNK: Final = 1 << 20


class Lines:
    """The lines of an open file. Bytes that are no UTF-8 become lone surrogates, as with ``surrogateescape``."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._count = 0

    def __str__(self) -> str:
        return "lines of standard input" if self._file.name == 0 else f"lines of {self._file.name!s}"

    async def read(self) -> AsyncGenerator[list[Event], None]:
        """Yield the lines as they come, many at a time."""
        pieces: list[bytes] = []
        # The raw file gives what a pipe holds so far; a buffered one would wait for a full chunk.
        while chunk := await _in_thread(lambda: self._file.read(CHUNK)):
            if b"\n" not in chunk:
                pieces.append(chunk)
                continue
            *lines, rest = b"".join((*pieces, chunk)).split(b"\n")
            pieces = [rest]
            yield self._events(lines)
        if last := b"".join(pieces):
            yield self._events([last])

    def _events(self, lines: Iterable[bytes]) -> list[Event]:
        events = []
        for line in lines:
            self._count += 1
            text = line.removesuffix(b"\r").decode(errors="surrogateescape")
            events.append(Event("line", f"line {self._count}", encode({"line": self._count, "text": text})))
        return events


def _in_thread(function: Callable[[], Result]) -> asyncio.Future[Result]:
    """Call a function in a daemon thread.

    The program waits for an executor's thread before it ends, even for one that reads from a silent terminal.
    """
    outcome: concurrent.futures.Future[Result] = concurrent.futures.Future()
    # A future that runs cannot be cancelled, so the thread may always set it.
    outcome.set_running_or_notify_cancel()

    def call() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=call, name="read", daemon=True).start()
    return asyncio.wrap_future(outcome)
