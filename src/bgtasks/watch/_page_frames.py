"""The frames of the page: what it shows once a second, as one JSON object of less than 50 kB.

Each part has a budget in bytes, so that no name, error or number of tasks makes a frame longer. Rows are arrays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl

from bgtasks._statistics import BUCKET_EDGES
from bgtasks.errors import WatchError
from bgtasks.watch._answers import SORTS, STATES
from bgtasks.watch._page_source import Source

__all__ = ["Query", "make_frame"]

ROWS: Final = 200
LONGEST_TEXT: Final = 64
LONGEST_VALUE: Final = 200
# Bytes; their sum leaves 2 kB of the 50 kB for the frame itself.
BUDGETS: Final = {"tasks": 28_000, "names": 11_000, "publishers": 4_000, "loops": 3_500, "errors": 1_000}
# The columns by which names are sorted, the greatest first; "name" itself is sorted by the alphabet.
NAME_SORTS: Final = ("in_flight", "started", "failed", "p99_seconds", "max_seconds", "wait_p99_seconds", "name")
COUNTERS: Final = (
    "started",
    "in_flight",
    "completed",
    "failed",
    "cancelled",
    "timed_out",
    "abandoned",
)
TIMES: Final = ("p50_seconds", "p90_seconds", "p99_seconds", "max_seconds", "wait_p99_seconds")


class Query(NamedTuple):
    """What a viewer wants to see.

    ``by`` is the order of the names; ``chosen`` is a name that is among them whatever the order.
    """

    name: str | None = None
    state: str | None = None
    older_than: float | None = None
    sort: str = "age"
    by: str = "in_flight"
    chosen: str | None = None

    @classmethod
    def parse(cls, query: bytes) -> Query:
        """Return the query of a URL.

        Raises:
            WatchError: a parameter is unknown, or has an invalid value.

        """
        given: dict[str, Any] = {key: value for key, value in parse_qsl(query.decode("latin-1")) if value}
        unknown = given.keys() - set(cls._fields)
        if unknown:
            raise WatchError(f"unknown parameter {min(unknown)[:50]!r}; there are: {', '.join(cls._fields)}")
        if any(len(value) > LONGEST_VALUE for value in given.values()):
            raise WatchError(f"a parameter has at most {LONGEST_VALUE} characters")
        for key, choices in (("state", STATES), ("sort", SORTS), ("by", NAME_SORTS)):
            if given.get(key, choices[0]) not in choices:
                raise WatchError(f"{key} must be one of {', '.join(choices)}; got {given[key]!r}")
        if "older_than" in given:
            given["older_than"] = _seconds(given["older_than"])
        return cls(**given)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise WatchError(f"older_than must be a number of seconds, 0 or more; got {text!r}")
    return seconds


def make_frame(source: Source, query: Query) -> bytes:
    """Return a frame as JSON in one line.

    Raises:
        WatchError: the source refuses the query.

    """
    filters = {"name": query.name, "state": query.state, "older_than": query.older_than}
    answers, errors = source.ask("tasks", **filters, sort=query.sort, limit=ROWS)
    figures, more_errors = source.ask("names")
    tasks = _merged([row for answer in answers for row in answer["tasks"]], query.sort)
    names = _names(figures, query)
    parts = {
        "tasks": _rows(BUDGETS["tasks"], map(_task, tasks[:ROWS])),
        "names": _rows(BUDGETS["names"], names),
        "publishers": _rows(BUDGETS["publishers"], _publishers(figures)),
        "loops": _rows(BUDGETS["loops"], _loops(figures)),
        "errors": _rows(BUDGETS["errors"], (_short(error, 200) for error in dict.fromkeys([*errors, *more_errors]))),
    }
    head = {
        "processes": len(figures),
        "total": sum(answer["total"] for answer in answers),
        "matching": sum(answer["matching"] for answer in answers),
        "name_count": len(names),
        "totals": {
            key: sum(manager[key] for _, manager in _managers(figures))
            for key in (*COUNTERS, "queued", "waiting", "retried", "dropped")
        },
    }
    lists = "".join(f', "{key}": [{rows}]' for key, rows in parts.items())
    # A lone surrogate becomes \\udc80, which is how JSON writes it.
    return f"{json.dumps(head)[:-1]}{lists}}}".encode("utf-8", "backslashreplace")


def _rows(budget: int, rows: Iterable[Any]) -> str:
    """Return the first rows that fit into a number of bytes, as JSON."""
    lines: list[str] = []
    for row in rows:
        line = json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        budget -= len(line.encode("utf-8", "backslashreplace")) + 1
        if budget < 0:
            break
        lines.append(line)
    return ",".join(lines)


def _merged(rows: list[dict[str, Any]], sort: str) -> list[dict[str, Any]]:
    """Sort the rows of several processes."""
    match sort:
        case "age":
            # Tasks that began together keep their order from frame to frame.
            rows.sort(key=lambda row: (-round(row["age_seconds"], 1), _parts(row["id"])))
        case "name":
            rows.sort(key=lambda row: row["name"])
        case "state":
            rows.sort(key=lambda row: STATES.index(row["state"]))
        case "time_left":
            rows.sort(key=lambda row: math.inf if row["time_left_seconds"] is None else row["time_left_seconds"])
    return rows


def _parts(task: str) -> list[int]:
    return [int(part) for part in task.split(".")]


def _task(row: Mapping[str, Any]) -> list[Any]:
    progress = row["progress"]
    context = ", ".join(f"{_short(key, 30)}={_short(value, 40)}" for key, value in row.get("context", {}).items())
    return [
        row["id"],
        row["state"],
        _short(row["name"]),
        _short(row["coroutine"]),
        _number(row["age_seconds"]),
        _number(row["time_left_seconds"]),
        progress and [_number(progress["done"]), _number(progress["total"]), _short(progress["text"] or "")],
        _short(context),
        row["attempt"],
        _number(row["next_attempt_seconds"]),
    ]


def _managers(figures: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{answer['pid']}.{manager['manager']}", manager) for answer in figures for manager in answer["managers"]]


def _names(figures: list[dict[str, Any]], query: Query) -> list[list[Any]]:
    found = [
        (label, name, stats)
        for label, manager in _managers(figures)
        for name, stats in manager["names"].items()
        if query.name is None or query.name in name or name == query.chosen
    ]
    if query.by == "name":
        found.sort(key=lambda each: each[1])
    else:
        found.sort(key=lambda each: (-(each[2][query.by] or 0), each[1]))
    found.sort(key=lambda each: each[1] != query.chosen)
    return [
        [
            label,
            _short(name, LONGEST_VALUE if name == query.chosen else LONGEST_TEXT),
            *(stats[key] for key in COUNTERS),
            *(_number(stats[key]) for key in TIMES),
            _short(stats["last_error"] or ""),
        ]
        for label, name, stats in found
    ]


def _publishers(figures: list[dict[str, Any]]) -> list[list[Any]]:
    return [
        [
            label,
            _short(each["name"]),
            each["state"],
            each["queue_events"],
            each["spooled"],
            sum(each["dropped"].values()),
            ", ".join(f"{reason} {count}" for reason, count in each["dropped"].items() if count),
            each["delivered"],
            _percentile(each["lag"], 0.99),
            _number(each["lag"]["max_seconds"]),
            _number(each["oldest_age_seconds"]),
            _short(each["last_error"] or "", 100),
        ]
        for label, manager in _managers(figures)
        for each in manager["publishers"]
    ]


def _loops(figures: list[dict[str, Any]]) -> list[list[Any]]:
    rows = []
    for label, manager in _managers(figures):
        for loop in manager["loops"]:
            block = loop["last_block"]
            by = block and [
                None if block["task_id"] is None else f"{label}.{block['task_id']}",
                None if block["task"] is None else _short(block["task"]),
                _number(block["seconds"]),
                [_short(line.strip(), 160) for line in block["stack"][:3]],
            ]
            rows.append(
                [
                    label,
                    _short(loop["loop"]),
                    _short(loop["thread"]),
                    loop["blocked"],
                    _number(loop["blocked_seconds"]),
                    _percentile(loop["lag"], 0.5),
                    _percentile(loop["lag"], 0.99),
                    _number(loop["lag"]["max_seconds"]),
                    by,
                ]
            )
    return rows


def _percentile(histogram: Mapping[str, Any], share: float) -> float | None:
    """Return an upper bound of a percentile, in seconds."""
    seen = 0
    for bucket, count in histogram["buckets"]:
        seen += count
        if seen >= share * histogram["count"]:
            return _number(min(BUCKET_EDGES[bucket], histogram["max_seconds"]))
    return None


def _number(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.4g}")


def _short(text: object, longest: int = LONGEST_TEXT) -> str:
    plain = str(text)
    return plain if len(plain) <= longest else f"{plain[: longest - 1]}…"
