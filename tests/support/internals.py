"""Access to parts of a manager that users do not have."""

from __future__ import annotations

from typing import Any

from bgtasks._internals import ManagerInternals


def release_closed_loops(manager: Any) -> None:
    """Have a manager abandon the tasks of closed loops, as it does when it uses its next loop."""
    ManagerInternals(manager).release_closed_loops()


def tasks_of(manager: Any) -> set[Any]:
    """Return the live tasks of a manager."""
    return {record.task for record in ManagerInternals(manager).live_records() if record.task is not None}
