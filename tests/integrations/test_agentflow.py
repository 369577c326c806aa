"""Our manager in the place of agentflow's and 10xGraph's, with the real frameworks."""

import asyncio
import gc
import inspect
import logging
import re
import subprocess
import sys
import types
import weakref
from unittest import mock

import pytest
from frameworks import FRAMEWORKS, clean_containers, graph_of, installed_in, needed, question, recording_publisher
from internals import release_closed_loops
from work import after, failing, forever, stubborn, until, value

from bgtasks import BackgroundTaskManager, InvalidOptionError, InvalidTimeoutError
from bgtasks.integrations import _agentflow_graphs, agentflow

# The frameworks and InjectQ use parts of asyncio that newer Pythons deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(injectq|agentflow|tenxgraph)")

THREAD = {"thread_id": "thread"}


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    """Give each framework that is installed, with its own manager, and with a container for the test alone."""
    framework = needed(request.param)
    with clean_containers():
        yield framework


@pytest.fixture
def installed(framework, twin):
    """Give the framework with our manager installed; tasks that are left at the end are an error."""
    with installed_in(framework.name, twin):
        yield framework


@pytest.fixture
def make(installed):
    """Give the class of managers that the framework has now."""
    return installed.module.BackgroundTaskManager


def run(program, *arguments):
    """Run a program in its own interpreter and return its output."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- install and uninstall ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["framework", "bgtasks"])
def test_install_works_before_and_after_the_framework_is_imported(framework, first):
    """In either order every module of the framework and every default has our class."""
    program = """
import sys
from importlib import import_module
name, first = sys.argv[1:]
parts = [name, f"{name}.core.graph", f"{name}.prebuilt.tools.memory", f"{name}.storage.store.long_term_memory"]
if first == "framework":
    for part in parts:
        import_module(part)
from bgtasks.integrations import agentflow
agentflow.install()
for part in parts:
    import_module(part)
replacement = import_module(f"{name}.utils.background_task_manager").BackgroundTaskManager
names = [module for module, content in sorted(sys.modules.items()) if "BackgroundTaskManager" in vars(content)]
own = [module for module in names if module.startswith(name)]
assert all(vars(sys.modules[module])["BackgroundTaskManager"] is replacement for module in own)
print(replacement.__mro__[2], len(names))
publish = import_module(f"{name}.runtime.publisher.publish").publish_event
memory = import_module(f"{name}.prebuilt.tools.memory").memory_tool
for function in (publish, memory):
    defaults = [default for default in function.__defaults__ if "Inject" in str(type(default))]
    assert replacement in [vars(default)["service_type"] for default in defaults]
