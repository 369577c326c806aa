"""What ``get_task_info`` leaves out, and the order of the rest; the names that ``wait_for_all`` waits for."""

from __future__ import annotations

from collections.abc import Collection
from operator import itemgetter
from typing import Final, Protocol, get_args

from bgtasks._checks import check_choice, check_limit, check_seconds
from bgtasks.errors import InvalidOptionError, describe
from bgtasks.info import LiveState, TaskInfo, TaskOrder

__all__ = ["check_selection", "chosen_names", "selected", "state_of"]

_age: Final = itemgetter("age_seconds")
_name: Final = itemgetter("name")


class LiveRecord(Protocol):
    """The part of a record that tells the state of its task."""

    @property
    def queued(self) -> object:
        """Whether the task waits for a concurrency slot."""

    @property
    def waiting(self) -> object:
        """Whether the task is between two attempts."""


def state_of(record: LiveRecord) -> LiveState:
    """Return the state of a task that has not ended."""
    if record.queued:
        return "queued"
    return "waiting" if record.waiting else "running"


def check_selection(
    name: str | None, state: LiveState | None, older_than: float | None, limit: int | None, sort: TaskOrder | None
) -> None:
    """Check the arguments of ``selected``.

    Raises:
        InvalidOptionError: one of them has an invalid value.

    """
    if name is not None and not isinstance(name, str):
        raise InvalidOptionError(f"name must be a name of tasks, or None for all; got {describe(name)}")
    if state is not None:
        check_choice("state", state, get_args(LiveState), "get_history() has the tasks that ended")
    if older_than is not None:
        check_seconds("older_than", older_than)
    check_limit("limit", limit)
    if sort is not None:
        check_choice("sort", sort, get_args(TaskOrder))


def selected(
    infos: list[TaskInfo],
    name: str | None,
    state: LiveState | None,
    older_than: float | None,
    limit: int | None,
    sort: TaskOrder | None,
) -> list[TaskInfo]:
    """Return the infos that match every given argument, in the given order, ``limit`` of them at most."""
    if name is not None:
        infos = [info for info in infos if info["name"] == name]
    if state is not None:
        infos = [info for info in infos if info["state"] == state]
    if older_than is not None:
        infos = [info for info in infos if info["age_seconds"] > older_than]
    if sort == "name":
        infos.sort(key=_name)
    elif sort is not None:
        infos.sort(key=_age, reverse=sort == "oldest")
    return infos if limit is None else infos[:limit]


def chosen_names(names: str | Collection[str] | None) -> frozenset[str] | None:
    """Return the names that ``wait_for_all`` got as a set.

    Raises:
        InvalidOptionError: it got something else.

    """
    if names is None:
        return None
    chosen = (names,) if isinstance(names, str) else names
    if not isinstance(chosen, Collection) or not all(map(_is_name, chosen)):
        raise InvalidOptionError(
            f"names must be a name of tasks, a collection of names, or None for all; got {describe(names)}"
        )
    return frozenset(chosen)


def _is_name(value: object) -> bool:
    return isinstance(value, str)
