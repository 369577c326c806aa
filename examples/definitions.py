"""Reads the definitions of a source tree: every ``def``, ``async def`` and ``class`` of its Python files."""

from __future__ import annotations

import ast
import asyncio
import gc
import json
import os
import warnings
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from bgtasks import BackgroundExecutor

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
        """Yield the definitions, those of a few files at a time.

        Raises:
            WorkerDiedError: a process that parsed was killed.

        """
        workers = min(os.cpu_count() or 1, MAX_WORKERS)
        parsed: deque[asyncio.Future[_Parsed]] = deque()
        with BackgroundExecutor(kind="processes", max_concurrency=workers) as submit:
            try:
                for paths in _batches_of_paths(self.root):
                    # Whoever reads no further, or is cancelled, does not wait for files that nobody wants any more.
                    future = submit(_parse_files, self.root, paths, __cancel_on_exit__=True, __reraise_on_exit__=False)
                    parsed.append(asyncio.wrap_future(future))
                    if len(parsed) > 2 * workers:
                        yield self._count(await parsed.popleft())
                while parsed:
                    yield self._count(await parsed.popleft())
            finally:
                for waiting in parsed:
                    # A failure that nobody reads is no news for the log.
                    waiting.cancel()

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


def _prepare_process() -> None:
    """Set up a process that does nothing but parse; again and again, which does no harm."""
    # The compiler's warnings about this source do not belong in the report.
    warnings.simplefilter("ignore")
    # A syntax tree has no cycles: the collector would find nothing, in a sixth of the time.
    gc.disable()


def _parse_files(root: Path, paths: list[str]) -> _Parsed:
    """Return the definitions in some files, and how many of the files do parse and do not."""
    _prepare_process()
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
