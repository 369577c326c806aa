"""The tables of options name what the signatures have, with the same defaults, and leave nothing out."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from typing import get_args

import pytest
from paths import PACKAGE, ROOT
from requirements import CLIENTS, need

from bgtasks import ExecutorKind
from bgtasks.executor._kinds import default_concurrency

FILE = ROOT / "docs" / "_extensions" / "option_tables.py"
COMMAND = f"python {FILE.relative_to(ROOT)}"
SPEC = importlib.util.spec_from_file_location("option_tables", FILE)
option_tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(option_tables)
TEXT = option_tables.PAGE.read_text(encoding="utf-8")
TABLES = dict(re.findall(r"<!-- options: ([\w.]+) -->\n\n((?:\|.*\n)*)", TEXT))


def rows_of(table):
    """Return the names and the defaults that a table has."""
    return re.findall(r"^\| `(\w+)` \| (\S.*?) \| ", table, re.MULTILINE)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_that_of_the_code(name):
    """Names, order and defaults by the signature, meanings by the docstring; the command of the message writes them."""
    if ".events" in name:
        need("msgspec")
    if (package := CLIENTS.get(name.split(".")[-2])) is not None:
        need(package)
    assert TABLES[name] == option_tables.table_of(name), f"{COMMAND} writes the tables anew"
    parameters = inspect.signature(option_tables.thing_at(name)).parameters
    for option, default in rows_of(TABLES[name]):
        written = re.match(r"`(.*?)`", default)
        expected = parameters[option].default
        assert (
            default == "required" if expected is inspect.Parameter.empty else ast.literal_eval(written[1]) == expected
        )


def test_every_sink_has_its_table():
    """And every other class of which users make objects."""
    named = {name.rpartition(".")[2] for name in TABLES}
    sinks = set()
    for path in sorted((PACKAGE / "events" / "sinks").glob("[!_]*.py")):
        sinks |= {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}
    sinks = {name for name in sinks if name.endswith("Sink") and not name.startswith("_")}
    assert len(sinks) == 10
    # It has no options, as the page says.
    assert sinks - {"MemorySink"} <= named
    assert "`MemorySink`, in `bgtasks.events.sinks.memory`, has no options." in TEXT
    assert {"BackgroundTaskManager", "BackgroundExecutor", "AsyncBackgroundExecutor", "Publisher", "Spool"} <= named


def test_every_kind_of_executor_is_in_the_table_of_kinds():
    """With its own defaults."""
    processors = default_concurrency("processes")
    defaults = {"processors": processors, "processors + 4, at most 32": min(processors + 4, 32)}
    for kind in get_args(ExecutorKind):
        default = re.search(rf'^\| `"{kind}"`[^|]*\|[^|]*\| ([^|]*) \|', TEXT, re.MULTILINE)[1]
        assert defaults[default] == default_concurrency(kind)


def test_a_docstring_that_says_nothing_of_an_option_is_an_error(monkeypatch):
    """A table has no empty cells."""

    def undocumented(size: int = 5) -> None:  # noqa: D417  that is the point
        """Do nothing.

        Args:
            other: something else.

        """

    monkeypatch.setattr(option_tables, "thing_at", lambda name: undocumented)
    with pytest.raises(LookupError, match="says nothing about size"):
        option_tables.table_of("undocumented")