assert isinstance(import_module(f"{name}.core").StateGraph()._task_manager, replacement)
"""
    printed = run(program, framework.name, first)
    assert printed.startswith("<class 'bgtasks.manager.BackgroundTaskManager'> ")
    assert int(printed.split()[-1]) >= 8


def test_names_that_a_program_imported_before_are_replaced(framework, twin):
    """A module of the program, a default of a function and a default that was resolved all have our class."""
    import injectq

    module = types.ModuleType("program_of_the_test")
    module.Manager = framework.module.BackgroundTaskManager
    default = injectq.Inject[module.Manager]
    assert default.get_task_count() == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        with installed_in(framework.name, twin):
            assert module.Manager is framework.module.BackgroundTaskManager
            graph = framework.core.StateGraph()
            assert type(default.stats.__self__) is module.Manager
            assert default.stats.__self__ is graph._task_manager
        original = framework.module.BackgroundTaskManager
        assert module.Manager is original
        assert original.__module__ == f"{framework.name}.utils.background_task_manager"
        assert not issubclass(original, _agentflow_graphs.BackgroundTaskManager)


def test_a_decorator_of_before_gives_the_same_manager(framework, twin):
    """A class that only a decorator holds still gives the manager of the graph."""
    import injectq

    def decorated(kind):
        @injectq.inject
        def manager_here(task_manager: kind):
            return task_manager

        return manager_here

    manager_here = decorated(framework.module.BackgroundTaskManager)
    with installed_in(framework.name, twin):
        for _ in range(2):
            graph = framework.core.StateGraph()
            assert manager_here() is graph._task_manager
            assert decorated(framework.module.BackgroundTaskManager)() is graph._task_manager


def test_uninstall_restores_everything(framework, twin):
    """Names, defaults, methods and counters are as they were."""

    def state():
        defaults = [vars(default)["service_type"] for default in framework.publish.publish_event.__defaults__]
        graph = framework.core.StateGraph
        counter = framework.metrics.counter("background_task_manager.tasks_created")
        return (
            framework.module.BackgroundTaskManager,
            framework.utils.BackgroundTaskManager,
            defaults,
            graph.__init__,
            graph.compile,
            framework.core.CompiledGraph.override_node,
            type(counter),
        )

    before = state()
    with installed_in(framework.name, twin):
        assert all(was != now for was, now in zip(before, state(), strict=True))
    assert state() == before
    agentflow.uninstall()
    agentflow.uninstall(framework.name)
    assert state() == before


def test_a_second_install_changes_nothing(framework):
    """One uninstall undoes both; another drain_timeout is refused."""
    original = framework.module.BackgroundTaskManager
    agentflow.install(framework.name, drain_timeout=2.0)
    try:
        installed = framework.module.BackgroundTaskManager
        agentflow.install()
        agentflow.install(framework.name, drain_timeout=2.0)
        assert framework.module.BackgroundTaskManager is installed
        with pytest.raises(InvalidOptionError, match=r"drain_timeout=2.0: uninstall\(\) it first"):
            agentflow.install(framework.name, drain_timeout=3.0)
    finally:
        agentflow.uninstall()
    assert framework.module.BackgroundTaskManager is original


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (["langgraph"], {}, "one of tenxgraph, agentflow; got 'langgraph'"),
        ([], {"drain_timeout": -1}, "drain_timeout must be"),
        ([], {"drain_timeout": "long"}, "drain_timeout must be"),
    ],
)
def test_bad_arguments_are_refused(framework, arguments, options, text):
    """The error names the argument and its valid values; nothing is installed."""
    with pytest.raises(InvalidOptionError, match=text):
        agentflow.install(*arguments, **options)
    with pytest.raises(InvalidOptionError, match="framework must be one of"):
        agentflow.uninstall("langgraph")
    assert not agentflow._installed


@pytest.mark.parametrize("arguments", ["", "'agentflow'", "'tenxgraph'"])
def test_without_the_framework_the_error_says_what_to_install(arguments):
    """The error has the command that installs the missing extra."""
    program = f"""
import sys
sys.modules["agentflow"] = sys.modules["tenxgraph"] = None
from bgtasks.integrations import agentflow
try:
    agentflow.install({arguments})
except ImportError as error:
    print(type(error).__name__, error)
"""
    printed = run(program)
    extra = arguments.strip("'") or "agentflow"
    assert printed.startswith("MissingExtraError")
    assert f'pip install "bgtasks-registry[{extra}]"' in printed


def test_two_frameworks_at_once_each_get_a_class_of_their_own():
    """Both are replaced; each keeps its own logger and counters."""
    first, second = (needed(name) for name in FRAMEWORKS)
    agentflow.install()
    try:
        classes = [framework.module.BackgroundTaskManager for framework in (first, second)]
        assert classes[0] is not classes[1]
        assert all(issubclass(kind, BackgroundTaskManager) for kind in classes)
        assert [kind()._logger.name for kind in classes] == ["agentflow.utils", "tenxgraph.utils"]
    finally:
        agentflow.uninstall()


def test_the_old_name_means_the_framework_that_it_points_to():
    """If 10xGraph provides the name agentflow, installing and uninstalling by that name works on 10xGraph."""
    needed("tenxgraph")
    program = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
import agentflow.utils
import tenxgraph.utils
from bgtasks.integrations import agentflow as integration
original = id(tenxgraph.utils.BackgroundTaskManager)  # a class in a global would be replaced, too
integration.install()
integration.install("agentflow")
replacement = id(tenxgraph.utils.BackgroundTaskManager)
same = agentflow.utils is tenxgraph.utils
integration.uninstall("agentflow")
print(same, replacement != original, id(tenxgraph.utils.BackgroundTaskManager) == original)
"""
    printed = run(program).split()
    assert printed[1] == "True"
    assert printed[0] == printed[2]


