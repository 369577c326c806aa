"""Small disks that can be filled to the last byte."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(directory: Path, mebibytes: int) -> Iterator[Path]:
    """Mount a file system of a size in MiB on a directory; skip the test if that is not allowed."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("takes root on Linux to mount a small disk")
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"this machine mounts no small disk: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def fill_disk(directory: Path, leave: int = 0) -> Path:
    """Write a file that leaves a number of bytes free, and return it."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file:
        free = os.statvfs(directory)
        wanted = free.f_bavail * free.f_frsize - leave
        with contextlib.suppress(OSError):
            while wanted > 0:
                wanted -= file.write(b"\0" * min(wanted, 1 << 16))
    return filler
