"""Which registry runs, and which modules an import of the package loads."""

import os
import shutil
import subprocess
import sys

import pytest
from paths import PACKAGE

import bgtasks


def run(code, path=None, **environment):
    """Run a program in an interpreter of its own; return the completed process."""
    own = ("BGTASKS_IMPLEMENTATION", "BGTASKS_WRAPPER")
    variables = {key: value for key, value in os.environ.items() if key not in own}
    if path is not None:
        variables["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**variables, **environment},
    )


@pytest.fixture
def copy_without_extension(tmp_path):
    """Give a folder with the package, without its compiled registry."""
    shutil.copytree(PACKAGE, tmp_path / "bgtasks", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return tmp_path


SHOW = "import bgtasks; print(bgtasks.IMPLEMENTATION)"


def test_auto_selects_the_compiled_registry(pytestconfig):
    """The extension runs if it was built."""
    if pytestconfig.option.twin == "python":
        return
    assert run(SHOW).stdout == "cython\n"
    assert run(SHOW, BGTASKS_IMPLEMENTATION="auto").stdout == "cython\n"
    assert run(SHOW, BGTASKS_IMPLEMENTATION="cython").stdout == "cython\n"


def test_python_selects_the_twin():
    """BGTASKS_IMPLEMENTATION=python selects the twin."""
    assert run(SHOW, BGTASKS_IMPLEMENTATION="python").stdout == "python\n"


@pytest.mark.parametrize(("has_gil", "chosen"), [(False, "python"), (True, "cython")])
def test_without_the_gil_auto_selects_the_twin(pytestconfig, has_gil, chosen):
    """Importing bgtasks enables the GIL of a free-threaded interpreter only if the extension is demanded."""
    if pytestconfig.option.twin == "python":
        return
    code = f"import sys; sys._is_gil_enabled = lambda: {has_gil}; {SHOW}"
    assert run(code).stdout == f"{chosen}\n"
    assert run(code, BGTASKS_IMPLEMENTATION="cython").stdout == "cython\n"


@pytest.mark.skipif(sys.version_info < (3, 14), reason="from Python 3.14 on")
@pytest.mark.parametrize("choice", ["auto", "cython"])
def test_in_a_subinterpreter_auto_selects_the_twin(choice):
    """The extension cannot be loaded in a subinterpreter; importing bgtasks works there."""
    code = f"from concurrent import interpreters; interpreters.create().exec({SHOW!r})"
    assert run(code, BGTASKS_IMPLEMENTATION=choice).stdout == "python\n"


@pytest.mark.parametrize("value", ["0", "", "Cython", "yes"])
def test_an_unknown_value_is_an_error_that_lists_the_values(value):
    """A value is one of three or an error, not true or false."""
    done = run(SHOW, BGTASKS_IMPLEMENTATION=value)
    assert done.returncode == 1
    assert "auto, cython, python" in done.stderr


def test_without_the_extension_auto_runs_the_twin_and_cython_is_an_error(copy_without_extension):
    """If the compiled registry is demanded and missing, the twin does not run silently."""
    assert run(SHOW, copy_without_extension).stdout == "python\n"
    done = run(SHOW, copy_without_extension, BGTASKS_IMPLEMENTATION="cython")
    assert "BGTASKS_BUILD=require" in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize("choice", ["auto", "cython"])
def test_an_extension_that_does_not_load_is_an_error(copy_without_extension, choice):
    """A broken extension is an error; the twin does not run silently."""
    from importlib.machinery import EXTENSION_SUFFIXES

    (copy_without_extension / "bgtasks" / f"_registry{EXTENSION_SUFFIXES[0]}").write_bytes(b"no extension")
    code = f"import sys; sys._is_gil_enabled = lambda: True; {SHOW}"
    done = run(code, copy_without_extension, BGTASKS_IMPLEMENTATION=choice)
    assert done.returncode == 1
    assert "ImportError" in done.stderr


MODULES = sorted(
    ".".join(("bgtasks", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in PACKAGE.rglob("*.py")
)
NEED_EXTRAS = ("bgtasks.injection", "bgtasks.integrations.", "bgtasks.events.", "bgtasks.watch.")


@pytest.mark.parametrize("name", [name.removesuffix(".__init__") for name in MODULES])
def test_each_module_imports_alone(name):
    """Every module can be imported first, with warnings as errors, or names the extra that is missing."""
    done = run(f"import {name}")
    if done.returncode and name.startswith(NEED_EXTRAS):
        last = done.stderr.splitlines()[-1]
        if name.rpartition(".")[2].startswith("_") and last.startswith("ModuleNotFoundError"):
            # Parts that an integration imports after it found its framework.
            return
        assert last.startswith("bgtasks.errors.MissingExtraError"), done.stderr
        assert 'pip install "bgtasks-registry[' in done.stderr
        return
    assert done.returncode == 0, done.stderr


def test_importing_loads_no_third_party_module():
    """The core imports nothing but the standard library."""
    done = run("import sys; import bgtasks; print('\\n'.join(sys.modules))")
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    strangers = loaded - set(sys.stdlib_module_names) - {"bgtasks", "__main__"}
    # Modules that site starts, Cython's own, and CPython's list of modules that a build left out.
    known = ("__editable__", "_cython_", "cython_", "_distutils", "sitecustomize", "_missing_stdlib_info")
    assert not {name for name in strangers if not name.startswith(known)}
    # Nor modules for one framework or one extra.
    assert not {name for name in done.stdout.split() if name.startswith(("bgtasks.integrations", "bgtasks.injection"))}


def module_names():
    """Return the names of the package's modules and subpackages."""
    return {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}


def test_exported_names_exist_and_are_sorted():
    """Every name of __all__ exists, in order, and everything public is in it."""
    assert bgtasks.__all__ == sorted(bgtasks.__all__, key=lambda name: (not name.isupper(), name))
    for name in bgtasks.__all__:
        assert getattr(bgtasks, name)
    # pytest rewrites the asserts of every distribution with a plugin, and leaves names like "@pytest_ar" there.
    public = {name for name in vars(bgtasks) if name[0].isalpha()} - module_names()
    assert public == set(bgtasks.__all__)


STEPS = """
import asyncio, sys
from bgtasks import BackgroundTaskManager
from bgtasks._task import _get_wrapper

def note(seen):
    seen.append(type(_get_wrapper(asyncio.current_task())).__name__)

async def work(seen):
    await asyncio.sleep(0)
    note(seen)

async def main():
    manager = BackgroundTaskManager()
    seen = []
    await manager.create_task(work(seen))
    manager.fire(work(seen))
    await manager.wait_for_all()
    print(*seen)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("choice", "steps"),
    [
        (None, "Record Record"),
        ("record", "Record Record"),
        ("native", "coroutine coroutine"),
    ],
)
@pytest.mark.skipif(sys.version_info < (3, 12), reason="no eager tasks, so fire() does as create_task() does")
def test_the_variable_chooses_what_tasks_step(pytestconfig, choice, steps):
    """BGTASKS_WRAPPER says what tasks of create_task and of fire step, in this order; the Python twin has no choice."""
    variables = {} if choice is None else {"BGTASKS_WRAPPER": choice}
    if pytestconfig.option.twin != "python":
        done = run(STEPS, BGTASKS_IMPLEMENTATION="cython", **variables)
        assert (done.stdout.strip(), done.stderr) == (steps, "")
    done = run(STEPS, BGTASKS_IMPLEMENTATION="python", **variables)
    assert (done.stdout.strip(), done.stderr) == ("coroutine coroutine", "")


@pytest.mark.parametrize("implementation", ["auto", "python"])
@pytest.mark.parametrize("value", ["", "records", "Native"])
def test_an_unknown_wrapper_is_an_error_that_lists_the_values(implementation, value):
    """The variable is checked also where it changes nothing."""
    done = run(SHOW, BGTASKS_WRAPPER=value, BGTASKS_IMPLEMENTATION=implementation)
    assert done.returncode == 1
    assert f"BGTASKS_WRAPPER={value!r} is unknown; it takes one of: record, native" in done.stderr
