"""The policies of one manager: what it keeps beside its records for submitted functions."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from asyncio.events import _get_running_loop
from collections.abc import Callable
from typing import Any, Final, get_args

from bgtasks import errors
from bgtasks._checks import check_choice, check_seconds
from bgtasks._submit import OnDuplicate
from bgtasks.policies._attempts import Attempts
from bgtasks.policies._results import Results
from bgtasks.policies._schedules import Schedules
from bgtasks.policies._services import Services
from bgtasks.registry import Record, Submission

__all__ = ["Policies", "check_submission"]

CHOICES: Final[tuple[str, ...]] = get_args(OnDuplicate)


class Policies:
    """The tables and counters of submitted functions.

    Args:
        live_records: returns the records of all tasks that have not ended.
        is_open: returns whether the manager is neither shutting down nor shut down.
        make_submission: makes one: ``(function, args, kwargs, retry, listener)``.
        launch: starts its task: ``(coro, name, timeout, context, submission, is_held, is_service)``.
        fire: does so at a lower cost: ``(coro, name, timeout, context, submission)``.
        fire_during: calls a function with an argument, and starts what it fires right after it.

    """

    def __init__(
        self,
        live_records: Callable[[], list[Record]],
        is_open: Callable[[], bool],
        make_submission: Callable[..., Submission],
        launch: Callable[..., Any],
        fire: Callable[..., None],
        fire_during: Callable[[Callable[[Any], object], Any], None],
    ) -> None:
        self._live_records = live_records
        self._launch = launch
        self.attempts = Attempts(is_open)
        self.results = Results()
        self.schedules = Schedules(make_submission, fire, fire_during)
        self.services = Services(make_submission, launch, is_open)

    # -- starting -------------------------------------------------------------------------------------------------

    def submit_duplicate(
        self, current: Submission, coro: Any, submission: Submission, on_duplicate: OnDuplicate, options: Any
    ) -> Any:
        """Do what ``on_duplicate`` says with a submission whose key another one has; return the task of ``submit``."""
        if on_duplicate in ("join", "skip"):
            # The call of the function has started the other one.
            errors.close_refused(coro)
            return current.task() if on_duplicate == "join" else None
        superseded = current.following
        task = self._launch(coro, *options, submission, True)
        current.following = submission
        if submission.keep is not None:
            self.results.follow(submission.record)
        if superseded is not None:
            superseded.record.cancel("a later call of submit() with its key took its place")
        if on_duplicate == "replace":
            current.record.cancel("a later call of submit() with its key replaces it")
        return task

    # -- shutdown -------------------------------------------------------------------------------------------------

    def is_left_alone(self, record: Record) -> bool:
        """Return whether shutdown does not cancel a task with the others.

        It is that of a service, or is about to fail because no further attempt begins.
        """
        failures = None if record.submission is None else record.submission.failures
        return (failures is not None and failures.is_given_up) or self.services.is_service(record)

    def begin_shutdown(self) -> None:
        """Stop all schedules, and fail every task that waits for its next attempt: none begins any more."""
        self.schedules.stop()
        for record in self._live_records():
            if record.waiting and not record.service:
                _on_its_loop(record, self.attempts.give_up)


def check_submission(key: object, on_duplicate: object, keep_result: object) -> float | None:
    """Check the options of ``submit`` that are seldom used; return the seconds to keep the result.

    Raises:
        InvalidOptionError: one of them has an invalid value.

    """
    check_choice("on_duplicate", on_duplicate, CHOICES)
    if key is None and on_duplicate != "join":
        raise errors.InvalidOptionError(f"on_duplicate={on_duplicate!r} needs a key: pass key=")
    return None if keep_result is None else check_seconds("keep_result", keep_result, positive=True)


def _on_its_loop(record: Record, function: Callable[[Record], Any]) -> None:
    """Call a function with a record on the loop of its task; do nothing if that is closed."""
    loop: AbstractEventLoop | None = record.loop
    if loop is None:
        return
    if loop is _get_running_loop():
        function(record)
        return
    try:
        loop.call_soon_threadsafe(function, record)
    except RuntimeError:
        return
