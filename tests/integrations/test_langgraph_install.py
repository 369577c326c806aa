"""Install and uninstall: before and after LangGraph's import, completely, with named errors if they cannot work."""

import subprocess
import sys
import textwrap

import pytest
from requirements import need

LOOK = """
import sys

def held():
    '''Return the globals of LangGraph's modules: (module, name) -> object.'''
    return {
        (module_name, name): value
        for module_name, module in list(sys.modules.items())
        if module_name.partition(".")[0] == "langgraph" and module is not None
        for name, value in vars(module).items()
    }

def holders(classes):
    return {key for key, value in held().items() for one in classes if value is one}

from bgtasks.integrations import langgraph as drop_in
REPLACEMENTS = (drop_in.BackgroundExecutor, drop_in.AsyncBackgroundExecutor)
EXPECTED = {
    (module, name)
    for module in ("langgraph.pregel._executor", "langgraph.pregel._loop")
    for name in ("BackgroundExecutor", "AsyncBackgroundExecutor")
}
"""


def run(code):
    """Run a program in its own interpreter, with warnings as errors; it must succeed."""
    program = LOOK + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def _langgraph():
    """Skip where LangGraph is not installed."""
    need("langgraph.pregel")


def test_importing_the_integration_imports_no_langgraph():
    """The module can be imported without LangGraph; uninstall then does nothing."""
    run("drop_in.uninstall(); assert 'langgraph' not in sys.modules")


@pytest.mark.usefixtures("_langgraph")
def test_install_before_langgraph_is_imported():
    """LangGraph imported afterwards has our executors everywhere."""
    run("""
    drop_in.install()
    import langgraph.graph, langgraph.pregel.remote, langgraph.func, langgraph.prebuilt
    assert holders(REPLACEMENTS) == EXPECTED
    drop_in.uninstall()
    assert holders(REPLACEMENTS) == set()
    assert all(held()[key].__module__ == "langgraph.pregel._executor" for key in EXPECTED)
    """)


@pytest.mark.usefixtures("_langgraph")
@pytest.mark.parametrize("times", [1, 2])
def test_install_after_langgraph_was_imported(times):
    """Our executors replace the originals everywhere; one uninstall restores all, after any number of installs."""
    run(f"""
    import langgraph.graph, langgraph.pregel.remote, langgraph.func, langgraph.prebuilt
    import langgraph.pregel._executor as module
    originals = (module.BackgroundExecutor, module.AsyncBackgroundExecutor)
    before = held()
    assert holders(originals) == EXPECTED
    for _ in range({times}):
        drop_in.install()
        assert holders(originals) == set()
        assert holders(REPLACEMENTS) == EXPECTED
    drop_in.uninstall()
    after = held()
    assert before.keys() == after.keys()
    assert all(before[key] is after[key] for key in before)
    drop_in.uninstall()
    assert holders(originals) == EXPECTED
    """)


@pytest.mark.usefixtures("_langgraph")
def test_nothing_else_holds_the_originals():
    """No default, closure or container of LangGraph holds the originals: replacing globals is enough."""
    run("""
    import gc
    import langgraph.graph, langgraph.pregel.remote, langgraph.func, langgraph.prebuilt
    import langgraph.pregel._executor as module
    originals = (module.BackgroundExecutor, module.AsyncBackgroundExecutor)
    drop_in.install()
    gc.collect()
    import types
    for original in originals:
        for referrer in gc.get_referrers(original):
            # The class's own descriptors, methods and order of bases; what install keeps; this program.
            own = getattr(referrer, "__objclass__", None) is original or referrer == original.__mro__
            known = own or any(referrer is holder for holder in (originals, drop_in._load().originals, globals()))
            assert known, referrer
    """)


@pytest.mark.usefixtures("_langgraph")
def test_uninstall_restores_modules_that_were_loaded_while_installed():
    """The names that a LangGraph module imported meanwhile become the originals."""
    run("""
    import types
    drop_in.install()
    late = sys.modules["langgraph.late"] = types.ModuleType("langgraph.late")
    exec("from langgraph.pregel._executor import AsyncBackgroundExecutor as executor", vars(late))
    assert late.executor is drop_in.AsyncBackgroundExecutor
    drop_in.uninstall()
    assert late.executor.__module__ == "langgraph.pregel._executor"
    """)


@pytest.mark.usefixtures("_langgraph")
def test_names_imported_by_the_program_stay():
    """Only modules of LangGraph are changed; a program keeps the originals that it imported by name."""
    run("""
    from langgraph.pregel._executor import BackgroundExecutor
    drop_in.install()
    assert BackgroundExecutor.__module__ == "langgraph.pregel._executor"
    """)


def test_without_langgraph():
    """Install and both classes say what to install, and the program can continue."""
    run("""
    import bgtasks.errors
    sys.modules["langgraph"] = None
    for call in (drop_in.install, lambda: drop_in.BackgroundExecutor({}), lambda: drop_in.AsyncBackgroundExecutor({})):
        try:
            call()
        except bgtasks.errors.MissingExtraError as error:
            assert 'pip install "bgtasks-registry[langgraph]"' in str(error)
        else:
            raise AssertionError(call)
    drop_in.uninstall()
    """)


@pytest.mark.usefixtures("_langgraph")
@pytest.mark.parametrize("manager", ["'manager'", "0", "drop_in"])
def test_install_refuses_a_wrong_manager(manager):
    """Install itself raises, not the first graph, and changes nothing."""
    run(f"""
    import bgtasks.errors
    import langgraph.pregel
    before = held()
    try:
        drop_in.install(manager={manager})
    except bgtasks.errors.InvalidOptionError as error:
        assert "manager must be a BackgroundTaskManager, or None" in str(error)
    else:
        raise AssertionError
    assert held() == before
    """)


@pytest.mark.usefixtures("_langgraph")
@pytest.mark.parametrize(
    "change",
    [
        "del langgraph.pregel._executor.AsyncBackgroundExecutor",
        "del langgraph.pregel._runner.SKIP_RERAISE_SET",
        "sys.modules['langgraph.pregel._executor'] = None",
    ],
)
def test_an_unknown_release_of_langgraph_is_refused(change):
    """A release whose executors are elsewhere is named in the error, and not changed."""
    run(f"""
    import bgtasks.errors
    import langgraph.pregel
    {change}
    before = held()
    try:
        drop_in.install()
    except bgtasks.errors.MissingExtraError as error:
        assert 'from 1.0 on' in str(error)
        assert 'pip install "bgtasks-registry[langgraph]"' in str(error)
    else:
        raise AssertionError
    assert held() == before
    """)


@pytest.mark.usefixtures("_langgraph")
def test_a_broken_langgraph_says_what_it_misses():
    """If a package that LangGraph needs is missing, the error is LangGraph's own."""
    run("""
    sys.modules["langchain_core"] = None
    try:
        drop_in.install()
    except ModuleNotFoundError as error:
        assert error.name.partition(".")[0] == "langchain_core", error.name
    else:
        raise AssertionError
    """)
