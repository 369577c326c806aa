"""The other end of the socket: asks the watched processes of the user."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

from bgtasks.errors import WatchError, text_of
from bgtasks.watch._answers import VERSION
from bgtasks.watch._folder import sockets

__all__ = ["ask", "ask_all", "ask_in_thread", "asked_to_end", "clean", "numbered_tasks", "pid_of", "progress_text"]

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
    # At once: several that hang would hold up the others for long.
    for future in [ask_in_thread(path, do, request) for number, path in found.items() if pid in (None, number)]:
        try:
            answers.append(future.result())
        except WatchError as error:
            errors.append(str(error))
    return answers, errors


def ask_in_thread(path: Path, do: str, request: dict[str, Any]) -> Future[dict[str, Any]]:
    """Ask one process in a thread, which does not keep the program from its end; a failure is a WatchError."""
    future: Future[dict[str, Any]] = Future()
    arguments = (future, path, do, request)
    threading.Thread(target=_fill, args=arguments, name="bgtasks-ask", daemon=True).start()
    return future


def _fill(future: Future[dict[str, Any]], path: Path, do: str, request: dict[str, Any]) -> None:
    try:
        future.set_result(ask(path, do, **request))
    except WatchError as error:
        future.set_exception(error)
    except Exception as error:
        future.set_exception(WatchError(f"process {path.stem}: {text_of(error)}"))


def clean(text: object) -> str:
    """Return a text without control characters, which could change what a terminal shows."""
    plain = str(text)
    return plain if plain.isprintable() else ascii(plain)[1:-1]


def progress_text(progress: dict[str, Any]) -> str:
    """Return how far a task has come as text: "3/10 files"."""
    done, total = (
        f"{number:.10g}" if isinstance(number, float) else number for number in (progress["done"], progress["total"])
    )
    return f"{done}{'' if total is None else f'/{total}'} {progress['text'] or ''}".strip()


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
