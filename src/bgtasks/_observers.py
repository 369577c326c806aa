"""Observers of managers: the one hook by which the pytest plugin, ``wait_for_all`` and exporters hear of tasks.

Where nobody observes, no task pays for it.
"""

from __future__ import annotations

import weakref
from typing import Any

from bgtasks.registry import Record, Registry

__all__ = ["Observer", "Observers", "all_managers", "observe_all", "stop_observing_all"]


class Observer:
    """Hears what happens to the tasks of managers. Derive from it and override what is of interest.

    The methods are called in the thread of the task's loop. What one raises goes to the loop's exception handler.
    """

    def task_failed(self, record: Record, error: BaseException) -> None:
        """Take note of a task that raised; it is logged afterwards."""

    def tasks_abandoned(self, names: dict[str, int]) -> None:
        """Take note of tasks that a closed loop left behind: their names, each with the number of tasks."""


# By id(): a class derived from the manager's may compare by value. Nothing is kept alive here.
_managers: weakref.WeakValueDictionary[int, Registry] = weakref.WeakValueDictionary()
# Replaced as a whole, so that it can be read while another thread changes it.
_of_all: tuple[Observer, ...] = ()


def all_managers() -> list[Any]:
    """Return every manager that there is."""
    return list(_managers.values())


def observe_all(observer: Observer) -> None:
    """Have an observer hear of the tasks of every manager, those made later included."""
    global _of_all
    _of_all = (*_of_all, observer)


def stop_observing_all(observer: Observer) -> None:
    """Undo ``observe_all``."""
    global _of_all
    _of_all = tuple(other for other in _of_all if other is not observer)


class Observers:
    """The observers of one manager, and those of all."""

    def __init__(self, manager: Registry) -> None:
        _managers[id(manager)] = manager
        self._own: tuple[Observer, ...] = ()

    def add(self, observer: Observer) -> None:
        """Have an observer hear of the tasks of this manager."""
        self._own = (*self._own, observer)

    def remove(self, observer: Observer) -> None:
        """Undo ``add``. By identity: two observers that compare equal are two."""
        self._own = tuple(other for other in self._own if other is not observer)

    def all(self) -> tuple[Observer, ...]:
        """Return those that hear of a task of this manager now."""
        return (*_of_all, *self._own) if _of_all else self._own
