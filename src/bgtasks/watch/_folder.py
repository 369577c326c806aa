"""The folder of the sockets of watched processes: it belongs to the user, and nobody else may enter it."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from bgtasks.errors import WatchError

__all__ = ["folder", "socket_of", "sockets"]


def folder() -> Path:
    """Return the folder of the sockets, made if it does not exist.

    Raises:
        WatchError: there is something else, or others may enter it.

    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(runtime, "bgtasks") if runtime else Path(tempfile.gettempdir(), f"bgtasks-{os.getuid()}")
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        # Not stat(): a link may lead anywhere.
        status = path.lstat()
    except OSError as error:
        raise WatchError(f"the folder of sockets {path} cannot be used: {error}; set XDG_RUNTIME_DIR") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise WatchError(
            f"the folder of sockets {path} is not a folder of this user alone (mode 0700): remove it, or set "
            "XDG_RUNTIME_DIR to a folder of yours"
        )
    return path


def socket_of(pid: int) -> Path:
    """Return the path of the socket of a process."""
    return folder() / f"{pid}.sock"


def sockets() -> dict[int, Path]:
    """Return the sockets of all processes that run, by process id; remove those of processes that are gone.

    Raises:
        WatchError: their folder is not safe, or cannot be read.

    """
    found = {}
    try:
        paths = sorted(folder().iterdir())
    except OSError as error:
        raise WatchError(f"the folder of sockets cannot be read: {error}") from error
    for path in paths:
        if path.stem.isdecimal():
            if not _runs(int(path.stem)):
                path.unlink(missing_ok=True)
            elif path.suffix == ".sock":
                found[int(path.stem)] = path
    return found


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # The number of a process of ours that is gone, used again by another user.
        return False
    return True
