"""The command ``bgtasks``, also ``python -m bgtasks``: what is installed, and the tasks of running processes."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final

from bgtasks import __version__
from bgtasks._environment import environment
from bgtasks.errors import BgtasksError

__all__ = ["main"]

# The width of the titles of what is installed.
WIDTH: Final = 13
# Name, the module and the object with its arguments and its function, and what it does. Imported only to be run.
COMMANDS: Final = (
    ("ps", "bgtasks.watch._commands", "PS", "show the tasks of watched processes"),
    ("names", "bgtasks.watch._commands", "NAMES", "show counters and durations by name"),
    ("stack", "bgtasks.watch._commands", "STACK", "show where a task stands"),
    ("cancel", "bgtasks.watch._commands", "CANCEL", "cancel a task, or all tasks of a name"),
    ("top", "bgtasks.watch._top", "TOP", "show tasks and figures of watched processes, until you leave"),
    ("web", "bgtasks.watch._web", "WEB", "show all of it in a browser"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status: 0, 1 after an error, 130 after Ctrl-C.

    Without a command it shows what is installed, and which of the twins runs.

    Args:
        arguments: the arguments of the command line; those of the process by default.

    Raises:
        SystemExit: the arguments are wrong, status 2; or they ask for help or the version.

    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="bgtasks",
        description="Look at background tasks of running processes; without a command, show what is installed.",
    )
    parser.add_argument("--version", action="version", version=f"bgtasks {__version__}")
    parser.set_defaults(run=_show_environment)
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, module, attribute, summary in COMMANDS:
        sub = commands.add_parser(name, help=summary, description=summary)
        if arguments[:1] == [name]:
            command = getattr(importlib.import_module(module), attribute)
            command.add_arguments(sub)
            sub.set_defaults(run=command.run)
    given = parser.parse_args(arguments)
    try:
        status: int = given.run(given)
        # Here, where an error can be handled; the interpreter would write at its exit.
        sys.stdout.flush()
    except BgtasksError as error:
        print(f"bgtasks: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as head, wants no more, also not at the interpreter's exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _show_environment(_: argparse.Namespace) -> int:
    print("\n".join(f"{title:{WIDTH}} {text}" for title, text in environment()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
