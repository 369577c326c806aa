"""Measures bgtasks beside the other ways to run background tasks, and draws a page of it.

::

    python benchmarks/run.py                                    # all parts: tasks, await, growth, memory, events
    python benchmarks/run.py tasks memory --json 3.13.json --html page.html
    python benchmarks/run.py --against before.json              # names the rows that moved by more than their spread
    python benchmarks/run.py --join 3.13.json 3.14.json --html page.html --picture tasks.svg   # measures nothing

Contenders take turns, in another order each round, so a slow moment of the machine hits all of them; for tasks, the
time of the thread counts. A row is the median of its rounds, and its spread is where the middle half of them lies.
Contenders that are not installed are left out, and the head says which; ``pip install --group benchmarks`` installs
them. Run it with nothing else on the machine; the head says how busy that was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

from contenders import contenders
from parts import PARTS, Options
from rows import Row, Run, load, moved, save, this_machine

__all__ = ["main"]


def _measure(names: list[str], options: Options) -> Run:
    """Run the parts, with a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    head = this_machine(contenders()[1], options.rounds)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"),
        TimeRemainingColumn(),
    )  # fmt: skip
    rows: list[Row] = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars = {
            name: progress.add_task(PARTS[name].title, total=PARTS[name].steps(options), start=False) for name in names
        }
        for name, bar in bars.items():
            progress.start_task(bar)
            rows += PARTS[name].measure(options, _stepper(progress.advance, bar))
    return Run(head, rows)


def _stepper(advance: Callable[[object], None], bar: object) -> Callable[[], None]:
    return lambda: advance(bar)


def _show(run: Run) -> None:
    """Print a run: its head, and its rows under the titles of their parts."""
    for what, value in run.head.items():
        print(f"{what:14} {value}")
    for (part, case), rows in groupby(run.rows, key=lambda row: (row.part, row.case)):
        print(f"\n{PARTS[part].title}: {case}")
        for row in rows:
            at = "" if row.x is None else f" at {row.x:,.0f}"
            print(f"  {row.name + at:52} {row.median:12,.3f}  ({row.low:,.3f} to {row.high:,.3f})  {row.unit}")


def _compare(before: Run, after: Run, path: Path) -> None:
    """Print the rows that moved by more than their spread."""
    pairs = moved(before, after)
    for what in sorted({*before.head} - {"date", "load before", "rounds"}):
        if before.head[what] != after.head.get(what):
            print(f"\n{what} was {before.head[what]!r} in {path} and is {after.head.get(what)!r}: not the same ground")
    print(f"\nagainst {path}: {len(pairs)} of {len(after.rows)} rows moved by more than their spread")
    for first, second in pairs:
        at = "" if second.x is None else f" at {second.x:,.0f}"
        change = (second.median / first.median - 1) * 100 if first.median else float("inf")
        print(
            f"  {second.part}, {second.case}: {second.name}{at}: "
            f"{first.median:,.3f} -> {second.median:,.3f} {second.unit} ({change:+.1f} %)"
        )


def _draw(runs: list[Run], html: Path | None, picture: Path | None) -> None:
    """Draw runs on a page and as a picture, each if it is wanted."""
    from page import page
    from page import picture as draw

    if html is not None:
        html.write_text(page(runs, {name: part.title for name, part in PARTS.items()}))
        print(f"\nwritten: {html}")
    if picture is not None:
        picture.write_text(draw(runs))
        print(f"\nwritten: {picture}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure bgtasks beside the other ways to run background tasks.")
    parser.add_argument("part", nargs="*", help=f"{', '.join(PARTS)}; all of them by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into a file")
    parser.add_argument("--html", type=Path, metavar="FILE", help="draw them on a page that needs no network")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw the first chart of them as a picture")
    parser.add_argument("--against", type=Path, metavar="OLD.json", help="say which rows moved since that run")
    parser.add_argument("--join", type=Path, nargs="+", default=[], metavar="FILE", help="draw these runs, too")
    parser.add_argument("--rounds", type=int, default=51, help="rounds of each part; growth and events take fewer (51)")
    parser.add_argument("--burst", type=int, default=1000, help="tasks started before the loop runs them (1000)")
    parser.add_argument("--most", type=int, default=1_000_000, help="tasks in flight of the part growth (1000000)")
    options = parser.parse_args()
    unknown = [part for part in options.part if part not in PARTS]
    if unknown:
        parser.error(f"unknown part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    for what in ("rounds", "burst", "most"):
        if getattr(options, what) < (100 if what == "burst" else 1):
            parser.error(f"argument --{what}: too small")
    return options


def main() -> int:
    """Run the program and return its exit status."""
    options = _options()
    try:
        joined = [load(path) for path in options.join]
        before = None if options.against is None else load(options.against)
    except (OSError, ValueError) as error:
        print(f"run: {error}", file=sys.stderr)
        return 2
    runs = []
    if options.part or not options.join:
        measured = _measure(options.part or list(PARTS), Options(options.rounds, options.burst, options.most))
        _show(measured)
        runs.append(measured)
        if options.json is not None:
            save(options.json, measured)
        if before is not None:
            _compare(before, measured, options.against)
    if options.html is not None or options.picture is not None:
        _draw([*joined, *runs], options.html, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
