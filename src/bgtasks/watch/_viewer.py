"""The other end of the socket: asks the watched processes of the user."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Final

from bgtasks.errors import WatchError
from bgtasks.watch._answers import VERSION
from bgtasks.watch._folder import sockets

__all__ = ["ask", "ask_all", "asked_to_end", "numbered_tasks", "pid_of"]

# Seconds until a process counts as hanging.
PATIENCE: Final = 10.0


def ask(path: Path, do: str, **request: Any) -> dict[str, Any]:
    """Ask one process, and return its answer.

    Raises:
        WatchError: it does not answer, or refuses the request.

    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(str(path))
            connection.sendall(json.dumps({"version": VERSION, "do": do, **request}).encode() + b"\n")
            with connection.makefile("rb") as lines:
                answer: dict[str, Any] = json.loads(lines.readline() or "{}")
    except ConnectionRefusedError as error:
        # The process was killed, and another one has its number now.
        path.unlink(missing_ok=True)
        raise WatchError(f"process {path.stem} is not watched any more") from error
    except (OSError, ValueError) as error:
        raise WatchError(f"process {path.stem} does not answer: {error}") from error
    if "error" in answer:
        raise WatchError(f"process {path.stem}: {answer['error']}")
    if not answer:
        raise WatchError(f"process {path.stem} closed the connection: it belongs to another user, or it ended")
    return answer


def ask_all(pid: int | None, do: str, **request: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Ask all processes of the user that are watched, or one; return the answers and the errors of the others.

    Raises:
        WatchError: no process is watched, or not the one that was asked for.

    """
    found = sockets()
    if pid is not None and pid not in found:
        raise WatchError(f"process {pid} is not watched: start it with BGTASKS_WATCH=1, or pass watch=True")
    if not found:
        raise WatchError("no process of yours is watched: start one with BGTASKS_WATCH=1, or pass watch=True")
    answers, errors = [], []
    for number, path in found.items():
        if pid in (None, number):
            try:
                answers.append(ask(path, do, **request))
            except WatchError as error:
                errors.append(str(error))
    return answers, errors


def numbered_tasks(count: int) -> str:
    """Return a number of tasks as text: "1 task", "2 tasks"."""
    return f"{count} task{'' if count == 1 else 's'}"


def asked_to_end(answers: list[dict[str, Any]]) -> str:
    """Return what to say of the answers to a confirmed ``cancel``."""
    count = sum(answer["cancelled"] for answer in answers)
    return f"{numbered_tasks(count)} {'was' if count == 1 else 'were'} asked to end"


def pid_of(task: str) -> int:
    """Return the process of a task id of the form PID.MANAGER.TASK.

    Raises:
        WatchError: it is none.

    """
    parts = task.split(".")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise WatchError(f"{task!r} is not the id of a task: bgtasks ps shows ids of the form PID.MANAGER.TASK")
    return int(parts[0])