def test_a_program_that_ends_with_live_graphs_prints_nothing(framework):
    """Managers that are collected during the interpreter's shutdown print nothing."""
    program = """
import asyncio, sys
from importlib import import_module
from bgtasks.integrations import agentflow
agentflow.install()
graph = import_module(f"{sys.argv[1]}.core").StateGraph()

async def main():
    graph._task_manager.create_task(asyncio.sleep(60))

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", program, framework.name],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""


# -- graphs ---------------------------------------------------------------------------------------------------------


def nodes_with_managers(framework, seen):
    """Return nodes that ask for a manager in every way; they append it to ``seen``."""
    from injectq import Inject

    Manager = framework.module.BackgroundTaskManager  # noqa: N806

    async def bare(state, config, task_manager: Manager):
        seen.append(task_manager)
        return state

    async def quoted(state, config, task_manager: "unknown.BackgroundTaskManager"):  # noqa: F821
        seen.append(task_manager)
        return state

    async def optional(state, *, background: Manager | None):
        seen.append(background)
        return state

    async def default(state, config, task_manager: Manager = Inject[Manager]):
        seen.append(task_manager)
        return state

    async def of_bgtasks(anything, task_manager: _agentflow_graphs.BackgroundTaskManager):
        seen.append(task_manager)
        return anything

    def in_a_thread(state, config, task_manager: Manager):
        seen.append(task_manager)
        return state

    return bare, quoted, optional, default, of_bgtasks, in_a_thread


@pytest.mark.parametrize("how", ["ainvoke", "astream"])
async def test_every_node_gets_the_manager_of_its_graph(installed, how):
    """Bare, quoted, optional, keyword-only, as a default or in a sync function: each parameter gets it."""
    seen = []
    apps = [graph_of(installed, *nodes_with_managers(installed, seen)).compile() for _ in range(2)]
    for app in [*apps, apps[0]]:
        if how == "ainvoke":
            await app.ainvoke(question(installed), {"thread_id": f"thread {len(seen)}"})
        else:
            async for _ in app.astream(question(installed), {"thread_id": f"thread {len(seen)}"}):
                pass
        assert seen[-6:] == [app._task_manager] * 6
    for app in apps:
        assert (await app.aclose())["background_tasks"]["status"] == "completed"


async def test_a_node_that_replaces_another_gets_the_manager_too(installed):
    """It is the same after ``override_node`` of a compiled graph."""
    seen = []
    bare, *_, in_a_thread = nodes_with_managers(installed, seen)
    app = graph_of(installed, bare).compile()
    app.override_node("bare", in_a_thread)
    await app.ainvoke(question(installed), THREAD)
    assert seen == [app._task_manager]
    await app.aclose()


async def test_nodes_without_a_manager_are_called_as_before(installed):
    """State and config are passed by name, a single parameter is the state, a missing one the framework's error."""
    seen = []

    async def both(state, config):
        seen.append(config["thread_id"])
        return state

    async def single(anything):
        seen.append(type(anything))
        return anything

    app = graph_of(installed, both, single).compile()
    await app.ainvoke(question(installed), THREAD)
    assert seen == ["thread", installed.state.AgentState]

    async def too_many(state, price: int):
        return state

    app = graph_of(installed, too_many).compile()
    with pytest.raises(Exception, match="Missing required parameter 'price'"):
        await app.ainvoke(question(installed), THREAD | {"thread_id": "other"})


