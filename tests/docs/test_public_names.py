"""What is public says so, has types that are public, and is tried by the files of ``tests/typed``."""

from __future__ import annotations

import ast
import builtins
import functools
import re

import pytest
from paths import PACKAGE, ROOT

# What a manager is made of; it is named as the chooser of its twins. Users get ``IMPLEMENTATION`` from ``bgtasks``.
INSIDE = {"bgtasks.registry"}
# Names that a class has for Python's own protocols and that are called with types.
PROTOCOLS = {"__init__", "__call__", "__enter__", "__aenter__"}


@functools.cache
def tree_of(module):
    """Return the syntax tree of a module of the package, None if it is none."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.exists():
            return ast.parse(file.read_text())
    return None


def public_modules():
    """Return the names of the modules without an underscore in front, at any level."""
    names = []
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            names.append(".".join(parts))
    return [name for name in names if name not in INSIDE]


def names_of(module):
    """Return the ``__all__`` of a module, None if there is none."""
    for node in tree_of(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return None


def imports_of(module):
    """Return what a module imports from the package: name there -> (module, name)."""
    found = {}
    for node in ast.walk(tree_of(module)):
        # Not from the compiled twins: what they hold is in the others, too.
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "bgtasks" and tree_of(node.module):
            found.update({alias.asname or alias.name: (node.module, alias.name) for alias in node.names})
    return found


def origin_of(module, name):
    """Return where a name of a module is defined: (module, name)."""
    imported = imports_of(module).get(name)
    return (module, name) if imported is None or tree_of(".".join(imported)) else origin_of(*imported)


def public_origins():
    """Return where the public names are defined: (module, name) -> a public module that has it."""
    return {origin_of(module, name): module for module in public_modules() for name in names_of(module) or ()}


PUBLIC = public_origins()


@pytest.mark.parametrize("module", public_modules())
def test_a_public_module_says_which_of_its_names_are_public(module):
    """All but those that hold nothing but other modules."""
    docstring, *others = tree_of(module).body
    assert isinstance(docstring, ast.Expr)
    assert others == [] or names_of(module), module


def test_the_package_says_that_it_has_types():
    """Without this file checkers take everything in an installed package for ``Any``."""
    assert (PACKAGE / "py.typed").is_file()


def used_names(tree):
    """Return what a file uses of the package: (module, name), through ``from`` imports or as attributes of modules."""
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "bgtasks":
            imported.update({alias.asname or alias.name: (node.module, alias.name) for alias in node.names})
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in imported:
            used.add(imported[node.id])
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            used.add((".".join(imported[node.value.id]), node.attr))
    return used


def test_every_public_name_is_tried_by_the_typed_files():
    """A checker reads at least one use of it; an import alone is none."""
    used = set()
    for file in sorted(ROOT.glob("tests/typed/*.py")):
        for module, name in used_names(ast.parse(file.read_text())):
            if tree_of(module):
                used.add(origin_of(module, name))
    assert sorted(PUBLIC.keys() - used) == []


def test_every_typed_file_has_refused_uses_for_both_checkers():
    """An accepted use says little without a refused one beside it."""
    for file in sorted(ROOT.glob("tests/typed/*.py")):
        text = file.read_text()
        assert "# type: ignore[" in text, file
        assert "# pyright: ignore[" in text, file


def annotations_of(node):
    """Yield the annotations that users of a class or a function see."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        yield from (each.annotation for each in arguments if each is not None and each.annotation is not None)
        yield from [node.returns] if node.returns is not None else []
    elif isinstance(node, ast.ClassDef):
        for each in node.body:
            name = getattr(each, "name", "")
            if isinstance(each, ast.AnnAssign) and not ast.unparse(each.target).startswith("_"):
                yield each.annotation
            elif isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef)) and (
                name in PROTOCOLS or not name.startswith("_")
            ):
                yield from annotations_of(each)


def definitions(module, name):
    """Yield the definitions of a name, and for a class those of its bases in the package: (module, node)."""
    for node in tree_of(module).body:
        if getattr(node, "name", None) == name:
            yield module, node
            for base in getattr(node, "bases", ()):
                if isinstance(base, ast.Name):
                    yield from definitions(*origin_of(module, base.id))


def types_in(module, annotation):
    """Yield where the types in an annotation are defined, those of the package."""
    own = {
        getattr(node, "name", None) or ast.unparse(getattr(node, "target", node)): node
        for node in tree_of(module).body
        if isinstance(node, (ast.ClassDef, ast.AnnAssign))
    }
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            origin = origin_of(module, node.id)
            if origin[0] != module or node.id in own:
                yield origin


@pytest.mark.parametrize(("module", "name"), sorted(PUBLIC))
def test_the_types_that_a_public_signature_names_are_public(module, name):
    """Whoever hands an argument or a result on can name its type."""
    hidden = {
        f"{where}.{kind}"
        for at, node in definitions(module, name)
        for annotation in annotations_of(node)
        for where, kind in types_in(at, annotation)
        if (where, kind) not in PUBLIC
    }
    assert hidden == set()


# -- errors ------------------------------------------------------------------------------------------------------------

IMPORTABLE = {*names_of("bgtasks"), *names_of("bgtasks.events")}
# Named on a page as what they are: asyncio's and InjectQ's.
OTHERS = {"CancelledError", "InjectionError"}
DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def test_every_error_can_be_imported_from_its_package():
    """From ``bgtasks`` or, those of events, from ``bgtasks.events``."""
    assert set(names_of("bgtasks.errors")) <= set(names_of("bgtasks"))
    assert set(names_of("bgtasks.events.errors")) <= set(names_of("bgtasks.events"))


def is_importable(error):
    """Return whether readers find an error without being told where."""
    return error in IMPORTABLE or hasattr(builtins, error)


def raised_in(text):
    """Return the names of errors in the section ``Raises`` of a docstring."""
    _, _, section = text.partition("\nRaises:\n")
    return re.findall(r"^    (\w+): ", section.partition("\n\n")[0], re.MULTILINE)


@pytest.mark.parametrize(("module", "name"), sorted(PUBLIC))
def test_every_error_that_a_public_docstring_names_can_be_imported(module, name):
    """What stands under ``Raises`` is Python's, or one of the packages'."""
    nodes = [each for _, node in definitions(module, name) for each in ast.walk(node) if isinstance(each, DOCUMENTED)]
    named = {error for node in nodes for error in raised_in(ast.get_docstring(node) or "")}
    assert {error for error in named if not is_importable(error)} == set()


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")]), ids=lambda page: page.name)
def test_every_error_that_a_page_names_can_be_imported(page):
    """Python's, one of the packages', or said to be another package's."""
    names = set(re.findall(r"`(\w+Error)`", page.read_text())) - OTHERS
    assert {name for name in names if not is_importable(name)} == set()
