"""``bgtasks top``, driven by keys in a real terminal, with real programs under load; and its tables."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from requirements import need, need_program
from terminal import Terminal

from bgtasks._statistics import Distribution
from bgtasks.errors import MissingExtraError
from bgtasks.watch._top_poll import Look
from bgtasks.watch._top_tables import Figures, bars, count_of, quantile, seconds, sparkline
from bgtasks.watch._viewer import clean

PROGRAM = """
import asyncio, sys, time
import bgtasks
from bgtasks.events import Publisher, Sink
from bgtasks.executor import BackgroundExecutor

class Outbox(Sink):
    async def write(self, batch, batch_id):
        pass

async def load_rows(number):
    bgtasks.progress(number, 500, "rows")
    await asyncio.sleep(600)

async def tick(number):
    await asyncio.sleep(0.01)
    if number % 2:
        raise ValueError(number)

async def main(manager):
    for number in range(3):
        manager.create_task(load_rows(number), name="load", timeout=500, context={"password": "secret"})
    # These are the oldest, and so the first of the table.
    await asyncio.sleep(0.2)
    for number in range(300):
        manager.create_task(asyncio.sleep(600), name=f"many {number:03}")
    manager.create_task(asyncio.sleep(600), name="evil\\x1b[31m[b]bold[/b]")
    publisher = Publisher(Outbox(), name="orders", manager=manager)
    with BackgroundExecutor(max_concurrency=1, manager=manager) as submit:
        submit(time.sleep, 600)
        submit(time.sleep, 600)
        print("ready", flush=True)
        for number in range(1_000_000):
            manager.fire(tick(number), name="tick")
            publisher.emit({"number": number})
            await asyncio.sleep(0.02)