def test_each_sync_invoke_runs_a_loop_of_its_own(installed):
    """One manager serves many loops: tasks that end in time are completed, the others end with their loop."""
    Manager = installed.module.BackgroundTaskManager  # noqa: N806
    ended = []

    async def quick():
        ended.append(1)

    async def node(state, config, task_manager: Manager):
        task_manager.create_task(quick(), name="quick")
        await asyncio.sleep(0)
        task_manager.create_task(forever(), name="slow")
        return state

    app = graph_of(installed, node).compile()
    for number in range(3):
        app.invoke(question(installed), {"thread_id": f"thread {number}"})
    assert len(ended) == 3
    assert app._task_manager.get_task_count() == 0
    assert app._task_manager.stats()["names"]["slow"]["in_flight"] == 0
    assert asyncio.run(app.aclose())["background_tasks"]["initial_tasks"] == 0


async def test_events_go_through_the_manager_and_aclose_reports_them(installed):
    """The framework's publish_event, whose default was made at import, uses the manager of the newest graph."""
    publisher = recording_publisher(installed)

    async def node(state, config):
        return state

    for number in range(2):
        app = graph_of(installed, node, publisher=publisher).compile()
        await app.ainvoke(question(installed), {"thread_id": f"thread {number}"})
        await app._task_manager.wait_for_all()
        assert app._task_manager.stats()["completed"] == len(publisher.events) > 3
        publisher.events.clear()
        report = await app.aclose()
        assert report["background_tasks"]["status"] == "completed"
        assert report["publisher"]["status"] == "completed"


async def test_graphs_made_before_keep_their_manager_and_its_events(framework, twin):
    """install() does not replace the manager of a graph that has one."""
    from injectq import InjectQ

    publisher = recording_publisher(framework)

    async def node(state, config):
        return state

    app = graph_of(framework, node, publisher=publisher).compile()
    manager = app._task_manager
    with installed_in(framework.name, twin):
        assert not isinstance(manager, _agentflow_graphs.BackgroundTaskManager)
        assert InjectQ.get_instance().get(framework.module.BackgroundTaskManager) is manager
        await app.ainvoke(question(framework), THREAD)
        assert manager.get_task_count() > 0
        await manager.wait_for_all()
        assert publisher.events
        await app.aclose()


async def test_the_shutdown_timeout_of_compile_bounds_aclose(installed):
    """A task that swallows its cancellation is reported as remaining after the timeout."""
    release = asyncio.Event()
    Manager = installed.module.BackgroundTaskManager  # noqa: N806

    async def node(state, config, task_manager: Manager):
        task_manager.create_task(stubborn(10, release), name="stubborn")
        await asyncio.sleep(0)
        return state

    app = graph_of(installed, node).compile(shutdown_timeout=0.05)
    await app.ainvoke(question(installed), THREAD)
    report = (await app.aclose())["background_tasks"]
    assert report["status"] == "timeout"
    assert report["remaining_names"] == ["stubborn"]
    assert report["duration_seconds"] < 5
    release.set()
    await app._task_manager.wait_for_all()
    assert await app.aclose() == {"status": "already_closed"}


async def test_draining_lets_tasks_end_inside_the_shutdown_timeout(framework, twin):
    """With drain_timeout, tasks that end in time are completed; the others are cancelled within the same time."""
    with installed_in(framework.name, twin, drain_timeout=60.0):
        Manager = framework.module.BackgroundTaskManager  # noqa: N806
        event = asyncio.Event()

        async def node(state, config, task_manager: Manager):
            task_manager.create_task(after(event))
            return state

        app = graph_of(framework, node).compile(shutdown_timeout=30.0)
        await app.ainvoke(question(framework), THREAD)
        asyncio.get_running_loop().call_soon(event.set)
        report = (await app.aclose())["background_tasks"]
        assert (report["status"], report["completed_tasks"], report["duration_seconds"] < 10) == ("completed", 1, True)
        assert app._task_manager.stats()["completed"] == 1

        manager = Manager(default_shutdown_timeout=0.05)
        task = manager.create_task(forever())
        report = await manager.shutdown()
        assert task.cancelled()
        assert (report["status"], report["duration_seconds"] < 10) == ("completed", True)


