"""The reference has an entry for every public name and for every public method, and none for anything else."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from typing import NamedTuple

import pytest
from paths import PACKAGE, ROOT
from requirements import need

from bgtasks.errors import MissingExtraError

PAGES = sorted(ROOT.glob("docs/reference/*.md"))
# The manager's base, whose public methods are those of the manager: nothing to import from there.
INTERNAL = {"bgtasks.registry"}
ENTRY = re.compile(
    r"^\.\. (?:auto\w+|py:\w+):: (bgtasks\.[\w.]+)(?:\(.*\))?\n((?:(?: .*)?\n)*)",
    re.MULTILINE,
)
NESTED = re.compile(r"^   \.\. (?:auto|py:)(?:method|property|attribute):: (\w+)", re.MULTILINE)
MEMBERS = re.compile(r"^   :members:(.*)$", re.MULTILINE)


class Entry(NamedTuple):
    """What a page says of a name."""

    members: set[str]
    has_all_members: bool
    has_inherited_members: bool


def entries():
    """Return the entries of all pages by their full names; those of modules are left out."""
    found = {}
    for page in PAGES:
        for name, body in ENTRY.findall(page.read_text(encoding="utf-8")):
            if name in MODULES:
                continue
            assert name not in found, f"{name} has two entries"
            listed = MEMBERS.search(body)
            members = set(NESTED.findall(body))
            if listed is not None:
                members |= set(re.findall(r"\w+", listed[1]))
            has_all = listed is not None and not listed[1].strip()
            found[name] = Entry(members, has_all, ":inherited-members:" in body)
    return found


def public_modules():
    """Return the names in ``__all__`` of each module that has no underscore in its name, by its name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if "._" in name or name in INTERNAL:
            continue
        found[name] = []
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found[name] = ast.literal_eval(node.value)
    return found


MODULES = public_modules()
ENTRIES = entries()
NAMES = [(module, name) for module, names in MODULES.items() for name in names]


def thing_at(full_name):
    """Return what a full name means; None where the module needs a package that is not installed."""
    module, _, name = full_name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (MissingExtraError, ModuleNotFoundError):
        return None


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[".".join(pair) for pair in NAMES])
def test_a_public_name_has_an_entry(module, name):
    """It stands under this module, or the same thing stands under another one."""
    if f"{module}.{name}" in ENTRIES:
        return
    need("msgspec")
    same = [full_name for full_name in ENTRIES if full_name.rpartition(".")[2] == name]
    thing = thing_at(f"{module}.{name}")
    assert thing is not None
    assert [full_name for full_name in same if thing_at(full_name) is thing]


@pytest.mark.parametrize("full_name", ENTRIES)
def test_an_entry_is_a_public_name(full_name):
    """What a page describes can be imported from where the page says."""
    module, _, name = full_name.rpartition(".")
    assert name in MODULES[module]


@pytest.mark.parametrize("full_name", ENTRIES)
def test_every_public_member_is_in_the_entry_of_its_class(full_name):
    """Methods and properties are there; those that every sink has are described once, with ``Sink``."""
    if full_name.startswith("bgtasks.events"):
        need("msgspec")
    kind = thing_at(full_name)
    if not inspect.isclass(kind):
        return
    entry = ENTRIES[full_name]
    described = set(entry.members)
    if entry.has_all_members:
        described |= set(vars(kind))
    if entry.has_inherited_members:
        described |= set(dir(kind))
    if "events.sinks" in full_name:
        from bgtasks.events import Sink

        described |= set(dir(Sink))
    if "integrations" in full_name:
        # What a framework's class has is the framework's to describe.
        described |= {name for base in kind.__mro__[1:] for name in vars(base)}
    # Described as the arguments of its constructor.
    described |= set(getattr(kind, "__struct_fields__", ()))
    ours = {name for base in kind.__mro__ if base.__module__.startswith("bgtasks") for name in vars(base)}
    assert {name for name in ours - described if not name.startswith("_")} == set()
