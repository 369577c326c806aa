"""The base of both executors: their failures, and the rules that a derived executor may change."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Mapping
from typing import Any, ClassVar, Final, TypeAlias

from bgtasks.registry import Record

__all__ = ["CANCEL_ON_EXIT", "RERAISE_ON_EXIT", "RERAISE_TIMEOUT", "AnyFuture", "ExecutorBase"]

# The flags of a record: what its executor is to do with the task at the end of the block. Another thread that handed
# the task over has a future of its own, which is raised anew instead of the task, save for a timeout.
CANCEL_ON_EXIT: Final = 1
RERAISE_ON_EXIT: Final = 2
RERAISE_TIMEOUT: Final = 4

AnyFuture: TypeAlias = asyncio.Future[Any] | concurrent.futures.Future[Any]


class Failures(dict[int, tuple[AnyFuture, BaseException | None]]):
    """The futures that failed and may be re-raised at the end of the block, by the order of their submission.

    With each goes what to raise, where that is not its own exception: a task that timed out was cancelled.

    Args:
        decides_late: True to keep every failure; otherwise only the one submitted first is kept, which saves memory.

    """

    def __init__(self, decides_late: bool) -> None:
        super().__init__()
        self._decides_late = decides_late

    def keep(self, order: int, future: AnyFuture, error: BaseException | None = None) -> None:
        """Keep a failure if it may be the one to raise."""
        if self._decides_late or not self:
            self[order] = future, error
        elif order < (first := next(iter(self))):
            del self[first]
            self[order] = future, error

    def in_order(self) -> list[tuple[AnyFuture, BaseException | None]]:
        """Return the futures and errors in the order of their submission."""
        return [self[order] for order in sorted(self)]


class ExecutorBase:
    """The base of the executors."""

    # Rules that a derived executor may change: whether a limit of 0 means no limit; and whether the failure to raise is
    # chosen only at the end of the block, so that all failures are kept until then.
    _zero_is_no_limit: ClassVar[bool] = False
    _decides_late: ClassVar[bool] = False

    def __init__(self) -> None:
        self._failures = Failures(self._decides_late)

    def _context_of(self, config: Mapping[str, object] | None) -> Mapping[str, object] | None:
        """Return the context of all tasks, for their log records; None for none."""
        return None

    def _accept_failure(self, record: Record, error: BaseException) -> bool:
        """Handle a failure; return whether the manager reports it."""
        return self._reports(error)

    def _reports(self, error: BaseException) -> bool:
        """Return whether a failure goes to the log and to the manager's ``on_error``."""
        return True

    def _reraises(self, future: AnyFuture, error: BaseException) -> bool:
        """Return whether the failure of this future is raised; called at the end of the block."""
        return True

    def _end_block(self, kind: type[BaseException] | None) -> None:
        """Raise the first failure in the order of submission, unless the block raised; forget them all."""
        failures = self._failures.in_order()
        self._failures.clear()
        if kind is not None:
            return
        try:
            for future, error in failures:
                failure = future.exception() if error is None else error
                assert failure is not None, "it failed"
                if self._reraises(future, failure):
                    raise failure
        finally:
            # The traceback of the raised failure keeps this frame, which must not keep the futures.
            failures.clear()
            future = error = failure = None  # type: ignore[assignment]
