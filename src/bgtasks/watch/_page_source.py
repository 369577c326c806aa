"""What the page shows: a manager of this process, or all watched processes of the user."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

from bgtasks.errors import WatchError
from bgtasks.watch._answers import VERSION, answer, number_of
from bgtasks.watch._folder import sockets
from bgtasks.watch._viewer import ask_in_thread, pid_of

__all__ = ["Answers", "ManagerSource", "ProcessesSource", "Source"]

# The answers of processes, and a text for each process that did not answer.
Answers: TypeAlias = tuple[list[dict[str, Any]], list[str]]

# Seconds until a frame is made without the processes that have not answered.
PATIENCE: Final = 2.0
NOTHING: Final = "no process of yours is watched: start one with BGTASKS_WATCH=1, or pass watch=True"


class Source(Protocol):
    """Answers the requests of the page; called in a thread of the page."""

    def ask(self, do: str, **request: Any) -> Answers:
        """Return the answers.

        Raises:
            WatchError: the request is refused.

        """

    def has_ended(self) -> bool:
        """Return whether there will be nothing more to show."""


class ManagerSource:
    """One manager of this process.

    Args:
        manager: the manager.
        show_context: the keys of task contexts whose values are shown.

    """

    def __init__(self, manager: Any, show_context: Collection[str]) -> None:
        self._manager = manager
        self._number = number_of(manager)
        self._show_context = show_context

    def ask(self, do: str, **request: Any) -> Answers:
        """Return the answer of the manager."""
        wanted = {"version": VERSION, "do": do, "manager": self._number, **request}
        return [answer(wanted, self._show_context)], []

    def has_ended(self) -> bool:
        """Return whether the manager shuts down: a server may wait for the streams of the page before it ends."""
        return bool(self._manager._shutdown.phase != "open")  # noqa: SLF001  the interface of the cold half


class ProcessesSource:
    """The watched processes of the user; each has a thread of its own while it is asked.

    Args:
        pid: only this process; None for all.

    """

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        # The requests that are not answered yet; a process that hangs is not asked again.
        self._open: dict[int, Future[dict[str, Any]]] = {}

    def ask(self, do: str, **request: Any) -> Answers:
        """Return the answers of all processes that answer in time."""
        paths = self._paths(request.get("id"))
        self._open = {number: future for number, future in self._open.items() if not future.done()}
        asked = {number: ask_in_thread(path, do, request) for number, path in paths.items() if number not in self._open}
        self._open.update(asked)
        wait_for(asked.values(), PATIENCE)
        errors = [f"process {number} does not answer" for number, future in self._open.items() if not future.done()]
        answers = []
        for future in asked.values():
            if future.done():
                error = future.exception()
                if error is None:
                    answers.append(future.result())
                else:
                    errors.append(str(error))
        return answers, errors if paths else [NOTHING if self._pid is None else f"process {self._pid} is not watched"]

    def _paths(self, task: str | None) -> dict[int, Path]:
        """Return the sockets of the processes to ask: all, or that of a task."""
        pid = self._pid if task is None else pid_of(task)
        if self._pid not in (None, pid):
            raise WatchError(f"task {task} is not one of process {self._pid}")
        return {number: path for number, path in sockets().items() if pid in (None, number)}

    def has_ended(self) -> bool:
        """Return False: further processes may start."""
        return False
