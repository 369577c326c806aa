"""What both executors do with failures, and what one that takes the place of another may change."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any, ClassVar, TypeAlias

from bgtasks.executor._options import Failures
from bgtasks.registry import Record

AnyFuture: TypeAlias = asyncio.Future[Any] | concurrent.futures.Future[Any]


class Rules:
    """The base of the executors."""

    # For an executor that takes the place of one with other rules: 0 means no limit; and whether a failure is raised is
    # decided at the exit, so that all of them are kept until then.
    _zero_is_no_limit: ClassVar[bool] = False
    _decides_late: ClassVar[bool] = False

    def __init__(self) -> None:
        self._failures: Failures[AnyFuture] = Failures(self._decides_late)

    def _takes_failure(self, record: Record, error: BaseException) -> bool:
        """Hear from the manager of a failure; say whether it is to report it."""
        return self._reports(error)

    def _reports(self, error: BaseException) -> bool:
        """Say whether a failure goes to the log and to the manager's ``on_error``."""
        return True

    def _reraises(self, future: AnyFuture) -> bool:
        """Say, at the exit, whether the failure of this future is raised."""
        return True

    def _end_block(self, kind: type[BaseException] | None) -> None:
        """Raise the first failure in the order of submission, unless the block raised; forget them all."""
        failures = self._failures.in_order()
        self._failures.clear()
        if kind is not None:
            return
        try:
            for future in failures:
                if self._reraises(future):
                    failure = future.exception()
                    assert failure is not None, "it failed"
                    raise failure
        finally:
            # The traceback of what is raised keeps this frame: the frame must not keep what failed.
            failures.clear()
            future = failure = None  # type: ignore[assignment]