# -- the class ------------------------------------------------------------------------------------------------------


def test_a_manager_is_made_without_a_loop_and_true_when_empty(make, installed):
    """It has the names that programs and tests read, with their types."""
    manager = make()
    assert manager
    assert manager._tasks == set()
    assert manager._task_metadata == {}
    assert (manager.pending_count, manager.dropped_count, manager.get_task_count()) == (0, 0, 0)
    assert manager._max_pending_tasks == installed.module.DEFAULT_MAX_PENDING_TASKS == 1000
    assert (make.__name__, make.__module__) == ("BackgroundTaskManager", installed.module.__name__)
    assert mock.MagicMock(spec=make).create_task


def test_every_call_of_the_framework_s_own_manager_is_accepted(framework, twin):
    """Each public method has at least the parameters of the original, in order, with their defaults."""
    original = framework.module.BackgroundTaskManager
    with installed_in(framework.name, twin):
        replacement = framework.module.BackgroundTaskManager
        names = [name for name in vars(original) if not name.startswith("_") or name == "__init__"]
        assert len(names) == 9
        for name in names:
            if isinstance(vars(original)[name], property):
                assert isinstance(getattr(replacement, name), property)
                continue
            expected = inspect.signature(getattr(original, name)).parameters
            found = inspect.signature(getattr(replacement, name)).parameters
            assert list(found)[: len(expected)] == list(expected)
            for parameter in expected.values():
                same = found[parameter.name]
                assert (same.kind, same.default) == (parameter.kind, parameter.default), name


async def test_a_task_has_the_frameworks_metadata_while_it_runs(make, installed):
    """``_tasks`` and ``_task_metadata`` show it; ``get_task_info`` has the original's keys."""
    manager = make()
    task = manager.create_task(forever(), name="slow", timeout=60.0, context={"user": "ada"})
    assert manager._tasks == {task}
    metadata = manager._task_metadata[task]
    assert type(metadata) is installed.module.TaskMetadata
    assert (metadata.name, metadata.timeout, metadata.context) == ("slow", 60.0, {"user": "ada"})
    (info,) = manager.get_task_info()
    assert {"name", "age_seconds", "timeout", "context", "done", "cancelled"} <= set(info)
    await manager.cancel_all()
    assert (manager._tasks, manager._task_metadata) == (set(), {})


async def test_tasks_are_accepted_after_shutdown(make):
    """A default of a function may hold a manager whose graph is closed: its tasks run."""
    manager = make()
    task = manager.create_task(forever())
    report = await manager.shutdown()
    assert (report["status"], report["initial_tasks"], report["completed_tasks"]) == ("completed", 1, 1)
    assert task.cancelled()
    assert await manager.create_task(value("late")) == "late"
    assert await (await manager.spawn(value("later"))) == "later"
    again = await manager.shutdown()
    assert (again["status"], again["tasks_remaining"]) == ("already_shutdown", 0)


async def test_concurrent_shutdowns_all_return(make):
    """One shuts down; the others report that it was done."""
    manager = make()
    manager.create_task(forever())
    reports = await asyncio.gather(*(manager.shutdown() for _ in range(3)))
    assert sorted(report["status"] for report in reports) == ["already_shutdown", "already_shutdown", "completed"]


async def test_a_full_manager_drops_the_newest_task(make, caplog):
    """create_task returns None, closes the coroutine and counts the drop; there is one warning in five seconds."""
    manager = make(max_pending_tasks=2)
    kept = [manager.create_task(forever()) for _ in range(2)]
    refused = [forever() for _ in range(50)]
    assert [manager.create_task(coro, name="dropped") for coro in refused] == [None] * 50
    assert {inspect.getcoroutinestate(coro) for coro in refused} == {inspect.CORO_CLOSED}
    assert (manager.pending_count, manager.dropped_count) == (2, 50)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].getMessage().startswith("Background task queue is full (2 in flight); dropping task 'dropped'.")
    assert not any(task.done() for task in kept)
    await manager.cancel_all()
    assert await manager.create_task(value("room")) == "room"


