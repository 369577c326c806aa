"""The page that compares bgtasks with others says what the benchmark prints, as far as that is no timing."""

import os
import re
import subprocess
import sys

from paths import PACKAGE, ROOT
from requirements import need

need("starlette")

PROGRAM = ROOT / "benchmarks" / "peers.py"
TEXT = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
# The name of each peer, and how many of the others finish.
ROWS = dict(re.findall(r"^\| `([\w. ]+)` \| [\d.]+ \| [\d,]+ ms \| (\d) \|", TEXT, re.MULTILINE))


def run(*arguments):
    """Return what the benchmark prints."""
    done = subprocess.run(
        [sys.executable, PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_says_how_many_finish():
    """What one failure does to the others is a property of the peers."""
    printed = dict(re.findall(r"^  (\w[\w. ]*?) +(\d)\b", run("failures"), re.MULTILINE))
    assert len(ROWS) == 8
    assert {"bgtasks create_task", "BackgroundTasks", "asyncio.TaskGroup"} <= printed.keys()
    assert printed == {name: ROWS[name] for name in printed}


def test_the_costs_of_all_are_printed():
    """The names of the page are those of the benchmark."""
    printed = run("cost", "together", "--burst", "5", "--rounds", "2")
    left_out = re.findall(r"not installed: (.*) is left out", printed)
    for name in ROWS.keys() - set(left_out):
        assert re.search(rf"^  {re.escape(name)} +\d+\.\d+ +\d+\.\d+ x$", printed, re.MULTILINE), name
