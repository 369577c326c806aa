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
def unmounting(directory: Path) -> Iterator[None]:
    """Unmount a directory at the end: even if a file on it is still open, and even if this process is killed.

    A process of its own, which no signal to this one's group reaches, waits for the end of its input.
    """
    program = 'read -r _; exec umount --lazy "$1"'
    with subprocess.Popen(
        ["sh", "-c", program, "sh", str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as waiting:
        try:
            yield
        finally:
            _, error = waiting.communicate()
    assert waiting.returncode == 0, error


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
    with unmounting(directory):
        yield directory


@contextlib.contextmanager
def image_disk(image: Path, directory: Path, mebibytes: int | None) -> Iterator[Path]:
    """Mount a file as a disk on a directory; skip the test if that is not allowed.

    A copy of the file has what was written to the disk, as after a power cut, and nothing of the system's cache.

    Args:
        image: the file.
        directory: the directory to make.
        mebibytes: the size of a new disk, None if the file exists.

    """
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("takes root on Linux to mount a disk")
    directory.mkdir()
    commands = [["mount", "-o", "loop", str(image), str(directory)]]
    if mebibytes is not None:
        with image.open("wb") as file:
            file.truncate(mebibytes << 20)
        commands.insert(0, ["mkfs.ext4", "-q", str(image)])
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            pytest.skip(f"this machine makes no disk: {error}")
        if done.returncode:
            pytest.skip(f"this machine mounts no disk: {done.stderr.strip()}")
    with unmounting(directory):
        yield directory


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
