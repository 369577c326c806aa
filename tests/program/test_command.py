"""``python -m bgtasks`` and the command ``bgtasks``: what they print, and where it comes from."""

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from paths import PACKAGE, ROOT

import bgtasks

INSTALLED = "bgtasks-registry"


def run(*arguments, path=None, options=(), **environment):
    """Run ``python -m bgtasks`` in an interpreter of its own; return what it printed, as title -> text."""
    variables = {key: value for key, value in os.environ.items() if key != "BGTASKS_IMPLEMENTATION"}
    variables["PYTHONPATH"] = str(PACKAGE.parent if path is None else path)
    done = subprocess.run(
        [sys.executable, "-W", "error", *options, "-m", "bgtasks", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**variables, **environment},
    )
    assert (done.returncode, done.stderr) == (0, "")
    # The titles are the first column.
    return {line[:13].strip(): line[13:].strip() for line in done.stdout.splitlines()}


def test_it_names_the_version_and_the_place():
    """The first things that a report of a bug needs."""
    lines = run()
    assert lines["bgtasks"] == f"{bgtasks.__version__}, {PACKAGE}"
    assert sys.implementation.name in lines["Python"].lower()
    assert "GIL" in lines["Python"]


def test_version_alone():
    """As with most commands."""
    done = subprocess.run(
        [sys.executable, "-m", "bgtasks", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    assert done.stdout == f"bgtasks {bgtasks.__version__}\n"


def test_it_says_which_twins_run(pytestconfig):
    """Compiled where that was built."""
    if pytestconfig.option.twin == "python":
        return
    lines = run()
    assert (lines["registry"], lines["event queue"]) == ("compiled", "compiled")


def test_it_says_that_the_variable_asks_for_the_twin():
    """The reason is the variable."""
    lines = run(BGTASKS_IMPLEMENTATION="python")
    assert lines["registry"] == "Python, because BGTASKS_IMPLEMENTATION=python asks for it"


def test_it_says_that_nothing_was_built(tmp_path):
    """The reason is the missing extension, with what to do."""
    shutil.copytree(PACKAGE, tmp_path / "bgtasks", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    lines = run(path=tmp_path)
    assert lines["registry"].startswith("Python, because the compiled one was not built")
    assert "BGTASKS_BUILD=require" in lines["event queue"]


def test_it_says_that_there_is_no_gil(tmp_path):
    """The compiled twins rely on the GIL."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys._is_gil_enabled = lambda: False\n")
    lines = run(path=os.pathsep.join([str(tmp_path), str(PACKAGE.parent)]))
    assert "without the GIL" in lines["registry"]
    assert "without the GIL" in lines["Python"]


def test_it_names_the_loops(tmp_path):
    """The one that ``run`` takes is marked; a uvloop that does not load is no end of the command."""
    try:
        version = metadata.version("uvloop")
    except metadata.PackageNotFoundError:
        assert run()["event loops"] == "asyncio (bgtasks.run takes it); uvloop not installed"
    else:
        assert run()["event loops"] == f"uvloop {version} (bgtasks.run takes it), asyncio"
    (tmp_path / "uvloop.py").write_text("raise ImportError('no libuv')\n")
    lines = run(path=os.pathsep.join([str(tmp_path), str(PACKAGE.parent)]))
    assert lines["event loops"] == "asyncio (bgtasks.run takes it); uvloop does not load: no libuv"


@pytest.fixture
def distribution(tmp_path):
    """Give a function that installs metadata with some requirements, in front of the real one; it returns the path."""

    def install(*requirements):
        folder = tmp_path / "bgtasks_registry-9.9.dist-info"
        folder.mkdir()
        lines = "".join(f"Requires-Dist: {requirement}\n" for requirement in requirements)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {INSTALLED}\nVersion: 9.9\n{lines}")
        return os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])

    return install


def test_it_names_the_extras_and_what_is_missing(distribution):
    """An installed package with its version, a missing one with the command; an extra of extras is left out."""
    lines = run(
        path=distribution(
            'pytest>=8; extra == "test"',
            'no-such-package>=2; extra == "missing"',
            'no-such-package>=2; python_version >= "3.99" and extra == "later"',
            f'{INSTALLED}[test]; extra == "both"',
            'pytest>=8; extra == "both"',
            f'{INSTALLED}[test,missing]; extra == "all"',
        )
    )
    assert lines["[test]"] == lines["[both]"] == f"pytest {metadata.version('pytest')}"
    assert lines["[missing]"] == f'no-such-package not installed: pip install "{INSTALLED}[missing]"'
    assert '(where python_version >= "3.99") not installed' in lines["[later]"]
    assert "[all]" not in lines


def test_it_works_where_no_distribution_is_installed(tmp_path):
    """In a copy of the sources, the extras cannot be known."""
    shutil.copytree(PACKAGE, tmp_path / "bgtasks", ignore=shutil.ignore_patterns("__pycache__"))
    lines = run(path=tmp_path, options=["-S", "-B"])
    assert "is not installed" in lines["extras"]


def test_the_command_is_the_same():
    """What installers make the script from names the same function."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["bgtasks"].partition(":")
    assert getattr(importlib.import_module(module), name) is importlib.import_module("bgtasks.__main__").main
