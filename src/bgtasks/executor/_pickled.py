"""Functions and their outcomes as bytes, on their way to another process or interpreter and back."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from types import CoroutineType
from typing import Any

from bgtasks import errors
from bgtasks.executor._call import Call
from bgtasks.executor._refusals import wants_loop


def packed(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Return a function with its arguments as bytes."""
    try:
        return pickle.dumps((fn, args, kwargs))
    except Exception as error:
        raise errors.NotPicklableError(
            f"{errors.describe(fn)} or one of its arguments cannot be pickled ({errors.text_of(error)}), so it cannot "
            "go to another process or interpreter: define the function at the top of a module and pass plain values, "
            "or use kind='threads'"
        ) from error


def answer_to(payload: bytes) -> bytes:
    """Run a packed function and return its outcome as bytes."""
    try:
        fn, args, kwargs = pickle.loads(payload)
        result = fn(*args, **kwargs)
        if type(result) is CoroutineType:
            result.close()
            raise wants_loop(errors.describe(fn))
    except BaseException as error:
        error.add_note(f"in process {os.getpid()}:\n{_traceback_of(error)}")
        return _packed_outcome(None, error)
    return _packed_outcome(result, None)


def _traceback_of(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error)).rstrip()
    except Exception as failure:
        # With warnings as errors, reading the source of a main module that was imported again may raise.
        return f"no traceback: {errors.text_of(failure)}"


def _packed_outcome(result: Any, error: BaseException | None) -> bytes:
    try:
        outcome = pickle.dumps((result, error))
        # An error with its own constructor can often be pickled but not unpickled.
        pickle.loads(outcome)
    except Exception as failure:
        what = f"returned {errors.describe(result)}" if error is None else f"raised {errors.text_of(error)}"
        text = f"the function {what}, which cannot be pickled ({errors.text_of(failure)}), so it cannot come back"
        refusal = errors.NotPicklableError(text)
        for note in getattr(error, "__notes__", ()):
            refusal.add_note(note)
        return pickle.dumps((None, refusal))
    return outcome


def unpacked(outcome: bytes) -> Any:
    """Return the result or raise the error of a packed outcome."""
    result, error = pickle.loads(outcome)
    if error is not None:
        raise error
    return result


def payload_of(call: Call) -> bytes:
    """Return the bytes that the executor packed when the call was submitted."""
    payload: bytes = call.args[0]
    return payload
