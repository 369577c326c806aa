"""What ``bgtasks top`` asks: a thread per watched process, so that one that hangs holds up no other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from bgtasks.errors import WatchError
from bgtasks.watch._folder import sockets
from bgtasks.watch._viewer import ask

__all__ = ["MOST_TASKS", "Deliver", "Look", "Lost", "Poller", "Question"]

# How many tasks each process sends: more than anybody reads.
MOST_TASKS: Final = 200
# Seconds between two questions to a process, also when the question changes.
SHORTEST_PAUSE: Final = 0.2


class Question(NamedTuple):
    """Which tasks to ask for, and in which order."""

    name: str | None = None
    sort: str = "age"


class Look(NamedTuple):
    """The answers of a process: its tasks, and its figures by name. ``at`` is on the monotonic clock."""

    pid: int
    at: float
    tasks: dict[str, Any]
    figures: dict[str, Any]


class Lost(NamedTuple):
    """A process without an answer; ``error`` says why, None if it has ended."""

    pid: int
    error: str | None


Deliver: TypeAlias = Callable[[Look | Lost], object]


class Poller:
    """Asks all watched processes of the user, or one, and delivers what they answer.

    Args:
        pid: the process to ask; None for all, those that start later included.
        interval: seconds between two questions.
        deliver: called in one of the threads with each answer.

    """

    def __init__(self, pid: int | None, interval: float, deliver: Deliver) -> None:
        self.question = Question()
        self.interval = interval
        self.deliver = deliver
        self.is_stopped = threading.Event()
        self._pid = pid
        self._asked: dict[int, _Process] = {}

    def start(self) -> None:
        """Start asking."""
        threading.Thread(target=self._find, name="bgtasks-top", daemon=True).start()

    def stop(self) -> None:
        """Stop asking, without waiting for the threads: a process that hangs would hold up the end."""
        self.is_stopped.set()
        for process in list(self._asked.values()):
            process.ask_now.set()

    def change(self, question: Question) -> None:
        """Ask something else, at once."""
        self.question = question
        for process in list(self._asked.values()):
            process.ask_now.set()

    def _find(self) -> None:
        while not self.is_stopped.is_set():
            try:
                found = sockets()
            except WatchError:
                # The folder has been removed, or is not safe any more: nothing to ask in there.
                found = {}
            for pid, path in found.items():
                known = self._asked.get(pid)
                if self._pid in (None, pid) and (known is None or not known.is_alive()):
                    self._asked[pid] = _Process(self, pid, path)
                    self._asked[pid].start()
            self._asked = {pid: process for pid, process in self._asked.items() if process.is_alive()}
            self.is_stopped.wait(self.interval)


class _Process(threading.Thread):
    """Asks one process until it ends."""

    def __init__(self, poller: Poller, pid: int, path: Path) -> None:
        super().__init__(name=f"bgtasks-top-{pid}", daemon=True)
        self.ask_now = threading.Event()
        self._poller = poller
        self._pid = pid
        self._path = path

    def run(self) -> None:
        poller = self._poller
        while not poller.is_stopped.is_set():
            self.ask_now.clear()
            found = self._look()
            if poller.is_stopped.is_set():
                return
            poller.deliver(found)
            if found == Lost(self._pid, None):
                return
            # A filter that is being typed changes the question with each key.
            poller.is_stopped.wait(min(SHORTEST_PAUSE, poller.interval))
            self.ask_now.wait(max(poller.interval - SHORTEST_PAUSE, 0))

    def _look(self) -> Look | Lost:
        question = self._poller.question
        try:
            tasks = ask(self._path, "tasks", name=question.name, sort=question.sort, limit=MOST_TASKS)
            return Look(self._pid, time.monotonic(), tasks, ask(self._path, "names"))
        except WatchError as error:
            # A process that was killed and that its parent has not waited for still has its number.
            is_gone = isinstance(error.__cause__, (ConnectionRefusedError, FileNotFoundError))
            return Lost(self._pid, None if is_gone or not self._path.exists() else str(error))
