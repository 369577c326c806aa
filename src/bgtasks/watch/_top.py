"""The command ``top``; the terminal itself is drawn by Textual, which only this command needs."""

from __future__ import annotations

import argparse
import sys
from typing import Final

from bgtasks._checks import check_seconds
from bgtasks.errors import WatchError
from bgtasks.watch._commands import Command
from bgtasks.watch._folder import folder, sockets

__all__ = ["TOP"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pid", type=int, help="only this process; all watched processes of yours by default")
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="SECONDS", help="how often to ask; every second by default"
    )


def _run(given: argparse.Namespace) -> int:
    # Before the processes are looked for: the extra is missing in any case.
    from bgtasks.watch._top_app import Top

    check_seconds("--interval", given.interval, positive=True)
    # Textual draws on the standard error.
    if not (sys.stdin.isatty() and sys.stdout.isatty() and sys.stderr.isatty()):
        raise WatchError("bgtasks top needs a terminal; bgtasks ps prints the tasks once")
    folder()
    if given.pid is not None and given.pid not in sockets():
        raise WatchError(f"process {given.pid} is not watched: start it with BGTASKS_WATCH=1, or pass watch=True")
    Top(given.pid, given.interval).run()
    return 0


TOP: Final = Command(_add_arguments, _run)
