"""The tables of options in ``docs/reference/options.md``, from the signatures and docstrings of the code.

::

    python docs/_extensions/option_tables.py    # writes the tables anew, after a change of an option

A comment ``<!-- options: bgtasks.events.Publisher -->`` in the page stands above the table of that class or
function. The tests fail if a table is not what this program writes.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "reference" / "options.md"
TABLE = re.compile(r"<!-- options: ([\w.]+) -->\n(?:\n(?:\|.*\n)+)?")
HEAD = "| option | default | meaning |\n|---|---|---|\n"
MEBIBYTE = 1 << 20


def thing_at(full_name: str) -> Any:
    """Return the class, function or method of a full name."""
    parts = full_name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if error.name != ".".join(parts[:end]):
                raise
            continue
        for name in parts[end:]:
            thing = getattr(thing, name)
        return thing
    raise LookupError(full_name)


def meanings(thing: Any) -> dict[str, str]:
    """Return the texts of the arguments in a docstring, in Markdown, by the names of the arguments."""
    docstring = inspect.getdoc(thing) or ""
    section = re.search(r"^Args:\n((?:(?:    .*)?\n)+)", docstring + "\n", re.MULTILINE)
    if section is None:
        return {}
    found = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", section[1], re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).replace("``", "`").replace("|", "\\|") for name, text in found}


def default_text(value: Any) -> str:
    """Return a default as it is written in a call; large numbers in a form that people can read."""
    if value is inspect.Parameter.empty:
        return "required"
    if type(value) is int and value >= MEBIBYTE and value % MEBIBYTE == 0:
        mebibytes = value // MEBIBYTE
        return f"`{value:_}` ({mebibytes} MiB)"
    return f"`{value:_}`" if type(value) is int else f"`{value!r}`".replace("'", '"')


def options_of(full_name: str) -> Iterator[tuple[str, Any, str]]:
    """Yield the options of a class, function or method: name, default and meaning.

    Raises:
        LookupError: a docstring says nothing about an option.

    """
    thing = thing_at(full_name)
    texts = meanings(thing)
    left_out = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in inspect.signature(thing).parameters.items():
        if name == "self" or parameter.kind in left_out:
            continue
        if name not in texts:
            raise LookupError(f"the docstring of {full_name} says nothing about {name}")
        yield name, parameter.default, texts[name]


def table_of(full_name: str) -> str:
    """Return the table of a class, function or method."""
    rows = (f"| `{name}` | {default_text(default)} | {text} |\n" for name, default, text in options_of(full_name))
    return HEAD + "".join(rows)


def rewritten(text: str) -> str:
    """Return the page with its tables made anew."""
    return TABLE.sub(lambda found: f"<!-- options: {found[1]} -->\n\n{table_of(found[1])}", text)


def main() -> int:
    """Write the page; return 0."""
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
