"""Programs in child processes, written by a test and controlled by lines and signals."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paths import PACKAGE, SUPPORT

PRELUDE = """
import asyncio, logging, signal, sys
import bgtasks
from bgtasks import BackgroundTaskManager
from loops import LOOPS

logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(levelname)s %(message)s")
loop_factory = LOOPS[sys.argv[1]]

def say(*words):
    print(*words, flush=True)

async def told():
    \"\"\"Return when the test calls Child.tell().\"\"\"
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(0, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(0)
"""


def is_running(pid: int) -> bool:
    """Return whether a process exists and, where the system tells, is no zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc/self/stat").exists()


class Child:
    """A running program."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []

    def wait_for(self, text: str) -> str:
        """Read lines until one contains the text, and return it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if text in line:
                return self.lines[-1]
        raise AssertionError(f"{text!r} was not printed, but {self.lines}")

    def tell(self) -> None:
        """Let ``told()`` return."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self) -> int:
        """Wait for the end; return the exit code, the negative number of the signal that killed it."""
        assert self.process.stdout is not None
        # Not communicate(): that closes the standard input, on which told() waits.
        self.lines += self.process.stdout.read().splitlines()
        return self.process.wait(timeout=60)

    @property
    def output(self) -> str:
        """The complete output, standard error included."""
        return "\n".join(self.lines)


def environment(twin: str) -> dict[str, str]:
    """Return the environment of a program that runs on a twin."""
    path = os.pathsep.join([str(PACKAGE.parent), str(SUPPORT)])
    return {**os.environ, "PYTHONPATH": path, "BGTASKS_IMPLEMENTATION": twin, "PYTHONUNBUFFERED": "1"}


@contextmanager
def child(folder: Path, program: str, twin: str, *arguments: str) -> Iterator[Child]:
    """Start a program, with warnings as errors and in development mode; kill it if the block raises."""
    file = folder / "program.py"
    file.write_text(PRELUDE + textwrap.dedent(program))
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-X", "dev", file, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(twin),
    )
    # It waits for the end of the process.
    with process:
        try:
            yield Child(process)
        except BaseException:
            process.kill()
            raise
