"""Reads the definitions of a source tree: every ``def``, ``async def`` and ``class`` of its Python files."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import gc
import json
import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["Definitions", "Event", "encode"]

FILES_AT_ONCE: Final = 4
MAX_WORKERS: Final = 8
KINDS: Final[dict[type[ast.AST], str]] = {
    ast.FunctionDef: "function",
    ast.AsyncFunctionDef: "async_function",
    ast.ClassDef: "class",
}
# The fields of a node that hold statements, or nodes that do, last one first: the walk pops from the end of its stack.
BLOCKS: Final = ("cases", "finalbody", "orelse", "handlers", "body")

encode = json.JSONEncoder(separators=(",", ":")).encode


class Event(NamedTuple):
    """Something to publish: its kind, a name to show, and the whole of it as JSON."""

    kind: str
    name: str
    payload: str


class _Parsed(NamedTuple):
    events: list[Event]
    files: int
    skipped: int


class Definitions:
    """The definitions below a directory, in the order of their files and lines.

    Files are parsed by other processes, a few ahead of the reader: in the loop's own thread a large one would hold up
    every task for a tenth of a second.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = 0
        self.skipped = 0

    def __str__(self) -> str:
        text = f"definitions in {self.files:,} files below {self.root}"
        return f"{text}, {self.skipped:,} more do not parse" if self.skipped else text

    async def read(self) -> AsyncGenerator[list[Event], None]:
        """Yield the definitions, those of a few files at a time."""
        loop = asyncio.get_running_loop()
        workers = min(os.cpu_count() or 1, MAX_WORKERS)
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare_worker)
        parsed: deque[asyncio.Future[_Parsed]] = deque()
        try:
            for paths in _batches_of_paths(self.root):
                with _ctrl_c_ignored():
                    parsed.append(loop.run_in_executor(pool, _parse_files, self.root, paths))
                if len(parsed) > 2 * workers:
                    yield self._count(await parsed.popleft())
            while parsed:
                yield self._count(await parsed.popleft())
        finally:
            for future in parsed:
                # If the pool broke, asyncio would log "exception was never retrieved" for these futures.
                if not future.cancel():
                    future.exception()
            pool.shutdown(wait=False)

    def _count(self, parsed: _Parsed) -> list[Event]:
        self.files += parsed.files
        self.skipped += parsed.skipped
        return parsed.events


def _batches_of_paths(root: Path) -> Iterator[list[str]]:
    """Yield the paths of the Python files below a directory, a few at a time, in an order that is always the same."""
    paths: list[str] = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories.sort()
        for name in sorted(names):
            if name.endswith(".py"):
                paths.append(os.path.join(directory, name))
                if len(paths) == FILES_AT_ONCE:
                    yield paths
                    paths = []
    if paths:
        yield paths


@contextlib.contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Ignore Ctrl-C in processes that are started meanwhile: a terminal sends it to all, the program ends its own."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _prepare_worker() -> None:
    """Set up a process that does nothing but parse."""
    # On Windows it is not inherited.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The compiler's warnings about this source do not belong in the report.
    warnings.simplefilter("ignore")
    # A syntax tree has no cycles: the collector would find nothing, in a sixth of the time.
    gc.disable()


def _parse_files(root: Path, paths: list[str]) -> _Parsed:
    """Return the definitions in some files, and how many of the files do parse and do not."""
    events: list[Event] = []
    skipped = 0
    for path in paths:
        try:
            with open(path, "rb") as file:
                tree = ast.parse(file.read())
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            skipped += 1
        else:
            events.extend(_definitions_in(tree, os.path.relpath(path, root).replace(os.sep, "/")))
    return _Parsed(events, len(paths) - skipped, skipped)


def _definitions_in(tree: ast.Module, module: str) -> Iterator[Event]:
    """Yield the definitions in a module, outer ones before inner ones."""
    stack: list[tuple[ast.AST, str]] = [(tree, "")]
    while stack:
        node, prefix = stack.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            kind = KINDS[type(node)]
            name = prefix + node.name
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            record = {"module": module, "name": name, "kind": kind, "line": node.lineno, "lines": lines}
            yield Event(kind, name, encode(record))
            prefix = f"{name}." if kind == "class" else f"{name}.<locals>."
        for block in BLOCKS:
            stack.extend([(child, prefix) for child in reversed(getattr(node, block, ()))])
