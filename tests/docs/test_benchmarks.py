"""The benchmark run: its rows, its file, its page, and what it says of an earlier run. No figure is tested."""

import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from paths import ROOT
from requirements import need

for package in ("matplotlib", "msgspec", "rich"):
    need(package)

PROGRAM = ROOT / "benchmarks" / "run.py"
SMALL = ("--rounds", "2", "--burst", "100", "--most", "10")


def run(*arguments):
    """Run the program to its end."""
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Give the folder of a small run of some parts, with its rows, its page and its picture."""
    folder = tmp_path_factory.mktemp("benchmarks")
    files = ("--json", folder / "run.json", "--html", folder / "page.html", "--picture", folder / "picture.svg")
    done = run("tasks", "await", "growth", "memory", *SMALL, *files)
    assert done.returncode == 0, done.stderr
    assert "Tasks: how fast against bare ones" in done.stderr, "a bar shows the progress"
    (folder / "output.txt").write_text(done.stdout)
    return folder


def test_every_row_has_a_median_within_its_spread(measured):
    """The file has the rows of all parts, and the screen shows each of them."""
    content = json.loads((measured / "run.json").read_text())
    output = (measured / "output.txt").read_text()
    assert content["head"]["interpreter"].startswith("CPython ")
    assert {row["part"] for row in content["rows"]} == {"tasks", "await", "growth", "memory"}
    for row in content["rows"]:
        assert 0 < row["low"] <= row["median"] <= row["high"], row
        assert row["name"] in output
    assert {row["x"] for row in content["rows"] if row["case"] == "tasks in flight"} == {1, 10}


class Links(HTMLParser):
    """Collects what a page refers to, and the elements it has."""

    def __init__(self):
        super().__init__()
        self.references = []
        self.tags = []

    def handle_starttag(self, tag, attrs):
        """Note an element and its references."""
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]


def test_the_page_needs_no_network(measured):
    """It loads nothing, runs no script, has a chart for each case and names it for those who do not see it."""
    text = (measured / "page.html").read_text()
    links = Links()
    links.feed(text)
    assert "script" not in links.tags
    # An empty icon keeps a browser from asking the server for one.
    assert [reference for reference in links.references if not reference.startswith("#")] == ["data:,"]
    rows = json.loads((measured / "run.json").read_text())["rows"]
    cases = {(row["part"], row["case"]) for row in rows}
    assert links.tags.count("svg") == len(cases) == text.count('role="img"')
    assert "#010203" not in text, "the ink is the colour of the page's text"
    assert (measured / "picture.svg").read_text().startswith("<?xml")


def test_runs_are_joined_on_one_page(measured, tmp_path):
    """--join alone measures nothing, and draws the runs side by side."""
    other = json.loads((measured / "run.json").read_text())
    other["head"]["interpreter"] = "CPython 9.9"
    (tmp_path / "other.json").write_text(json.dumps(other))
    done = run("--join", measured / "run.json", tmp_path / "other.json", "--html", tmp_path / "page.html")
    assert (done.returncode, done.stdout) == (0, f"\nwritten: {tmp_path / 'page.html'}\n"), done.stderr
    assert "CPython 9.9" in (tmp_path / "page.html").read_text()


def test_rows_that_moved_are_named(measured, tmp_path):
    """--against names the rows whose middle half lies elsewhere, and no other; other ground is named, too."""
    before = json.loads((measured / "run.json").read_text())
    before["head"]["interpreter"] = "CPython 0.1"
    for row in before["rows"]:
        row["low"], row["high"] = 0.0, 1e9
        if row["name"] == "bgtasks in Python":
            row["low"] = row["median"] = row["high"] = 1e-9
    (tmp_path / "before.json").write_text(json.dumps(before))
    done = run("memory", *SMALL, "--against", tmp_path / "before.json")
    assert done.returncode == 0, done.stderr
    assert "interpreter was 'CPython 0.1'" in done.stdout
    assert "1 of 4 rows moved by more than their spread" in done.stdout
    assert "memory, a task in flight: bgtasks in Python: 0.000 -> " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("speed",), "unknown part: speed; there are tasks, await, growth, memory, events"),
        (("tasks", "--rounds", "0"), "argument --rounds: too small"),
        (("tasks", "--against", "nowhere.json"), "No such file"),
        (("--join", PROGRAM), "not written by benchmarks/run.py --json"),
    ],
)
def test_bad_arguments(arguments, text):
    """What is wrong is said before anything is measured."""
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr
