"""The commands ps, names, stack and cancel."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from bgtasks._checks import as_seconds
from bgtasks.errors import WatchError
from bgtasks.watch._answers import SORTS, STATES, VERSION
from bgtasks.watch._viewer import ask_all, asked_to_end, clean, numbered_tasks, pid_of, progress_text

__all__ = ["CANCEL", "NAMES", "PS", "STACK", "Command"]


class Command(NamedTuple):
    """A command of ``bgtasks``: its arguments, and a function that returns the exit status."""

    add_arguments: Callable[[argparse.ArgumentParser], object]
    run: Callable[[argparse.Namespace], int]


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pid", type=int, help="only this process; all watched processes of yours by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object, see the documentation")


def _age(text: str) -> float:
    try:
        seconds = as_seconds(float(text))
    except ValueError:
        seconds = None
    if seconds is None:
        raise argparse.ArgumentTypeError(f"it must be a number of seconds, 0 or more; got {text!r}")
    return seconds


def _add_ps(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("--name", help="only tasks with this text in their name")
    parser.add_argument("--state", choices=STATES, help="only tasks in this state")
    parser.add_argument("--older-than", type=_age, metavar="SECONDS", help="only tasks older than this")
    parser.add_argument(
        "--sort", choices=SORTS, default="age", help="the order; age, the default, has the oldest first"
    )
    parser.add_argument(
        "--limit", type=int, default=1000, help="at most this many tasks of each process; 1000 by default"
    )


def _ps(given: argparse.Namespace) -> int:
    filters = {"name": given.name, "state": given.state, "older_than": given.older_than}
    answers, errors = ask_all(given.pid, "tasks", **filters, sort=given.sort, limit=given.limit)
    if not _print_json(given, answers, errors):
        rows = [_row_of(task) for answer in answers for task in answer["tasks"]]
        _print_table(("ID", "STATE", "ATTEMPT", "NEXT", "AGE", "LEFT", "NAME", "COROUTINE", "PROGRESS"), rows)
        for answer in answers:
            if answer["matching"] > len(answer["tasks"]):
                print(f"process {answer['pid']}: {len(answer['tasks'])} of {answer['matching']} tasks are shown")
    return _status(errors)


def _row_of(task: dict[str, Any]) -> tuple[str, ...]:
    progress = task["progress"]
    return (
        task["id"],
        task["state"],
        str(task["attempt"]),
        _seconds(task["next_attempt_seconds"]),
        _seconds(task["age_seconds"]),
        _seconds(task["time_left_seconds"]),
        task["name"],
        task["coroutine"],
        "" if progress is None else progress_text(progress),
    )


def _names(given: argparse.Namespace) -> int:
    answers, errors = ask_all(given.pid, "names")
    if not _print_json(given, answers, errors):
        titles = (
            "PID",
            "NAME",
            "STARTED",
            "LIVE",
            "FAILED",
            "TIMED OUT",
            "P50",
            "P90",
            "P99",
            "MAX",
            "WAIT P99",
            "ERROR",
        )
        rows = [
            (str(answer["pid"]), name, *_figures(stats))
            for answer in answers
            for manager in answer["managers"]
            for name, stats in sorted(manager["names"].items())
        ]
        _print_table(titles, rows)
    return _status(errors)


def _figures(stats: dict[str, Any]) -> tuple[str, ...]:
    return (
        *(str(stats[key]) for key in ("started", "in_flight", "failed", "timed_out")),
        *(_seconds(stats[f"{key}_seconds"]) for key in ("p50", "p90", "p99", "max", "wait_p99")),
        stats["last_error"] or "",
    )


def _stack(given: argparse.Namespace) -> int:
    answers, errors = ask_all(pid_of(given.id), "stack", id=given.id)
    if not _print_json(given, answers, errors):
        for answer in answers:
            print(f"task {given.id} {answer['name']!r}, the outermost frame first:")
            print(*map(clean, answer["stack"]), sep="\n")
    return _status(errors)


def _add_cancel(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("id", nargs="?", help="the id of a task, as ps shows it")
    chosen.add_argument("--name", help="all tasks of exactly this name")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def _cancel(given: argparse.Namespace) -> int:
    chosen = {"name": given.name} if given.id is None else {"id": given.id}
    pid = given.pid if given.id is None else pid_of(given.id)
    answers, missed = ask_all(pid, "cancel", **chosen)
    count = sum(answer["matching"] for answer in answers)
    processes = sum(answer["matching"] > 0 for answer in answers)
    verb = "matches" if count == 1 else "match"
    print(f"{numbered_tasks(count)} in {processes} process{'' if processes == 1 else 'es'} {verb}", file=sys.stderr)
    _status(missed)
    if not count:
        return 1
    if not given.yes and not _confirms(f"Cancel {numbered_tasks(count)}? [y/N] "):
        return 1
    answers, errors = ask_all(pid, "cancel", **chosen, confirmed=True)
    if not _print_json(given, answers, errors):
        print(asked_to_end(answers))
    _status([error for error in errors if error not in missed])
    return 1 if errors else 0


def _confirms(question: str) -> bool:
    if not sys.stdin.isatty():
        raise WatchError("no terminal to ask on: pass --yes")
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        # Ctrl-D: the cursor stands behind the question.
        print()
        return False


def _print_json(given: argparse.Namespace, answers: list[dict[str, Any]], errors: list[str]) -> bool:
    if given.json:
        print(json.dumps({"version": VERSION, "processes": answers, "errors": errors}, indent=2))
    return bool(given.json)


def _status(errors: list[str]) -> int:
    for error in errors:
        print(f"bgtasks: {clean(error)}", file=sys.stderr)
    return 1 if errors else 0


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.1f}ms"
    return f"{seconds:.1f}s" if seconds < 600 else f"{seconds / 60:.0f}min"


def _print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = [[clean(cell) for cell in row] for row in [titles, *rows]]
    widths = [max(len(row[column]) for row in shown) for column in range(len(titles))]
    for row in shown:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _add_stack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the id of a task, as ps shows it")
    parser.add_argument("--json", action="store_true", help="print one JSON object, see the documentation")


PS: Final = Command(_add_ps, _ps)
NAMES: Final = Command(_add_common, _names)
STACK: Final = Command(_add_stack, _stack)
CANCEL: Final = Command(_add_cancel, _cancel)
