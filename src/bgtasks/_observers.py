"""Observers of managers: the one hook for the pytest plugin, ``wait_for_all`` and exporters.

Without observers it costs no task anything.
"""

from __future__ import annotations

import weakref
from itertools import count
from typing import Any

from bgtasks.registry import Record, Registry

__all__ = [
    "FailureCollector",
    "Observer",
    "Observers",
    "all_managers",
    "numbered_managers",
    "observe_all",
    "stop_observing_all",
]


class Observer:
    """Base class of observers: override the methods of interest.

    ``task_failed`` is called in the thread of the task's loop, and its errors go to the loop's exception handler.
    """

    def task_failed(self, record: Record, error: BaseException) -> None:
        """Handle the failure of a task, which is logged afterwards."""

    def task_timed_out(self, record: Record, error: TimeoutError) -> None:
        """Take note of a task that ended by its timeout, which is in the log."""

    def tasks_abandoned(self, names: dict[str, int]) -> None:
        """Handle the tasks that a closed loop left behind: their names, each with the number of tasks."""


# By number: a subclass may compare by value. Weak: nothing is kept alive here.
_managers: weakref.WeakValueDictionary[int, Registry] = weakref.WeakValueDictionary()
_new_numbers = count(1)
# Replaced as a whole, so that it can be read while another thread changes it.
_of_all: tuple[Observer, ...] = ()


def all_managers() -> list[Any]:
    """Return every live manager."""
    return [manager for _, manager in numbered_managers()]


def numbered_managers() -> list[tuple[int, Any]]:
    """Return every live manager with its number in this process, in the order in which they were made."""
    # Not items(), which fails if another thread makes a manager meanwhile.
    found = [(reference.key, reference()) for reference in _managers.valuerefs()]
    return sorted(((number, manager) for number, manager in found if manager is not None), key=lambda each: each[0])


def observe_all(observer: Observer) -> None:
    """Call an observer for the tasks of every manager, later ones included."""
    global _of_all
    _of_all = (*_of_all, observer)


def stop_observing_all(observer: Observer) -> None:
    """Undo ``observe_all``."""
    global _of_all
    _of_all = tuple(other for other in _of_all if other is not observer)


class Observers:
    """The observers of one manager, and those of all managers."""

    def __init__(self, manager: Registry) -> None:
        _managers[next(_new_numbers)] = manager
        self._own: tuple[Observer, ...] = ()

    def add(self, observer: Observer) -> None:
        """Call an observer for the tasks of this manager."""
        self._own = (*self._own, observer)

    def remove(self, observer: Observer) -> None:
        """Undo ``add``. By identity: two observers that compare equal are two."""
        self._own = tuple(other for other in self._own if other is not observer)

    def all(self) -> tuple[Observer, ...]:
        """Return the observers to call for a task of this manager."""
        return (*_of_all, *self._own) if _of_all else self._own


class FailureCollector(Observer):
    """Collects the failures during a wait.

    Args:
        names: the names of the tasks that count; None for all.

    """

    def __init__(self, names: frozenset[str] | None) -> None:
        self.names = names
        self._failures: list[BaseException] = []

    def task_failed(self, record: Record, error: BaseException) -> None:
        """Keep the error."""
        if self.names is None or record.name in self.names:
            self._failures.append(error)

    def task_timed_out(self, record: Record, error: TimeoutError) -> None:
        """Keep the error."""
        self.task_failed(record, error)

    def returned(self) -> list[BaseException]:
        """Return the failures, and keep none."""
        failures, self._failures = self._failures, []
        return failures

    def raise_failures(self, as_group: bool) -> None:
        """Raise the first failure or all of them, if there is one."""
        failures = self.returned()
        try:
            if failures and as_group:
                count = len(failures)
                raise BaseExceptionGroup(f"{count} background task{'' if count == 1 else 's'} failed", failures)
            if failures:
                raise failures[0]
        finally:
            # The traceback of the raised failure keeps this frame, which must not keep the others.
            failures.clear()
