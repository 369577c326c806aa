"""What a watched process answers: its tasks, figures by name, the stack of a task, cancellations.

Answers are made in the thread of the socket. It copies, filters and describes the records a few at a time, so that no
loop waits long for the GIL.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final, get_args

from bgtasks._observers import numbered_managers
from bgtasks._selection import state_of
from bgtasks.errors import WatchError, describe
from bgtasks.info import LiveState
from bgtasks.watch._published import figures_of

__all__ = ["SORTS", "STATES", "VERSION", "answer", "encoded", "number_of"]

VERSION: Final = 1
# In the order in which they are sorted.
STATES: Final[tuple[LiveState, ...]] = get_args(LiveState)
SORTS: Final = ("age", "name", "state", "time_left")
# After this many records the thread lets others have the GIL.
RECORDS_AT_ONCE: Final = 100

# A viewer that asks for more rows would hold the GIL, and the memory, for too long.
MOST_ROWS: Final = 10_000


def number_of(manager: Any) -> int:
    """Return the number of a manager of this process."""
    return next(number for number, each in numbered_managers() if each is manager)


def answer(request: Mapping[str, Any], show_context: Collection[str] = ()) -> dict[str, Any]:
    """Answer a request.

    Args:
        request: the version, the method and its arguments; with ``manager`` only of the manager with that number.
        show_context: the keys of task contexts whose values are in the answer.

    Raises:
        WatchError: the request is not understood.

    """
    if request.get("version") != VERSION:
        raise WatchError(f"this process speaks version {VERSION}: use the bgtasks of its environment to look at it")
    method = METHODS.get(str(request.get("do")))
    if method is None:
        raise WatchError(f"unknown request {request.get('do')!r}; there are: {', '.join(METHODS)}")
    # A request cannot ask for values itself.
    answered = method({**request, "show_context": show_context})
    return {"version": VERSION, "pid": os.getpid(), "command": " ".join(sys.argv)[:200], **answered}


def encoded(answered: Mapping[str, Any]) -> bytes:
    """Return an answer as a line of JSON, encoded row by row so that the GIL is free in between."""
    rows = answered.get("tasks")
    if rows is None:
        return json.dumps(answered, default=repr).encode() + b"\n"
    rest = json.dumps({key: value for key, value in answered.items() if key != "tasks"}, default=repr)
    lines = ",".join(json.dumps(row, default=repr) for row in _slowly(rows))
    return f'{rest[:-1]}, "tasks": [{lines}]}}\n'.encode()


def _tasks(request: Mapping[str, Any]) -> dict[str, Any]:
    limit = request.get("limit", 1000)
    if not isinstance(limit, int) or not 0 < limit <= MOST_ROWS:
        raise WatchError(f"limit must be a whole number from 1 to {MOST_ROWS}; got {limit!r}")
    key = _key_of(str(request.get("sort", "age")))
    counts = {"total": 0, "matching": 0}
    # Not sorted(): sorting 200,000 rows would hold the GIL for too long.
    first = heapq.nsmallest(limit, _matching(request, counts), key=lambda each: key(each[1]))
    # A record that ended meanwhile has lost its figures.
    shown = request["show_context"]
    rows = [_described(number, record, shown) for number, record in _slowly(first) if record.outcome == "running"]
    return {"tasks": rows, **counts}


def _managers_of(request: Mapping[str, Any]) -> list[tuple[int, Any]]:
    only = request.get("manager")
    return [(number, manager) for number, manager in numbered_managers() if only in (None, number)]


def _matching(request: Mapping[str, Any], counts: dict[str, int]) -> Iterator[tuple[int, Any]]:
    for number, manager in _managers_of(request):
        for record in _records(manager):
            counts["total"] += 1
            if _matches(record, request):
                counts["matching"] += 1
                yield number, record


def _records(manager: Any) -> Iterator[Any]:
    for records in manager._open_loops():  # noqa: SLF001  the interface of the cold half
        for part in records.parts(RECORDS_AT_ONCE):
            yield from part
            # Lets others have the GIL.
            time.sleep(0)


def _slowly(items: list[Any]) -> Iterator[Any]:
    for index, item in enumerate(items):
        if index % RECORDS_AT_ONCE == RECORDS_AT_ONCE - 1:
            time.sleep(0)
        yield item


def _matches(record: Any, request: Mapping[str, Any]) -> bool:
    name, state, older_than = request.get("name"), request.get("state"), request.get("older_than")
    return (
        (name is None or name in record.name)
        and (state is None or state == state_of(record))
        and (older_than is None or record.duration > older_than)
        and record.outcome == "running"
    )


def _described(number: int, record: Any, shown: Collection[str]) -> dict[str, Any]:
    info = record.info()
    context = info["context"]
    row = {key: value for key, value in info.items() if key not in ("task_id", "context", "done", "cancelled")}
    # The values may be secrets, and need not be plain.
    values = {key: describe(context[key]) for key in shown if key in context}
    row["context_keys"] = sorted(map(str, context))
    return {"id": f"{os.getpid()}.{number}.{info['task_id']}", **row, **({"context": values} if values else {})}


def _key_of(sort: str) -> Callable[[Any], Any]:
    match sort:
        case "age":
            return lambda record: -record.duration
        case "name":
            return lambda record: record.name
        case "state":
            return lambda record: STATES.index(state_of(record))
        case "time_left":
            return lambda record: math.inf if record.timeout is None else record.timeout - record.duration
    raise WatchError(f"unknown order {sort!r}; there are: {', '.join(SORTS)}")


def _names(request: Mapping[str, Any]) -> dict[str, Any]:
    managers = []
    for number, manager in _managers_of(request):
        stats = manager.stats()
        loops = manager.loop_stats()
        answered = {"manager": number, **stats, "loops": loops, "publishers": _publishers(manager)}
        managers.append({**answered, "executors": _executors(manager)})
    return {"managers": managers}


def _publishers(manager: Any) -> list[dict[str, Any]]:
    return figures_of(each for each in list(manager._attached) if hasattr(each, "emit"))  # noqa: SLF001


def _executors(manager: Any) -> list[dict[str, Any]]:
    """Return the functions in threads of each executor."""
    return [
        {
            "executor": records.label,
            "running": records.owned - records.queued - records.waiting,
            "queued": records.queued,
            "waiting": records.waiting,
        }
        for records in manager._open_loops()  # noqa: SLF001  the interface of the cold half
        if records.thread is None
    ]


def _histograms(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the durations and the waits of the tasks of a name, for each manager that has some."""
    found = [(number, manager.histograms().get(request.get("name"))) for number, manager in numbered_managers()]
    return {"histograms": [{"manager": number, **histograms} for number, histograms in found if histograms]}


