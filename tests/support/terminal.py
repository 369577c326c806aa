"""A real terminal, of tmux: a program runs in it, keys are typed into it, and its screen is read."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["Terminal"]

# Seconds that a screen may take to show something, on a busy machine.
PATIENCE = 30.0


class Terminal:
    """A terminal with a program in it, until ``close``.

    Args:
        folder: where the terminal's socket is.
        command: the program and its arguments.
        width: characters in a line.
        height: lines.

    """

    def __init__(self, folder: Path, command: list[str], width: int, height: int) -> None:
        self._tmux = ["tmux", "-f", os.devnull, "-S", str(folder / f"tmux-{width}")]
        # The screen stays when the program has ended.
        program = f"{shlex.join(command)}; echo exit status $?; sleep 600"
        self._run("new-session", "-d", "-x", str(width), "-y", str(height), program)

    def _run(self, *arguments: str) -> str:
        # The size is that of the terminal, not that of the one in which the tests run.
        environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
        return subprocess.run(
            [*self._tmux, *arguments], check=True, capture_output=True, text=True, timeout=30, env=environment
        ).stdout

    def type(self, *keys: str) -> None:
        """Type keys: characters, or names such as ``Enter`` and ``Escape``."""
        for key in keys:
            self._run("send-keys", key)

    def resize(self, width: int, height: int) -> None:
        """Give the terminal another size."""
        self._run("resize-window", "-x", str(width), "-y", str(height))

    def screen(self, *, colours: bool = False) -> str:
        """Return the lines of the screen; with colours as escape sequences if wanted."""
        return self._run("capture-pane", "-p", *(["-e"] if colours else []))

    def shows(self, *texts: str, without: tuple[str, ...] = ()) -> str:
        """Wait until the screen has all texts and none of the others; return it."""
        return self.wait(
            lambda screen: all(text in screen for text in texts) and not any(text in screen for text in without),
            f"{texts} without {without}",
        )

    def wait(self, condition: Callable[[str], object], description: str = "the condition") -> str:
        """Wait until a condition holds for the screen; return it."""
        end = time.monotonic() + PATIENCE
        while True:
            screen = self.screen()
            if condition(screen):
                return screen
            assert time.monotonic() < end, f"the screen does not show {description}:\n{screen}"
            time.sleep(0.05)

    def close(self) -> None:
        """End the terminal, and the program in it."""
        subprocess.run([*self._tmux, "kill-server"], check=False, capture_output=True, timeout=30)