bgtasks.run(main, watch=True)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Give a function that starts a watched program."""
    need("textual")
    need("msgspec")
    need_program("tmux")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    started = []

    def start(program=PROGRAM):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def open_top(start, tmp_path):
    """Give a function that opens ``bgtasks top`` in a terminal."""
    opened = []

    def open_top(*arguments, width=80, height=24, patience=10.0):
        program = f"from bgtasks import __main__; from bgtasks.watch import _viewer; _viewer.PATIENCE = {patience}"
        options = ["top", "--interval", "0.2", *map(str, arguments)]
        command = [sys.executable, "-c", f"{program}; raise SystemExit(__main__.main())", *options]
        top = Terminal(tmp_path, command, width, height)
        opened.append(top)
        top.wait(lambda screen: "Quit" in screen or "exit status" in screen, "anything")
        return top

    yield open_top
    for terminal in opened:
        terminal.close()


def test_tasks_of_several_processes(start, open_top):
    """Both are shown in 24 lines of 80 characters; the filter and the order are those of the processes."""
    pids = [start().pid, start().pid]
    top = open_top()
    screen = top.shows("2 processes", "ID", "STATE", "AGE ▾", "LEFT", "NAME", "PROGRESS", without=("COROUTINE",))
    assert all(len(line) <= 80 for line in screen.splitlines())
    assert "A CANCEL NAME" in screen.splitlines()[-1]
    top.shows("load", "2/500 rows")
    # Each process sends 200 of its 306 tasks, of which these are not.
    top.type("/", "many 299")
    screen = top.shows("filter: many 299", *(f"{pid}.1." for pid in pids), without=("load", "many 298"))
    assert len(re.findall(r"running .* many 299", screen)) == 2
    top.type("Enter")
    top.shows("q Quit", "filter: many 299")
    top.type("Escape")
    top.shows("q Quit", without=("filter:",))
    # The cursor may have stayed on a task in the middle.
    top.type("C-Home")
    top.shows("load")
    # The next order after that by age is that by the time left: the tasks with a timeout are first.
    top.type("s")
    top.wait(lambda screen: re.search(r"LEFT ▾.*\n.*load", screen), "tasks with a timeout first")


def test_names_cannot_write_into_the_terminal(start, open_top):
    """Neither escape sequences nor markup have an effect."""
    start()
    top = open_top()
    top.type("/", "evil")
    top.shows("evil\\x1b[31m[b]bold[/b]")
    top.type("Enter")
    top.shows("q Quit")
    top.type("Enter")
    top.shows("evil\\x1b[31m[b]bold[/b]: the outermost frame first")
    top.type("Escape")
    top.shows("filter: evil", without=("outermost",))
    top.type("C")
    top.wait(lambda screen: re.search(r"Cancel task \S+ evil\\x1b\[31m\[b\]bold\[/b\]\?", screen), "the question")


def test_a_wide_terminal_shows_more(start, open_top):
    """At 200 x 60 all columns are there; the size may change at any time."""
    process = start()
    top = open_top(width=200, height=60)
    screen = top.shows("COROUTINE", "CONTEXT", "ATTEMPT", "NEXT", "load_rows", "password", f"{process.pid}.1.")
    assert "secret" not in screen
    top.type("2")
    top.shows("WAIT P99", "LAST ERROR", "ValueError")
    top.resize(80, 24)
    top.shows("RATE/s", without=("WAIT P99",))


def test_figures_move(start, open_top):
    """Names have rates and sparklines; loops, publishers and executors have tables of their own."""
    start()
    top = open_top()
    top.type("2")
    screen = top.wait(lambda screen: re.search(r"tick +\d+ +\d\d(\.\d)? +[▁-█]{4}", screen), "the rate of tick")
    (failed,) = re.findall(r"tick .*[▁-█] +(\d+) ", screen)
    top.wait(lambda screen: int(re.findall(r"tick .*[▁-█] +(\d+) ", screen)[0]) > int(failed), "more failures")
    top.type("3")
    top.shows("MainThread", "BLOCKS")
    top.type("4")
    top.wait(lambda screen: re.search(r"orders +ok .*[▁-█]{4}", screen), "the publisher")
    top.type("5")
    top.wait(lambda screen: re.search(r"ThreadsLoop-\S+ +1 +1\b", screen), "one function runs, one is queued")


def test_the_histogram_of_a_name(start, open_top):
    """Enter shows durations and waits of the name."""
    start()
    top = open_top()
    top.type("2")
    top.shows("RATE/s")
    top.type("/", "tick", "Enter")
    top.shows("filter: tick", without=("many",))
    top.type("Enter")
    top.shows("from start to end", "from creation to the first step", "<  16.4ms", "█", "in all, mean")
    # What does not fit is scrolled to.
    top.resize(80, 14)
    # Pressed again, because the first may come before the text has its new height.
    top.wait(lambda screen: re.search(r"in all, mean.*\n.*Esc: back", screen) or top.type("End"), "the end of the text")
    top.type("Escape")
    top.shows("RATE/s", without=("in all, mean",))


def test_the_stack_of_a_task(start, open_top):
    """Enter shows the frames."""
    start()
    top = open_top()
    top.type("/", "load", "Enter")
    top.shows("filter: load", "2/500 rows", without=("many",))
    top.type("Enter")
    top.shows("the outermost frame first", "in load_rows", "in sleep")


def test_cancelling_needs_capitals_and_a_confirmation(start, open_top):
    """``c`` does nothing; ``C`` asks, and only ``Y`` cancels; ``A`` cancels all tasks of the name in all processes."""
    pids = [start().pid, start().pid]
    top = open_top()
    top.type("/", "load", "Enter")
    top.wait(lambda screen: screen.count("rows") == 6, "six tasks")
    top.type("c")
    top.type("C")
    screen = top.shows("Cancel task")
    (task,) = re.findall(r"Cancel task (\S+) load\?", screen)
    for answer in ("y", "n", "Enter", "Escape"):
        top.type(answer)
        top.shows("filter: load", without=("Cancel task",))
        assert top.screen().count("rows") == 6
        top.type("C")
        top.shows("Cancel task")
    top.type("Y")
    top.shows("1 task was asked to end")
    screen = top.wait(lambda screen: screen.count("rows") == 5, "five tasks")
    assert int(task.split(".")[0]) in pids
    assert f" {task} " not in screen
    top.type("A")
    top.shows("Cancel 5 tasks named load of all processes?")
    top.type("Y")
    top.wait(lambda screen: screen.count("rows") == 0, "no task")


def test_names_are_cancelled_in_one_process(start, open_top):
    """``C`` on a name is for its process."""
    start(), start()
    top = open_top()
    top.type("2")
    top.shows("RATE/s")
    top.type("/", "load", "Enter")
    top.wait(lambda screen: len(re.findall(r"load +3 ", screen)) == 2, "three tasks each")
    top.type("C")
    top.shows("Cancel 3 tasks named load of process")
    top.type("Y")
    screen = top.wait(lambda screen: len(re.findall(r"load +0 ", screen)) == 1, "no task in one of them")
    assert len(re.findall(r"load +3 ", screen)) == 1


def test_processes_come_and_go(start, open_top):
    """One that is killed disappears, one that hangs holds up nothing, one that starts later appears."""
    first, second = start(), start()
    top = open_top(patience=2.0)
    top.type("/", "load", "Enter")
    top.shows("2 processes", f"{first.pid}.1.", f"{second.pid}.1.")
    first.kill()
    top.shows("1 process ", f"{second.pid}.1.", without=(f"{first.pid}.1.", "does not answer"))
    os.kill(second.pid, signal.SIGSTOP)
    third = start()
    top.shows("2 processes", f"{third.pid}.1.")
    top.type("2")
    top.shows("P50")
    top.shows(f"{second.pid} does not answer")
    top.type("q")
    top.shows("exit status 0")


def test_it_pauses(start, open_top):
    """What is shown stays until the next ``p``."""
    start()
    top = open_top()
    top.type("2")
    top.shows("tick")
    top.type("p")
    first = top.shows("paused").splitlines()
    second = start()
    # Long enough for several looks.
    time.sleep(1.0)
    assert top.shows("paused", without=(str(second.pid),)).splitlines()[2:] == first[2:]
    top.type("p")
    top.shows("2 processes", without=("paused",))


def test_without_processes_it_waits(start, open_top):
    """It says how to watch one, and shows it when it comes; --pid wants one that exists."""
    top = open_top()
    top.shows("start one with BGTASKS_WATCH=1")
    process = start()
    top.shows("1 process ", f"{process.pid}.1.")
    other = open_top("--pid", 1, width=90)
    other.shows("process 1 is not watched", "exit status 1")
    only = open_top("--pid", process.pid, width=100)
    only.shows("1 process ")


def test_it_needs_a_terminal(start):
    """A pipe is refused, and so is an interval that is none."""
    for arguments, text in (([], "bgtasks top needs a terminal"), (["--interval", "0"], "--interval must be")):
        done = subprocess.run(
            [sys.executable, "-m", "bgtasks", "top", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert text in done.stderr


def test_a_missing_extra_is_named(monkeypatch):
    """The error has the command that installs it."""
    monkeypatch.setitem(sys.modules, "textual", None)
    monkeypatch.setitem(sys.modules, "textual.app", None)
    monkeypatch.delitem(sys.modules, "bgtasks.watch._top_app", raising=False)
    with pytest.raises(MissingExtraError, match=r'pip install "bgtasks-registry\[top\]"'):
        __import__("bgtasks.watch._top_app")


# -- the tables, without a terminal -----------------------------------------------------------------------------------


def look(pid, at, started, *, tasks=0):
    """Return answers of a process with one name."""
    names = {"send": {"started": started, "in_flight": 1}}
    manager = {"manager": 1, "names": names, "loops": [], "publishers": [], "executors": []}
    return Look(pid, at, {"tasks": [], "total": tasks, "matching": tasks}, {"managers": [manager]})


def test_rates_are_differences_of_counters():
    """A rate is what was added per second; a process that ended leaves nothing behind."""
    figures = Figures()
    assert figures.summary().startswith("no watched process yet")
    for at, started in ((10.0, 100), (12.0, 300), (13.0, 300)):
        figures.add(look(7, at, started, tasks=2))
    (row,) = figures.rows("names")
    assert list(row["rates"]) == [100.0, 0.0]
    assert row["rate"] == 0.0
    figures.add(look(8, 13.0, 5, tasks=1))
    assert figures.summary() == "2 processes · 3 tasks · 0/s started"
    assert [row["rate"] for row in figures.rows("names", "sen")] == [0.0, None]
    assert figures.rows("names", "other") == []
    figures.miss(8, "process 8 does not answer")
    assert figures.summary().endswith("8 does not answer")
    figures.remove(7)
    figures.remove(8)
    assert not any(vars(figures).values())


def test_figures_of_many_looks_stay_small():
    """An hour of answers leaves the last ones."""
    figures = Figures()
    for second in range(3600):
        figures.add(look(7, float(second), second))
    (row,) = figures.rows("names")
    assert len(row["rates"]) == 30


def test_numbers_are_short():
    """Lengths of time and counts fit into a column."""
    lengths = [seconds(length) for length in (None, 0.0000012, 0.0123, 59.94, 1200, 86400)]
    assert lengths == ["-", "1µs", "12.3ms", "59.9s", "20min", "24h"]
    counts = [count_of(number) for number in (None, 0, 0.25, 42, 9999, 12_345, 2_500_000, 3e9)]
    assert counts == ["-", "0", "0.2", "42", "9999", "12.3k", "2.5M", "3G"]
    assert clean("a\x1bb") == "a\\x1bb"


def test_bars():
    """A sparkline and a histogram show proportions; nothing at all is no error."""
    assert sparkline([0, 1, 2, 4], 5) == " ▁▃▅█"
    assert sparkline([0, 0], 2) == "▁▁"
    assert sparkline([], 3) == "   "
    assert bars({"count": 0, "buckets": [], "sum_seconds": 0.0, "max_seconds": None}, 10) == ["  nothing yet"]
    distribution = Distribution()
    distribution.count(0.0015, 10)
    distribution.count(0.006, 5)
    distribution.count(0.0000001)
    histogram = distribution.as_dict()
    lines = bars(histogram, 10)
    assert lines[0] == "  <     1µs  █ 1"
    assert "  <  2.05ms  ██████████ 10" in lines
    assert "  <  8.19ms  █████ 5" in lines
    assert lines[-1].startswith("  16 in all, mean ")
    assert quantile(histogram, 0.99) == pytest.approx(0.006)
    assert quantile({"count": 0, "buckets": [], "max_seconds": None}, 0.99) is None