def _stack(request: Mapping[str, Any]) -> dict[str, Any]:
    for _, record in _selected(request):
        lines = []
        coro = record.coro
        if record.waiting:
            return {"stack": ["  waits for its next attempt"], "name": record.name}
        while coro is not None:
            frame = _first(coro, "cr_frame", "gi_frame", "ag_frame")
            if frame is None:
                # The iterators of futures do not say which future it is.
                waiter = getattr(record.task, "_fut_waiter", None)
                lines.append(f"  waits for {describe(coro if waiter is None else waiter)}")
                break
            lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}')
            coro = _first(coro, "cr_await", "gi_yieldfrom", "ag_await")
        return {"stack": lines, "name": record.name}
    raise WatchError(f"task {request.get('id')} has ended, or there was none")


def _first(value: Any, *names: str) -> Any:
    return next((found for name in names if (found := getattr(value, name, None)) is not None), None)


def _cancel(request: Mapping[str, Any]) -> dict[str, Any]:
    """Count the tasks, or cancel them without waiting for their ends."""
    selected = _selected(request)
    if request.get("confirmed") is not True:
        return {"matching": len(selected)}
    return {"cancelled": sum(manager._request_cancel(record) for manager, record in selected)}  # noqa: SLF001


def _selected(request: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Return the tasks that a request names by an id or by a name, each with its manager."""
    name, task = request.get("name"), request.get("id")
    found = []
    for number, manager in _managers_of(request):
        for record in _records(manager):
            is_named = record.name == name if task is None else task == f"{os.getpid()}.{number}.{record.task_id}"
            if is_named and record.outcome == "running":
                found.append((manager, record))
    return found


METHODS: Final[dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "tasks": _tasks,
    "names": _names,
    "histograms": _histograms,
    "stack": _stack,
    "cancel": _cancel,
}
