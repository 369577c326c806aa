"""Small disks leave no mount behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

from disks import small_disk
from paths import SUPPORT

PROGRAM = """
import sys, time
from pathlib import Path
from disks import small_disk
with small_disk(Path(sys.argv[1]), 1):
    print("mounted", flush=True)
    time.sleep(1000)
"""


def test_a_disk_with_an_open_file_is_unmounted(tmp_path):
    """A test that failed may keep a file open, as may a thread that ends a little later."""
    with contextlib.ExitStack() as stack:
        with small_disk(tmp_path / "disk", 1) as disk:
            assert os.path.ismount(disk)
            stack.enter_context((disk / "file").open("w"))
        assert not os.path.ismount(disk)


def test_a_disk_of_a_process_that_is_killed_is_unmounted(tmp_path):
    """Its fixtures do not come to their ends."""
    with small_disk(tmp_path / "probe", 1):
        pass
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "disk")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SUPPORT)},
    )
    with process:
        assert process.stdout.readline() == b"mounted\n"
        assert os.path.ismount(tmp_path / "disk")
        process.kill()
    deadline = time.monotonic() + 20
    while os.path.ismount(tmp_path / "disk"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
