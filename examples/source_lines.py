"""Reads the lines of a source tree: every line with code or a comment of its Python files."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["Event", "SourceLines", "encode"]

EVENTS_AT_ONCE: Final = 10_000
# The kind of a line by its first word; any other is a statement.
KINDS: Final = {
    "def": "function",
    "class": "class",
    "import": "import",
    "from": "import",
    "return": "return",
    "if": "branch",
    "elif": "branch",
    "else:": "branch",
    "for": "loop",
    "while": "loop",
    "#": "comment",
}

encode = json.JSONEncoder(separators=(",", ":")).encode


class Event(NamedTuple):
    """Something to work on and to publish: its kind, a name to show, and the whole of it as JSON."""

    kind: str
    name: str
    payload: str


class SourceLines:
    """The lines below a directory that are not blank, in the order of their files."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files = 0
        self._skipped = 0

    def __str__(self) -> str:
        text = f"lines of {self._files:,} Python files below {self._root}"
        return f"{text}, {self._skipped:,} more cannot be read" if self._skipped else text

    async def read(self) -> AsyncGenerator[list[Event], None]:
        """Yield the lines, many at a time."""
        events: list[Event] = []
        for path in _paths(self._root):
            events.extend(self._lines_of(path))
            # Other tasks run between two files.
            await asyncio.sleep(0)
            if len(events) >= EVENTS_AT_ONCE:
                yield events
                events = []
        if events:
            yield events

    def _lines_of(self, path: str) -> Iterator[Event]:
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError:
            self._skipped += 1
            return
        self._files += 1
        module = os.path.relpath(path, self._root).replace(os.sep, "/")
        for number, line in enumerate(content.decode(errors="surrogateescape").split("\n"), 1):
            text = line.strip()
            if text:
                kind = KINDS.get(text.partition(" ")[0], "statement")
                payload = encode({"module": module, "line": number, "text": text})
                yield Event(kind, f"{module}:{number}", payload)


def _paths(root: Path) -> Iterator[str]:
    """Yield the paths of the Python files below a directory in an order that is always the same."""
    for directory, subdirectories, names in os.walk(root):
        subdirectories.sort()
        for name in sorted(names):
            if name.endswith(".py"):
                yield os.path.join(directory, name)
