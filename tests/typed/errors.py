"""Every error is one of bgtasks and one of Python, and can be caught by its name; never run."""

from __future__ import annotations

from bgtasks import (
    BgtasksError,
    ExecutorClosedError,
    InvalidContextError,
    InvalidFunctionError,
    InvalidOptionError,
    InvalidProgramError,
    InvalidTimeoutError,
    ManagerClosedError,
    ManagerNotBoundError,
    MissingExtraError,
    NoManagerError,
    NoRunningLoopError,
    NotACoroutineError,
    NotPicklableError,
    RunningLoopError,
    TaskRejectedError,
    WorkerDiedError,
)
from bgtasks.events import EncodeError, Reject, Retry, SinkError, SpoolError, SpoolFullError, SpoolLockedError


def kinds() -> None:
    """Each list holds errors that one clause of Python's own catches."""
    all_of_them: list[type[BgtasksError]] = [Reject, Retry]
    runtime: list[type[RuntimeError]] = [
        ExecutorClosedError,
        ManagerClosedError,
        NoManagerError,
        NoRunningLoopError,
        RunningLoopError,
        SpoolError,
        SpoolFullError,
        SpoolLockedError,
        TaskRejectedError,
        WorkerDiedError,
    ]
    types: list[type[TypeError]] = [
        EncodeError,
        InvalidContextError,
        InvalidFunctionError,
        InvalidProgramError,
        NotACoroutineError,
        NotPicklableError,
    ]
    values: list[type[ValueError]] = [InvalidOptionError, InvalidTimeoutError]
    others: tuple[type[LookupError], type[ImportError], type[ConnectionError]] = (
        ManagerNotBoundError,
        MissingExtraError,
        SinkError,
    )
    full: type[SpoolError] = SpoolFullError
    wrong: type[ValueError] = InvalidContextError  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    print(all_of_them, runtime, types, values, others, full, wrong)


def caught() -> None:
    """A clause names one or several."""
    try:
        raise TaskRejectedError("full")
    except (ManagerClosedError, TaskRejectedError) as error:
        print(error.args)
    except BgtasksError:
        raise BgtasksError from InvalidOptionError  # an instance or a class
    except 5:  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
        pass
