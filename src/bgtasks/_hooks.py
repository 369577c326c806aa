"""The hooks of the hot half of a registry: all its calls to the cold half and to the manager."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Callable
from typing import Any

__all__ = ["RegistryHooks"]


class RegistryHooks:
    """The methods that ``RegistryCore`` calls on itself. ``Registry`` and the manager define them."""

    # -- defined by Registry --------------------------------------------------------------------------------------

    def _add_loop(self, loop: AbstractEventLoop, make: Callable[..., Any]) -> Any:
        """Return the records of a loop, made by ``make(registry, loop)`` if there are none."""
        raise NotImplementedError

    def _has_eager_tasks(self, loop: AbstractEventLoop) -> bool:
        """Return whether tasks can start eagerly on this loop, which runs."""
        raise NotImplementedError

    def _reserve_ids(self, count: int) -> int:
        """Reserve ``count`` task ids and return the last id before them."""
        raise NotImplementedError

    def _remember(self, record: Any, error: BaseException | None) -> None:
        """Put a finished task into the history as plain values."""
        raise NotImplementedError

    # -- defined by the manager -----------------------------------------------------------------------------------

    def _admit(self, coro: Any, name: str, may_drop: bool) -> bool:
        """Admit a task at the cap or after ``_shut``; otherwise return False if ``may_drop``, or raise an error.

        A coroutine that is not admitted is closed.
        """
        raise NotImplementedError

    def _policy_of(self, retry: Any) -> Any:
        """Return the policy that an option ``retry`` means, or raise an error."""
        raise NotImplementedError

    def _check_submission(self, key: Any, on_duplicate: Any, keep_result: Any) -> float | None:
        """Check the options of ``submit`` that are seldom used; return the seconds to keep the result."""
        raise NotImplementedError

    def _submit_duplicate(
        self, current: Any, coro: Any, submission: Any, on_duplicate: Any, options: tuple[Any, ...]
    ) -> Any:
        """Do what ``on_duplicate`` says with a submission whose key another one has; return the task of ``submit``."""
        raise NotImplementedError

    def _keep_result(self, submission: Any, seconds: float) -> None:
        """Have the result of a submission kept that is about to start."""
        raise NotImplementedError

    def _follow_result(self, submission: Any) -> None:
        """Have the state of a submission shown that has started."""
        raise NotImplementedError

    def _wait_after(self, record: Any, error: BaseException) -> float | None:
        """Return the seconds to wait after a failed attempt, None if no other one follows."""
        raise NotImplementedError

    def _describe_submission(self, record: Any, info: Any) -> None:
        """Add to the ``TaskInfo`` of a task that was submitted as a function."""
        raise NotImplementedError

    def _report(self, record: Any, error: BaseException | None) -> BaseException | None:
        """Report the end of a task, after its bookkeeping and before its references are cut.

        Returns:
            What the task raises instead of ``error``; None for that itself.

        """
        raise NotImplementedError

    def _on_timeout(self, record: Any) -> None:
        """Cancel a task whose timeout has expired."""
        raise NotImplementedError

    def _on_loop_ending(self, record: Any) -> None:
        """Take note that the owner of a loop, which stands, cancels a task."""
        raise NotImplementedError

    def _on_abandoned(self, names: dict[str, int]) -> None:
        """Report that a closed loop left tasks behind: their names, each with the number of tasks."""
        raise NotImplementedError

    def _on_idle(self) -> None:
        """Handle a loop that is down to ``idle_threshold`` owned tasks."""
        raise NotImplementedError

    def _on_capacity(self) -> None:
        """Handle the end of a task while ``_capacity_wanted`` is set."""
        raise NotImplementedError
