"""Install and uninstall: in any order with LangGraph's import, exactly, with named errors where they cannot work."""

import subprocess
import sys
import textwrap

import pytest
from requirements import need

LOOK = """
import sys

def held():
    '''Return what the modules of LangGraph have as globals: module and name -> object.'''
    return {
        (module_name, name): value
        for module_name, module in list(sys.modules.items())
        if module_name.partition(".")[0] == "langgraph" and module is not None
        for name, value in vars(module).items()
    }

def holders(classes):
    return {place for place, value in held().items() for one in classes if value is one}

from bgtasks.integrations import langgraph as ours
OURS = (ours.BackgroundExecutor, ours.AsyncBackgroundExecutor)
PLACES = {
    (module, name)
    for module in ("langgraph.pregel._executor", "langgraph.pregel._loop")
    for name in ("BackgroundExecutor", "AsyncBackgroundExecutor")
}
"""


def run(code):
    """Run a program in an interpreter of its own, with warnings as errors; it has to end well."""
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
    """The module can be imported without LangGraph, and uninstall has nothing to do then."""
    run("ours.uninstall(); assert 'langgraph' not in sys.modules")


@pytest.mark.usefixtures("_langgraph")
def test_install_before_langgraph_is_imported():
    """LangGraph imported afterwards has ours in every place."""
    run("""
    ours.install()
    import langgraph.graph, langgraph.pregel.remote, langgraph.func, langgraph.prebuilt
    assert holders(OURS) == PLACES
    ours.uninstall()
    assert holders(OURS) == set()
    assert all(held()[place].__module__ == "langgraph.pregel._executor" for place in PLACES)
    """)


@pytest.mark.usefixtures("_langgraph")
@pytest.mark.parametrize("times", [1, 2])
def test_install_after_langgraph_was_imported(times):
    """Ours are in every place where the originals were; uninstall puts all back, however often it was installed."""
    run(f"""
    import langgraph.graph, langgraph.pregel.remote, langgraph.func, langgraph.prebuilt
    import langgraph.pregel._executor as module
    originals = (module.BackgroundExecutor, module.AsyncBackgroundExecutor)
    before = held()
    assert holders(originals) == PLACES
    for _ in range({times}):
        ours.install()
        assert holders(originals) == set()
        assert holders(OURS) == PLACES
    ours.uninstall()
    after = held()
    assert before.keys() == after.keys()
    assert all(before[place] is after[place] for place in before)
    ours.uninstall()
    assert holders(originals) == PLACES
    """)


@pytest.mark.usefixtures("_langgraph")
def test_nothing_else_holds_the_originals():
    """No default, closure or container of LangGraph keeps the originals: replacing globals is enough."""
    run("""
    import gc
    import langgraph.graph, langgraph.pregel.remote, langgraph.func, langgraph.prebuilt
    import langgraph.pregel._executor as module
    originals = (module.BackgroundExecutor, module.AsyncBackgroundExecutor)
    ours.install()
    gc.collect()
    import types
    for original in originals:
        for referrer in gc.get_referrers(original):
            # The class's own descriptors, methods and order of bases; what install keeps; this program.
            own = getattr(referrer, "__objclass__", None) is original or referrer == original.__mro__
            assert own or referrer is originals or referrer is ours._load().originals or referrer is globals(), referrer
    """)


@pytest.mark.usefixtures("_langgraph")
def test_modules_loaded_while_installed_are_given_back():
    """What a module of LangGraph imports by name while ours are in place becomes the original by uninstall."""
    run("""
    import types
    ours.install()
    late = sys.modules["langgraph.late"] = types.ModuleType("langgraph.late")
    exec("from langgraph.pregel._executor import AsyncBackgroundExecutor as executor", vars(late))
    assert late.executor is ours.AsyncBackgroundExecutor
    ours.uninstall()
    assert late.executor.__module__ == "langgraph.pregel._executor"
    """)


@pytest.mark.usefixtures("_langgraph")
def test_other_programs_keep_what_they_imported():
    """Only modules of LangGraph are changed: a program that imported the originals by name has them still."""
    run("""
    from langgraph.pregel._executor import BackgroundExecutor
    ours.install()
    assert BackgroundExecutor.__module__ == "langgraph.pregel._executor"
    """)


def test_without_langgraph():
    """Install and both classes say what to install, and the program can go on."""
    run("""
    import bgtasks.errors
    sys.modules["langgraph"] = None
    for call in (ours.install, lambda: ours.BackgroundExecutor({}), lambda: ours.AsyncBackgroundExecutor({})):
        try:
            call()
        except bgtasks.errors.MissingExtraError as error:
            assert 'pip install "bgtasks-registry[langgraph]"' in str(error)
        else:
            raise AssertionError(call)
    ours.uninstall()
    """)


@pytest.mark.usefixtures("_langgraph")
@pytest.mark.parametrize("manager", ["'manager'", "0", "ours"])
def test_what_is_no_manager_is_refused(manager):
    """Not the first graph but install says that it was given something else, and changes nothing."""
    run(f"""
    import bgtasks.errors
    import langgraph.pregel
    before = held()
    try:
        ours.install(manager={manager})
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
def test_a_release_of_langgraph_that_differs(change):
    """A release that keeps its executors elsewhere is refused by name, and left as it is."""
    run(f"""
    import bgtasks.errors
    import langgraph.pregel
    {change}
    before = held()
    try:
        ours.install()
    except bgtasks.errors.MissingExtraError as error:
        assert 'from 1.0 on' in str(error)
        assert 'pip install "bgtasks-registry[langgraph]"' in str(error)
    else:
        raise AssertionError
    assert held() == before
    """)


@pytest.mark.usefixtures("_langgraph")
def test_a_broken_langgraph_says_what_it_misses():
    """Where LangGraph is there and misses a package of its own, its own error is the better one."""
    run("""
    sys.modules["langchain_core"] = None
    try:
        ours.install()
    except ModuleNotFoundError as error:
        assert error.name.partition(".")[0] == "langchain_core", error.name
    else:
        raise AssertionError
    """)
