"""What a report of a bug needs: what is installed, and which of the twins runs."""

from __future__ import annotations

import importlib
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Final, NamedTuple

from bgtasks import __version__
from bgtasks._implementation import choose, why_python

__all__ = ["environment"]

DISTRIBUTION: Final = "bgtasks-registry"
# The compiled modules, with the contents of each.
EXTENSIONS: Final = {"registry": "bgtasks._registry", "event queue": "bgtasks.events._queue"}


class _Requirement(NamedTuple):
    """A package that an extra needs: its name, and the condition under which it is needed, an empty string for none."""

    name: str
    condition: str


def _requirements() -> dict[str, list[_Requirement]]:
    """Return what each extra needs beside other extras, by its name; nothing if bgtasks is not installed."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, list[_Requirement]] = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"""extra == ["']([^"']+)["']""", marker)
        name = re.match(r"[\w.-]+", requirement)
        if extra is None or name is None:
            continue
        condition = marker.replace(extra[0], "").replace(" and ", "").strip(" ()")
        needed = found.setdefault(extra[1], [])
        if name[0] != DISTRIBUTION:
            needed.append(_Requirement(name[0], condition))
    # An extra of extras alone, as ``all`` is, shows nothing of its own.
    return {extra: needed for extra, needed in sorted(found.items()) if needed}


def _version_of(distribution: str) -> str | None:
    """Return the version of an installed distribution, None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _extra_line(extra: str, needed: Sequence[_Requirement]) -> str:
    """Return what is installed of an extra, and how to install the rest."""
    missing = [each for each in needed if _version_of(each.name) is None]
    if not missing:
        return ", ".join(f"{each.name} {_version_of(each.name)}" for each in needed)
    names = ", ".join(each.name + (f" (where {each.condition})" if each.condition else "") for each in missing)
    return f'{names} not installed: pip install "{DISTRIBUTION}[{extra}]"'


def _twin_line(what: str, extension: str) -> str:
    """Return which twin of a compiled module runs, and why if it is the Python one."""
    if choose(extension, what) == "cython":
        return "compiled"
    return f"Python, {why_python(extension)}"


def _python_line() -> str:
    """Return the interpreter, its version, its build and its system."""
    if not hasattr(sys, "_is_gil_enabled"):
        build = "with the GIL"
    else:
        free_threaded = "t" in getattr(sys, "abiflags", "")
        build = "free-threaded, " if free_threaded else ""
        build += "with the GIL" if sys._is_gil_enabled() else "without the GIL"  # noqa: SLF001  its documented name
    name = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{name}, {build}, {platform.system()} {platform.machine()}"


def _loops_line() -> str:
    """Return the event loops that can be imported, the one that ``bgtasks.run`` takes first."""
    try:
        uvloop = importlib.import_module("uvloop")
    except ImportError as error:
        reason = "not installed" if getattr(error, "name", None) == "uvloop" else f"does not load: {error}"
        return f"asyncio (bgtasks.run takes it); uvloop {reason}"
    return f"uvloop {uvloop.__version__} (bgtasks.run takes it), asyncio"


def environment() -> Iterator[tuple[str, str]]:
    """Yield the lines: a title, and what there is."""
    yield "bgtasks", f"{__version__}, {Path(__file__).parent}"
    for what, extension in EXTENSIONS.items():
        yield what, _twin_line(what, extension)
    yield "Python", _python_line()
    yield "event loops", _loops_line()
    requirements = _requirements()
    if not requirements:
        yield "extras", f"unknown, because the distribution {DISTRIBUTION} is not installed"
    for extra, needed in requirements.items():
        yield f"[{extra}]", _extra_line(extra, needed)