async def test_a_limit_of_0_is_no_limit(make):
    """Thousands of tasks are accepted."""
    manager = make(max_pending_tasks=0)
    for _ in range(1500):
        assert manager.create_task(forever()) is not None
    await manager.cancel_all()
    assert manager.dropped_count == 0


def test_tasks_of_a_closed_loop_do_not_count_against_the_limit(make):
    """They are released when the manager uses its next loop."""
    manager = make(max_pending_tasks=1)

    def leave_one_behind():
        loop = asyncio.new_event_loop()

        async def start():
            assert manager.create_task(forever()) is not None

        loop.run_until_complete(start())
        loop.close()

    leave_one_behind()
    leave_one_behind()
    assert manager.pending_count == 0
    assert (manager.stats()["abandoned"], manager.dropped_count) == (2, 0)
    release_closed_loops(manager)


async def test_a_timeout_of_0_is_no_limit_and_a_negative_one_is_refused(make):
    """A value that is no length of time is a named error, and the coroutine is closed."""
    manager = make()
    event = asyncio.Event()
    task = manager.create_task(after(event, "done"), timeout=0)
    assert manager.get_task_info()[0]["timeout"] is None
    event.set()
    assert await task == "done"
    await manager.wait_for_all(timeout=0)
    with pytest.raises(InvalidTimeoutError):
        manager.create_task(value(), timeout=-1)


async def test_a_timeout_needs_no_further_task(make, caplog):
    """When the time is up the task is cancelled with a warning."""
    manager = make()
    await asyncio.sleep(0)
    before = len(asyncio.all_tasks())
    tasks = [manager.create_task(forever(), name="slow", timeout=0.001) for _ in range(3)]
    assert len(asyncio.all_tasks()) == before + 3
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    texts = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert texts == ["Background task 'slow' timed out after 0.001 seconds"] * 3
    assert manager.stats()["timed_out"] == 3


async def test_a_wait_that_times_out_cancels_nothing(make, installed, caplog):
    """The tasks continue; the framework's counter of such waits is incremented."""
    manager = make()
    before = installed.metrics.snapshot()["counters"].get("background_task_manager.wait_timeout", 0)
    event = asyncio.Event()
    task = manager.create_task(after(event, "done"))
    await manager.wait_for_all(timeout=0.001)
    assert not task.done()
    assert "Timeout waiting for background tasks" in caplog.text
    assert installed.metrics.snapshot()["counters"]["background_task_manager.wait_timeout"] == before + 1
    event.set()
    await manager.wait_for_all(timeout=5)
    assert await task == "done"


# -- records and counters -------------------------------------------------------------------------------------------


async def scenario(manager):
    """Have tasks end in every way, then shut down twice."""
    await manager.create_task(value(), name="good", timeout=60.0, context={"user": "ada"})
    task = manager.create_task(failing(ValueError("broken")), name="bad", context={"user": "bob"})
    await asyncio.wait([task])
    slow = [manager.create_task(forever(), name="slow", timeout=0.001), manager.create_task(forever(), name="stopped")]
    await asyncio.wait(slow[:1])
    await manager.cancel_all()
    manager.create_task(value(), name="waited for")
    await manager.wait_for_all(timeout=5)
    manager.create_task(forever(), name="shut down")
    await asyncio.sleep(0)
    await manager.shutdown(timeout=5)
    await manager.shutdown()
    await asyncio.sleep(0)


def counters(framework):
    """Return the framework's counters of its managers."""
    found = framework.metrics.snapshot()["counters"]
    return {name: count for name, count in found.items() if name.startswith("background_task_manager.")}


def observe(framework, caplog):
    """Run the scenario on the framework's current class; return its log records and the changes of its counters."""
    caplog.clear()
    before = counters(framework)
    with caplog.at_level(logging.DEBUG, logger=f"{framework.name}.utils"):
        asyncio.run(scenario(framework.module.BackgroundTaskManager()))
    records = [
        (
            record.name,
            record.levelname,
            re.sub(r"\d+\.\d\ds?\b", "N", record.getMessage()),
            getattr(record, "task_context", None) or None,
            record.exc_info is not None,
        )
        for record in caplog.records
        if record.name == f"{framework.name}.utils"
    ]
    counted = {name: count - before.get(name, 0) for name, count in counters(framework).items()}
    return records, {name: count for name, count in counted.items() if count}


