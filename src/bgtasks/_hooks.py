"""What the hot half of a registry asks of its cold half and of the manager: every call upwards, in one place."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Callable
from typing import Any

__all__ = ["RegistryHooks"]


class RegistryHooks:
    """The methods that ``RegistryCore`` calls on itself. ``Registry`` and the manager define them."""

    # -- defined by Registry --------------------------------------------------------------------------------------

    def _add_loop(self, loop: AbstractEventLoop, make: Callable[..., Any]) -> Any:
        """Return the records of a loop: those that it has, or new ones made by ``make(registry, loop)``."""
        raise NotImplementedError

    def _has_eager_tasks(self, loop: AbstractEventLoop) -> bool:
        """Return whether tasks can start eagerly on this loop, which runs."""
        raise NotImplementedError

    def _reserve_ids(self, count: int) -> int:
        """Reserve task ids for one loop and return the last one in use before."""
        raise NotImplementedError

    def _remember(self, record: Any, error: BaseException | None) -> None:
        """Put a finished task into the history as plain values."""
        raise NotImplementedError

    # -- defined by the manager -----------------------------------------------------------------------------------

    def _admit(self, coro: Any, name: str, may_drop: bool) -> bool:
        """Let a task in at the cap or after ``_shut``, drop it and return False if it may be, or raise an error.

        What is not let in is closed.
        """
        raise NotImplementedError

    def _report(self, record: Any, error: BaseException | None) -> None:
        """Report the end of a task, after its bookkeeping and before its references are cut."""
        raise NotImplementedError

    def _on_timeout(self, record: Any) -> None:
        """Cancel a task whose timeout is over."""
        raise NotImplementedError

    def _on_abandoned(self, names: dict[str, int]) -> None:
        """Report that a closed loop left tasks behind: their names, each with the number of tasks."""
        raise NotImplementedError

    def _on_idle(self) -> None:
        """Take note that a loop is down to the number of owned tasks in its ``idle_threshold``."""
        raise NotImplementedError

    def _on_capacity(self) -> None:
        """Take note that a task ended while ``_capacity_wanted`` is set."""
        raise NotImplementedError
