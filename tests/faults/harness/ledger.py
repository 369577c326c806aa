"""What the processes of a row write down: a line of JSON for each step, with the time of a clock that all share."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["Ledger", "ids_of", "read_ledgers"]


class Ledger:
    """A file of lines, each written by one system call, so that SIGKILL leaves whole lines.

    Args:
        path: the file; made if it is missing.

    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, **line: Any) -> None:
        """Write a line, with the time of the machine's monotonic clock."""
        os.write(self._descriptor, json.dumps({"at": time.monotonic(), **line}).encode() + b"\n")


def read_ledgers(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of all ledgers of a folder, in the order of their times."""
    lines = [json.loads(line) for path in folder.glob("*.ledger") for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: line["at"])


def ids_of(events: Iterable[bytes]) -> list[tuple[str, int]]:
    """Return producer and number of encoded events."""
    return [(event["producer"], event["number"]) for event in map(json.loads, events)]
