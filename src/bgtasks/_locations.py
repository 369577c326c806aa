"""Where a task stands: the innermost frame of the user's code, and what that one called."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, Final

__all__ = ["location_of", "location_of_thread"]

OWN_FOLDER: Final = str(Path(__file__).parent)


def location_of(coro: Any) -> str:
    """Return where a suspended coroutine stands: file, line and function of the user's innermost frame.

    A frame of the standard library or of an installed package is not the user's, unless the coroutine itself comes from
    that package. What the user's frame called is added: "at mail.py:12 in send (in asyncio.sleep)".
    """
    return _location_in(list(_frames_of(coro)))


def location_of_thread(ident: int | None) -> str:
    """Return where the function of a thread stands, in the form of ``location_of``."""
    frame = None if ident is None else sys._current_frames().get(ident)  # noqa: SLF001  Python has no other way
    frames: list[FrameType] = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    frames.reverse()
    # Below the user's function stands the thread that runs it, with frames of bgtasks and of the standard library.
    own = max((index for index, each in enumerate(frames) if _is_below(each, (OWN_FOLDER,))), default=-1)
    return _location_in(frames[own + 1 :])


def _frames_of(coro: Any) -> Iterator[FrameType]:
    """Yield the frames of a chain of coroutines and generators, outermost first."""
    while coro is not None:
        for frame, awaited in (("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await")):
            if getattr(coro, frame, None) is not None:
                yield getattr(coro, frame)
                coro = getattr(coro, awaited, None)
                break
        else:
            return


def _location_in(frames: list[FrameType]) -> str:
    if not frames:
        return "location unknown"
    package = _package_of(frames[0])
    users = [index for index, frame in enumerate(frames) if _is_users(frame, package)]
    if not users:
        return f"in {_public_name(frames[0])}"
    frame = frames[users[-1]]
    place = f"at {frame.f_code.co_filename}:{frame.f_lineno} in {_name_of(frame)}"
    called = frames[users[-1] + 1 :]
    return f"{place} (in {_public_name(called[0])})" if called else place


def _is_users(frame: FrameType, package: str) -> bool:
    """Return whether a frame is the user's; ``package`` is the one that the task's own coroutine comes from."""
    if _is_below(frame, _folders("purelib", "platlib")):
        return _package_of(frame) == package
    is_library = _is_below(frame, _folders("stdlib", "platstdlib"))
    return not (is_library or _is_below(frame, (OWN_FOLDER,)) or _is_frozen(frame))


@cache
def _folders(*names: str) -> tuple[str, ...]:
    """Return the folders of the standard library or of installed packages; the latter may lie inside the former."""
    # Late: it costs a millisecond at import, and most programs never need it.
    import sysconfig

    return tuple({sysconfig.get_path(name) for name in names})


def _is_below(frame: FrameType, folders: tuple[str, ...]) -> bool:
    return any(frame.f_code.co_filename.startswith(f"{folder}{os.sep}") for folder in folders)


def _is_frozen(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith("<frozen ")


def _package_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _public_name(frame: FrameType) -> str:
    """Return the name of a function as users know it: ``asyncio.sleep``, not ``asyncio.tasks.sleep``."""
    name, module = _name_of(frame), str(frame.f_globals.get("__name__", ""))
    package = module.partition(".")[0]
    public = getattr(sys.modules.get(package), name.partition(".")[0], None)
    return f"{package}.{name}" if getattr(public, "__module__", None) == module else f"{module}.{name}"


def _name_of(frame: FrameType) -> str:
    return frame.f_code.co_qualname