def test_records_and_counters_are_those_of_the_original(framework, twin, caplog):
    """The same program leaves the same log records and the same counts with either manager."""
    expected, expected_counts = observe(framework, caplog)
    with installed_in(framework.name, twin):
        found, found_counts = observe(framework, caplog)
    assert len(expected) > 15
    assert sorted(record[:3] for record in found) == sorted(record[:3] for record in expected)
    assert [r for r in expected if r[3] or r[4]] == [r for r in found if r[3] or r[4]]
    assert found_counts == expected_counts


async def test_the_logger_of_the_module_can_be_patched(make, installed):
    """Every record goes to the mock; the text of an error is formatted."""
    with mock.patch(f"{installed.module.__name__}.logger") as logger:
        manager = make()
        await manager.create_task(value(), name="good")
        await asyncio.wait([manager.create_task(failing(ValueError("broken")), name="bad")])
        logger.error.assert_called_once()
        text = logger.error.call_args[0][0]
        assert re.fullmatch(r"Background task raised an exception - bad: broken \(duration=\d\.\d\ds\)", text)
        texts = [call.args[0] for call in logger.debug.call_args_list]
        # An eager task ends before it is created; any other task is created first.
        created = "Created background task: %s (timeout=%s)"
        assert sorted(text.split("'")[0] for text in texts) == ["Background task ", created, created]


async def test_counting_costs_nothing_while_tasks_run(make, installed):
    """Starting and ending tasks touches no counter of the framework; reading adds up the managers' counts."""
    manager = make()
    before = counters(installed)
    with mock.patch.object(installed.metrics, "counter", side_effect=AssertionError):
        for _ in range(10):
            await manager.create_task(value())
    assert (
        counters(installed)["background_task_manager.tasks_completed"]
        == before["background_task_manager.tasks_completed"] + 10
    )


def test_counts_of_a_collected_manager_are_kept(make, installed):
    """They are kept when the manager is collected, and after uninstall."""
    before = counters(installed)["background_task_manager.tasks_created"]

    async def work():
        manager = make()
        await manager.create_task(value())
        return weakref.ref(manager)

    reference = asyncio.run(work())
    gc.collect()
    assert reference() is None
    assert counters(installed)["background_task_manager.tasks_created"] == before + 1
    agentflow.uninstall(installed.name)
    counter = installed.metrics.counter("background_task_manager.tasks_created")
    assert counter.value == before + 1
    counter.inc()
    assert counters(installed)["background_task_manager.tasks_created"] == before + 2


async def test_a_counter_can_still_be_incremented_by_others(installed, make):
    """A program's own increments are added to the managers' counts."""
    counter = installed.metrics.counter("background_task_manager.tasks_created")
    before = counter.value
    counter.inc(5)
    await make().create_task(value())
    assert counter.value == before + 6


async def test_a_manager_that_cannot_be_made_leaves_the_counters_usable(make, installed):
    """A refused option is an error, and reading the counters works."""
    with pytest.raises(InvalidOptionError):
        make(max_pending_tasks=-1)
    gc.collect()
    assert counters(installed)


async def test_injectq_builds_our_manager_if_no_graph_bound_one(installed):
    """Without a graph, InjectQ builds the manager that the frameworks' functions get; it is of our class."""
    publisher = recording_publisher(installed)
    events = installed.events
    event = events.EventModel(event=events.Event.NODE_EXECUTION, event_type=events.EventType.START)
    installed.publish.publish_event(event, publisher)
    await until(lambda: publisher.events)
    import injectq

    manager = injectq.InjectQ.get_instance().get(installed.module.BackgroundTaskManager)
    assert isinstance(manager, _agentflow_graphs.BackgroundTaskManager)
