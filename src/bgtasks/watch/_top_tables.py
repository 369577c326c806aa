"""The tables of ``bgtasks top``: their columns, and their rows out of the answers of several processes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from bgtasks._statistics import BUCKET_EDGES
from bgtasks.watch._top_poll import Look
from bgtasks.watch._viewer import clean, progress_text

__all__ = [
    "TABLES",
    "Column",
    "Figures",
    "Row",
    "Table",
    "bars",
    "count_of",
    "seconds",
    "sparkline",
]

# How many of the last rates are kept, and shown where there is room for them; and how many elsewhere.
KEPT: Final = 30
SPARKS: Final = 10
LEVELS: Final = "▁▂▃▄▅▆▇█"
OCTAVE: Final = 8

Row: TypeAlias = dict[str, Any]


def seconds(length: float | None) -> str:
    """Return a length of time in few characters."""
    if length is None:
        return "-"
    if length < 0.001:
        return f"{length * 1e6:.0f}µs"
    if length < 1:
        return f"{length * 1000:.3g}ms"
    if length < 600:
        return f"{length:.1f}s"
    return f"{length / 60:.0f}min" if length < 36000 else f"{length / 3600:.0f}h"


def count_of(number: float | None) -> str:
    """Return a count or a rate in few characters."""
    if number is None:
        return "-"
    if number == 0:
        return "0"
    if number < 10 and number != int(number):
        return f"{number:.1f}"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{number:.0f}"


def sparkline(figures: Sequence[float], width: int) -> str:
    """Return the last figures as bars, the largest of them the highest."""
    shown = list(figures)[-width:]
    top = max(shown, default=0.0)
    return "".join(LEVELS[0 if top <= 0 else min(int(value / top * 8), 7)] for value in shown).rjust(width)


def quantile(histogram: dict[str, Any], part: float) -> float | None:
    """Return an upper bound of a quantile, None if nothing was counted."""
    left = histogram["count"] * part
    for bucket, count in sorted(histogram["buckets"]):
        left -= count
        if left <= 0:
            return float(min(BUCKET_EDGES[bucket], histogram["max_seconds"]))
    return None


def bars(histogram: dict[str, Any], width: int) -> list[str]:
    """Return the lines of a histogram: a bar for each power of two of a microsecond from the first to the last."""
    counts: dict[int, int] = {}
    for bucket, count in histogram["buckets"]:
        octave = (bucket + OCTAVE - 1) // OCTAVE
        counts[octave] = counts.get(octave, 0) + count
    if not counts:
        return ["  nothing yet"]
    top = max(counts.values())
    lines = []
    for octave in range(min(counts), max(counts) + 1):
        count = counts.get(octave, 0)
        bar = "█" * round(count / top * width) or ("▏" if count else "")
        lines.append(f"  < {seconds(BUCKET_EDGES[octave * OCTAVE]):>7}  {bar} {count or ''}".rstrip())
    mean = histogram["sum_seconds"] / histogram["count"]
    return [*lines, f"  {histogram['count']} in all, mean {seconds(mean)}, max {seconds(histogram['max_seconds'])}"]


class Column(NamedTuple):
    """A column: its title, its text in a row, and the value to sort by, None if it does not sort.

    ``is_wide`` columns are shown where there is room for them.
    """

    title: str
    text: Callable[[Row], str]
    order: Callable[[Row], Any] | None = None
    is_number: bool = False
    is_wide: bool = False
    # How processes name this order.
    sort: str | None = None


def _text(title: str, key: str, **options: Any) -> Column:
    return Column(title, lambda row: clean("" if row[key] is None else row[key]), **options)


def _count(title: str, key: str, **options: Any) -> Column:
    return Column(title, lambda row: count_of(row[key]), lambda row: -(row[key] or 0), is_number=True, **options)


def _seconds(title: str, key: str, **options: Any) -> Column:
    return Column(title, lambda row: seconds(row[key]), lambda row: -(row[key] or 0), is_number=True, **options)


class Table(NamedTuple):
    """A table: its title, its columns, and the key that is filtered and sorted by at first."""

    title: str
    columns: tuple[Column, ...]
    filtered: str
    first: int

    @property
    def orders(self) -> list[int]:
        """The columns to sort by."""
        return [index for index, column in enumerate(self.columns) if column.order is not None]


def _progress(row: Row) -> str:
    return "" if row["progress"] is None else clean(progress_text(row["progress"]))


def _age(row: Row) -> tuple[float, str]:
    # Ages are read one after another: without rounding, tasks that began together would change places all the time.
    return -round(row["age_seconds"], 1), row["key"]


def _left(row: Row) -> float:
    left: float | None = row["time_left_seconds"]
    return math.inf if left is None else left


def _name(title: str, key: str, **options: Any) -> Column:
    return Column(title, lambda row: clean(row[key]), lambda row: str(row[key]), **options)


TABLES: Final[dict[str, Table]] = {
    "tasks": Table(
        "Tasks",
        (
            _text("ID", "id"),
            _name("STATE", "state", sort="state"),
            Column("AGE", lambda row: seconds(row["age_seconds"]), _age, is_number=True, sort="age"),
            Column("LEFT", lambda row: seconds(row["time_left_seconds"]), _left, is_number=True, sort="time_left"),
            _name("NAME", "name", sort="name"),
            Column("PROGRESS", _progress),
            _count("ATTEMPT", "attempt", is_wide=True),
            _seconds("NEXT", "next_attempt_seconds", is_wide=True),
            _text("COROUTINE", "coroutine", is_wide=True),
            _text("PARENT", "parent_id", is_wide=True),
            _text("LOOP", "loop", is_wide=True),
            _text("ORIGIN", "origin", is_wide=True),
            Column("CONTEXT", lambda row: clean(", ".join(row["context_keys"])), is_wide=True),
        ),
        "name",
        2,
    ),
    "names": Table(
        "Names",
        (
            _text("PID", "pid"),
            _name("NAME", "name"),
            _count("LIVE", "in_flight"),
            _count("RATE/s", "rate"),
            Column("", lambda row: sparkline(row["rates"], row["sparks"])),
            _count("FAILED", "failed"),
            _seconds("P50", "p50_seconds"),
            _seconds("P99", "p99_seconds"),
            _count("STARTED", "started", is_wide=True),
            _count("TIMED OUT", "timed_out", is_wide=True),
            _count("CANCELLED", "cancelled", is_wide=True),
            _seconds("P90", "p90_seconds", is_wide=True),
            _seconds("MAX", "max_seconds", is_wide=True),
            _seconds("WAIT P50", "wait_p50_seconds", is_wide=True),
            _seconds("WAIT P99", "wait_p99_seconds", is_wide=True),
            _text("LAST ERROR", "last_error", is_wide=True),
        ),
        "name",
        3,
    ),
    "loops": Table(
        "Loops",
        (
            _text("PID", "pid"),
            _name("THREAD", "thread"),
            _seconds("LAG", "rate"),
            Column("", lambda row: sparkline(row["rates"], row["sparks"])),
            _seconds("P99", "lag_p99"),
            _count("BLOCKS", "blocked"),
            _seconds("BLOCKED", "blocked_seconds"),
            _text("LAST BLOCKED BY", "blocker"),
            _seconds("LAG MAX", "lag_max", is_wide=True),
            _seconds("THRESHOLD", "threshold_seconds", is_wide=True),
            _text("LOOP", "loop", is_wide=True),
            _text("AT", "blocked_at", is_wide=True),
        ),
        "thread",
        2,
    ),
    "publishers": Table(
        "Publishers",
        (
            _text("PID", "pid"),
            _name("NAME", "name"),
            _name("STATE", "state"),
            _count("QUEUE", "queue_events"),
            _count("RATE/s", "rate"),
            Column("", lambda row: sparkline(row["rates"], row["sparks"])),
            _count("SPOOLED", "spooled"),
            _count("DROPPED", "dropped_events"),
            _seconds("LAG P99", "lag_p99"),
            _count("ACCEPTED", "accepted", is_wide=True),
            _count("DELIVERED", "delivered", is_wide=True),
            _count("REFUSED", "refused_events", is_wide=True),
            _count("RETRIED", "retried", is_wide=True),
            _seconds("OLDEST", "oldest_age_seconds", is_wide=True),
            _text("LAST ERROR", "last_error", is_wide=True),
        ),
        "name",
        3,
    ),
    "executors": Table(
        "Executors",
        (
            _text("PID", "pid"),
            _name("EXECUTOR", "executor"),
            _count("RUNNING", "running"),
            _count("QUEUED", "queued"),
            _count("WAITING", "waiting"),
            _count("SUBMITTED/s", "rate", is_wide=True),
        ),
        "executor",
        2,
    ),
}


class Figures:
    """The last answers of all processes, and rates out of two answers each.

    It is for one thread. Its memory is bounded by the names, the loops and the publishers of the processes.
    """

    def __init__(self) -> None:
        self.looks: dict[int, Look] = {}
        self.errors: dict[int, str] = {}
        # The last counters, and the last rates, by process and row.
        self._counters: dict[int, dict[str, tuple[float, float]]] = {}
        self._rates: dict[int, dict[str, deque[float]]] = {}

    def add(self, look: Look) -> None:
        """Take the answers of a process."""
        self.looks[look.pid] = look
        self.errors.pop(look.pid, None)
        before = self._counters.get(look.pid, {})
        rates = self._rates.setdefault(look.pid, {})
        counters = {}
        for key, count, weight in _counted(look):
            counters[key] = count, look.at if weight is None else weight
            if key in before:
                count_before, weight_before = before[key]
                passed = counters[key][1] - weight_before
                rate = (count - count_before) / passed if passed > 0 else 0.0
                rates.setdefault(key, deque(maxlen=KEPT)).append(max(rate, 0.0))
        for key in rates.keys() - counters.keys():
            del rates[key]
        self._counters[look.pid] = counters

    def miss(self, pid: int, error: str) -> None:
        """Note that a process does not answer."""
        self.errors[pid] = error

    def remove(self, pid: int) -> None:
        """Forget a process that has ended."""
        for kept in (self.looks, self.errors, self._counters, self._rates):
            kept.pop(pid, None)

    def rows(self, table: str, text: str = "", order: int = 0, sparks: int = SPARKS) -> list[Row]:
        """Return the rows of a table with ``text`` in their names, in the order of a column; each has a ``key``."""
        chosen = TABLES[table]
        found = [row for look in self.looks.values() for row in ROWS[table](look)]
        rows = [row for row in found if text in str(row[chosen.filtered])] if text else found
        for row in rows:
            row["rates"] = self._rates.get(row["pid"], {}).get(row["key"], ())
            row["rate"] = row["rates"][-1] if row["rates"] else None
            row["sparks"] = sparks
        value = chosen.columns[order].order
        return rows if value is None else sorted(rows, key=value)

    def summary(self) -> str:
        """Return one line about all processes."""
        if not self.looks and not self.errors:
            return "no watched process yet: start one with BGTASKS_WATCH=1 or watch=True"
        tasks = sum(look.tasks["total"] for look in self.looks.values())
        started = sum(rates[-1] for each in self._rates.values() for key, rates in each.items() if key.startswith("n"))
        parts = [_plural(len(self.looks), "process"), _plural(tasks, "task"), f"{count_of(started)}/s started"]
        parts += [f"{pid} does not answer" for pid in self.errors]
        parts += [f"{row['pid']} is blocked by {row['blocker']}" for row in self.rows("loops") if row["is_blocked"]]
        return " · ".join(parts)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")


def _counted(look: Look) -> Iterator[tuple[str, float, float | None]]:
    """Yield each figure of which a rate is shown: the key of its row, the figure, and by what it is divided.

    None divides by seconds.
    """
    for row in _names(look):
        yield row["key"], row["started"], None
    for row in _loops(look):
        yield row["key"], row["lag"]["sum_seconds"], row["lag"]["count"]
    for row in _publishers(look):
        yield row["key"], row["delivered"], None


def _managers(look: Look) -> Iterator[dict[str, Any]]:
    yield from look.figures["managers"]


def _tasks(look: Look) -> list[Row]:
    return [{**task, "pid": look.pid, "key": task["id"]} for task in look.tasks["tasks"]]


def _names(look: Look) -> list[Row]:
    return [
        {**stats, "pid": look.pid, "name": name, "key": f"n{look.pid}.{manager['manager']}.{name}"}
        for manager in _managers(look)
        for name, stats in manager["names"].items()
    ]


def _loops(look: Look) -> list[Row]:
    rows = []
    for manager in _managers(look):
        for loop in manager["loops"]:
            block = loop["last_block"]
            figures = {
                "key": f"l{look.pid}.{manager['manager']}.{loop['loop']}",
                "pid": look.pid,
                "lag_p99": quantile(loop["lag"], 0.99),
                "lag_max": loop["lag"]["max_seconds"],
                "blocker": None if block is None else block["task"] or "a callback",
                "blocked_at": block["stack"][0].strip() if block is not None and block["stack"] else None,
                "is_blocked": block is not None and block["seconds"] is None,
            }
            rows.append({**loop, **figures})
    return rows


def _publishers(look: Look) -> list[Row]:
    return [
        {
            **stats,
            "key": f"p{look.pid}.{manager['manager']}.{index}",
            "pid": look.pid,
            "dropped_events": sum(stats["dropped"].values()),
            "refused_events": sum(stats["refused"].values()),
            "lag_p99": quantile(stats["lag"], 0.99),
        }
        for manager in _managers(look)
        for index, stats in enumerate(manager["publishers"])
    ]


def _executors(look: Look) -> list[Row]:
    return [
        {**executor, "key": f"e{look.pid}.{manager['manager']}.{executor['executor']}", "pid": look.pid}
        for manager in _managers(look)
        for executor in manager["executors"]
    ]


ROWS: Final[dict[str, Callable[[Look], list[Row]]]] = {
    "tasks": _tasks,
    "names": _names,
    "loops": _loops,
    "publishers": _publishers,
    "executors": _executors,
}
