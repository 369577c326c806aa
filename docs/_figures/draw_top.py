"""Draws the screens of ``bgtasks top`` in this folder, from a real terminal with two programs under load.

::

    python docs/_figures/draw_top.py
"""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from terminal import Terminal  # noqa: E402  from the folder that was added

# Seconds under load before the first screen.
LOAD = 15
# As rich draws it, but with the fonts of the reader, and without the frame of a window.
FORMAT = """<svg class="rich-terminal" viewBox="0 0 {terminal_width} {terminal_height}"
xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, monospace; font-size: {char_height}px;
line-height: {line_height}px; }}
{styles}
</style>
<defs>{lines}</defs>
<rect fill="#121212" width="100%" height="100%"/>
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</svg>
"""


def draw(name: str, terminal: Terminal, width: int) -> None:
    """Write the screen of a terminal into a file."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    for line in terminal.screen(colours=True).splitlines():
        console.print(Text.from_ansi(line), no_wrap=True, crop=True)
    svg = console.export_svg(code_format=FORMAT, unique_id=name)
    # The masks of a window that is not drawn.
    svg = re.sub(r' clip-path="[^"]*"', "", svg)
    (HERE / f"{name}.svg").write_text(svg, encoding="utf-8")


def draw_all(folder: Path) -> None:
    """Draw all screens."""
    command = [sys.executable, "-m", "bgtasks", "top"]
    top = Terminal(folder, command, 80, 24)
    top.shows("2 processes")
    time.sleep(LOAD)
    draw("top_tasks", top, 80)
    top.type("2")
    top.shows("RATE/s")
    top.type("/", "send", "Enter")
    top.shows("filter: send", without=("import",))
    top.type("Enter")
    top.shows("from start to end", "in all")
    draw("top_histogram", top, 80)
    top.type("Escape")
    top.shows("RATE/s", without=("in all",))
    top.type("Escape")
    top.shows("RATE/s", without=("filter:",))
    top.type("1")
    top.shows("PROGRESS")
    top.type("/", "import", "Enter")
    top.shows("filter: import", "rows", without=("send mail",))
    top.type("A")
    top.shows("Cancel ", "Y (capital)")
    draw("top_cancel", top, 80)
    top.close()
    wide = Terminal(folder, command, 200, 30)
    wide.shows("2 processes")
    wide.type("2")
    wide.shows("WAIT P99")
    time.sleep(LOAD)
    draw("top_names", wide, 200)
    wide.close()


def main() -> None:
    """Run two programs, and draw."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder
        busy = [sys.executable, str(ROOT / "examples" / "busy.py")]
        programs = [subprocess.Popen(busy, stderr=subprocess.DEVNULL) for _ in range(2)]
        try:
            draw_all(Path(folder))
        finally:
            for program in programs:
                program.send_signal(signal.SIGKILL)
                program.wait()


if __name__ == "__main__":
    main()
