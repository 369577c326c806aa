"""The layers of ARCHITECTURE.md: every file stands in one, and imports only from those below its own."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from paths import PACKAGE, ROOT

TABLE = re.compile(r"^<!-- layers: src/(\S+) -->\n\n((?:\|.*\n)+)", re.MULTILINE)


def tables():
    """Return the tables: the folder of each, with the names of its files and folders, layer by layer from the top."""
    found = {}
    for folder, table in TABLE.findall((ROOT / "ARCHITECTURE.md").read_text()):
        rows = [row.split("|")[1:-1] for row in table.splitlines()[2:]]
        column = [cell.strip() for cell in table.splitlines()[0].split("|")[1:-1]].index("files")
        found[PACKAGE.parent / folder] = [set(re.findall(r"`([\w./]+)`", row[column])) for row in rows]
    return found


LAYERS = tables()


def room_of(path, folder):
    """Return the name under which a file stands in the table of a folder: its own, or that of a folder in there."""
    parts = path.relative_to(folder).parts
    return parts[0] if len(parts) == 1 else f"{parts[0]}/"


def files_of(folder):
    """Return the sources in a folder and below it."""
    return [path for ending in ("py", "pyx") for path in folder.rglob(f"*.{ending}")]


def module_of(path):
    """Return the name of a file as a module, with dots."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """Return the modules of the package that a file imports anywhere in it, for the type checker included."""
    modules = {module_of(file) for file in files_of(PACKAGE)}
    found = set()
    if path.suffix == ".pyx":
        names = re.findall(r"^\s*from (bgtasks[\w.]*) c?import \(?([\w, ]+)", path.read_text(), re.MULTILINE)
    else:
        names = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "bgtasks":
                names.append((node.module, ",".join(alias.name for alias in node.names)))
            elif isinstance(node, ast.Import):
                names += [(alias.name, "") for alias in node.names if alias.name.partition(".")[0] == "bgtasks"]
    for module, imported in names:
        # ``from bgtasks import errors`` imports a module, ``from bgtasks import run`` a name out of one.
        parts = {f"{module}.{name.strip()}" for name in imported.split(",")} & modules
        found |= parts or {module}
    return found


def path_of(module):
    """Return the file of a module."""
    path = PACKAGE.parent / Path(*module.split("."))
    candidates = (path / "__init__.py", path.with_suffix(".pyx"), path.with_suffix(".py"))
    return next(candidate for candidate in candidates if candidate.exists())


def test_every_package_has_a_table():
    """No folder is left out."""
    assert set(LAYERS) == {path.parent for path in PACKAGE.rglob("__init__.py")}


@pytest.mark.parametrize("folder", LAYERS, ids=lambda folder: folder.name)
def test_every_file_stands_in_one_layer(folder):
    """The table names what is there, once."""
    names = [name for layer in LAYERS[folder] for name in layer]
    assert sorted(names) == sorted({room_of(path, folder) for path in [*files_of(folder), *folder.glob("*.h")]})


@pytest.mark.parametrize("folder", LAYERS, ids=lambda folder: folder.name)
def test_a_file_imports_only_from_layers_below(folder):
    """Neither upwards nor sideways, and not for the type checker either."""
    wrong = []
    for number, layer in enumerate(LAYERS[folder]):
        below = set().union(*LAYERS[folder][number + 1 :])
        for path in files_of(folder):
            room = room_of(path, folder)
            if room not in layer:
                continue
            for module in sorted(imports_of(path)):
                target = path_of(module)
                if target.is_relative_to(folder) and room_of(target, folder) not in below | {room}:
                    wrong.append(f"{path.relative_to(PACKAGE)} -> {module}")
    assert wrong == []
