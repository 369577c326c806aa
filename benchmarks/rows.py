"""The figures of a benchmark run: rows with a median and a spread, files of them, and what moved between two."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Row", "Run", "load", "moved", "save", "this_machine"]

FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One figure: the median of its rounds, and between which values the middle half of them lies."""

    part: str
    # What was measured: the loop and the work, or what grows.
    case: str
    name: str
    unit: str
    median: float
    low: float
    high: float
    # Where on the axis, for figures that are drawn as lines.
    x: float | None = None

    @classmethod
    def of(cls, values: Sequence[float], part: str, case: str, name: str, unit: str, x: float | None = None) -> Row:
        """Return the row of the values of all rounds."""
        low, median, high = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
        )
        return cls(part, case, name, unit, median, low, high, x)

    @property
    def key(self) -> tuple[Any, ...]:
        """Return what names the figure."""
        return (self.part, self.case, self.name, self.unit, self.x)


@dataclass(frozen=True)
class Run:
    """The rows of one interpreter on one machine; ``head`` says which ones."""

    head: Mapping[str, str]
    rows: Sequence[Row]


def this_machine(missing: Iterable[str], rounds: int) -> dict[str, str]:
    """Return the head of a run here: when, on what machine and interpreter, with what packages."""
    from bgtasks import IMPLEMENTATION

    implementation = f"{platform.python_implementation()} {platform.python_version()}"
    gil = "" if getattr(sys, "_is_gil_enabled", lambda: True)() else ", no GIL"
    return {
        "interpreter": f"{implementation}{gil}",
        "built with": platform.python_compiler(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "processor": _processor(),
        "load before": " ".join(f"{load:.1f}" for load in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown",
        "registry": IMPLEMENTATION,
        "wrapper": os.environ.get("BGTASKS_WRAPPER", "record"),
        "rounds": str(rounds),
        "not installed": ", ".join(missing) or "none",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")


def save(path: Path, run: Run) -> None:
    """Write a run into a file."""
    content = {"format": FORMAT, "head": dict(run.head), "rows": [asdict(row) for row in run.rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def load(path: Path) -> Run:
    """Read a run from a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no file of a run; the text says why.

    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']} instead of {FORMAT}")
        return Run(content["head"], [Row(**row) for row in content["rows"]])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not written by benchmarks/run.py --json: {error}") from error


def moved(before: Run, after: Run) -> list[tuple[Row, Row]]:
    """Return the rows of both runs whose middle halves do not overlap: (before, after)."""
    old = {row.key: row for row in before.rows}
    pairs = [(old[row.key], row) for row in after.rows if row.key in old]
    return [(first, second) for first, second in pairs if second.low > first.high or second.high < first.low]
