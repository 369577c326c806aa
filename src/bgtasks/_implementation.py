"""Chooses which of two twins runs, the compiled one or the pure-Python one, and what the tasks of the former step."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any, Literal, get_args

Choice = Literal["auto", "cython", "python"]
Implementation = Literal["cython", "python"]
Wrapper = Literal["record", "native"]


def choose(extension: str, what: str) -> Implementation:
    """Return the implementation that ``BGTASKS_IMPLEMENTATION`` asks for: ``auto``, ``cython`` or ``python``.

    ``auto`` is the compiled one if it was built and the GIL is on: it relies on the GIL, so its import would turn the
    GIL on for the whole process. Outside the main interpreter the pure-Python twin runs, whatever the variable says:
    the compiled one cannot be loaded there.

    Args:
        extension: the full name of the compiled module.
        what: the contents of that module, for the error's text.

    Raises:
        ImportError: the value is unknown, or ``cython`` is required and the extension was not built.

    """
    choice = _read("BGTASKS_IMPLEMENTATION", get_args(Choice))
    if choice == "python" or (choice == "auto" and not _has_gil()):
        return "python"
    try:
        importlib.import_module(extension)
    except ModuleNotFoundError as error:
        # Only a missing extension selects the twin; an extension that exists and does not load is an error.
        if error.name != extension:
            raise
        if choice == "cython":
            raise ImportError(
                f"BGTASKS_IMPLEMENTATION=cython, but the compiled {what} was not built: reinstall with a C compiler "
                "and BGTASKS_BUILD=require"
            ) from None
        return "python"
    except ImportError as error:
        # CPython's message outside the main interpreter, where only the twin can run.
        if "does not support loading in subinterpreters" not in str(error):
            raise
        return "python"
    return "cython"


def choose_wrapper() -> Wrapper:
    """Return what ``BGTASKS_WRAPPER`` asks tasks of the compiled registry to step: ``record`` or ``native``.

    Raises:
        ImportError: the value is unknown.

    """
    choice: Wrapper = _read("BGTASKS_WRAPPER", get_args(Wrapper))
    return choice


def _read(variable: str, values: tuple[str, ...]) -> Any:
    """Return the value of a variable, the first of ``values`` by default."""
    choice = os.environ.get(variable, values[0])
    if choice not in values:
        raise ImportError(f"{variable}={choice!r} is unknown; it takes one of: {', '.join(values)}")
    return choice


def why_python(extension: str) -> str:
    """Return why ``choose`` took the Python twin of a compiled module, and what to do for the compiled one."""
    if os.environ.get("BGTASKS_IMPLEMENTATION") == "python":
        return "because BGTASKS_IMPLEMENTATION=python asks for it"
    if not _has_gil():
        return "because this interpreter runs without the GIL, on which the compiled one relies"
    if sys.implementation.name != "cpython":
        return f"because the compiled one is for CPython, and this is {sys.implementation.name}"
    if importlib.util.find_spec(extension) is None:
        return (
            "because the compiled one was not built: install with a C compiler and BGTASKS_BUILD=require, which says "
            "what is missing"
        )
    return "because the compiled one cannot be loaded in this interpreter"


def _has_gil() -> bool:
    # Before 3.13 the GIL is always on.
    return not hasattr(sys, "_is_gil_enabled") or sys._is_gil_enabled()  # noqa: SLF001  its documented name
