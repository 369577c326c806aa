"""No function is longer than a screen, save where a comment above it says why."""

from __future__ import annotations

import ast

from paths import PACKAGE

MOST_LINES = 60


def _functions():
    """Yield each function of the package: where it stands, the line above it, its lines without the docstring."""
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                length = node.end_lineno - first + 1
                if ast.get_docstring(node):
                    length -= node.body[0].end_lineno - node.body[0].lineno + 1
                yield f"{path.relative_to(PACKAGE)}:{node.name}", source.splitlines()[first - 2].strip(), length


def test_long_functions_say_why():
    """Ruff counts the branches."""
    functions = list(_functions())
    assert functions
    too_long = {
        where: length for where, above, length in functions if length > MOST_LINES and not above.startswith("#")
    }
    assert too_long == {}
