"""The pytest plugin, in test suites that run in their own processes, with pytest-asyncio and with anyio's plugin."""

import importlib.metadata
import re
import sys

import pytest
from child import environment
from requirements import need

need("anyio")
need("pytest_asyncio")

pytest_plugins = ["pytester"]

INSTALLED = any(
    entry.value == "_bgtasks_pytest" for entry in importlib.metadata.entry_points(group="pytest11", name="bgtasks")
)
# The decorator of an async test, by plugin; the runners of the two close the loop at different times.
MARKS = {"pytest-asyncio": "@pytest.mark.asyncio", "anyio": "@pytest.mark.anyio"}
HEAD = """
import asyncio, pytest
from bgtasks import BackgroundTaskManager

@pytest.fixture
def anyio_backend():
    return "asyncio"

async def forever():
    await asyncio.Event().wait()

async def failing():
    await asyncio.sleep(0)
    raise ValueError("in the background")

async def a_few_iterations():
    for _ in range(5):
        await asyncio.sleep(0)
"""


@pytest.fixture(params=list(MARKS))
def mark(request):
    """Give the decorator of an async test."""
    return MARKS[request.param]


@pytest.fixture
def run_suite(pytester, monkeypatch, twin):
    """Give a function that runs a test module in its own process, with warnings as errors."""
    for name, value in environment(twin).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run(text, *arguments, head=HEAD, others=("-pasyncio", "-panyio")):
        pytester.makepyfile(test_suite=head + text)
        # Only these plugins: loading all that are installed costs a second per suite.
        plugins = ["-pbgtasks" if INSTALLED else "-p_bgtasks_pytest", *others]
        warnings = ["-Werror", "-Wdefault::pytest.PytestWarning"]
        return pytester.runpytest_subprocess(*plugins, *warnings, "-v", *arguments)

    return run


def test_a_test_that_leaves_no_task_passes(run_suite, mark):
    """The fixture gives a manager; a test that waits for its tasks, or cancels them, passes."""
    result = run_suite(f"""
{mark}
async def test_waits(task_manager):
    assert isinstance(task_manager, BackgroundTaskManager)
    task = task_manager.create_task(asyncio.sleep(0, "result"))
    task_manager.fire(asyncio.sleep(0))
    await task_manager.wait_for_all()
    assert await task == "result"

{mark}
async def test_cancels(task_manager):
    task_manager.create_task(forever())
    await task_manager.cancel_all()

{mark}
async def test_shuts_down(task_manager):
    task_manager.create_task(forever())
    await asyncio.sleep(0)
    await task_manager.shutdown()
""")
    result.assert_outcomes(passed=3)


def test_a_test_that_leaves_tasks_fails_with_their_names_and_where_they_were_created(run_suite, pytester, mark):
    """The report has each task that is left, its coroutine, the line that created it and its current line."""
    result = run_suite(f"""
{mark}
async def test_leaves(task_manager):
    task_manager.create_task(forever(), name="watcher")
    await asyncio.sleep(0)

{mark}
async def test_next(task_manager):
    pass
""")
    outcomes = result.parseoutcomes()
    assert outcomes.get("failed", 0) + outcomes.get("errors", 0) == 1
    assert result.ret == 1
    result.stdout.re_match_lines(
        [
            r"The test leaves 1 background task:",
            r"Background task 'watcher' \(forever\), created at .*test_suite.py:\d+ in test_leaves, at .*:\d+ in "
            r"forever \(in asyncio\.Event\.wait\)",
        ]
    )
    line = int(re.findall(r"test_suite.py:(\d+) in test_leaves", result.stdout.str())[0])
    assert "watcher" in (pytester.path / "test_suite.py").read_text().splitlines()[line - 1]
    assert result.stdout.str().count("Background task 'watcher'") <= 2
    assert "test_next PASSED" in result.stdout.str()


def test_tasks_left_by_asyncio_run_fail_a_sync_test(run_suite):
    """asyncio.run cancels the tasks that a program leaves; the test fails nevertheless."""
    result = run_suite("""
@pytest.mark.bgtasks_leaks("error")
def test_leaves():
    async def main():
        BackgroundTaskManager().create_task(forever(), name="watcher")
    asyncio.run(main())
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*'watcher' (forever), created at *test_suite.py:* in main*"])


def test_tasks_that_a_closed_loop_abandons_fail_the_test(run_suite):
    """The report names them, without a runner, too."""
    result = run_suite("""
@pytest.mark.bgtasks_leaks("error")
def test_leaves():
    async def main():
        BackgroundTaskManager().create_task(forever(), name="watcher")
    loop = asyncio.SelectorEventLoop()
    loop.run_until_complete(main())
    loop.close()
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*'watcher' (1 times), abandoned with its closed loop*"])


def test_a_loop_that_outlives_the_test_is_checked_at_the_end_of_the_test(run_suite):
    """On a loop for the whole module, the test that leaves a task fails, and no other."""
    result = run_suite("""
manager = BackgroundTaskManager()
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.bgtasks_leaks("error")]

async def test_before():
    await manager.create_task(asyncio.sleep(0))

async def test_leaves():
    manager.create_task(forever(), name="watcher")

async def test_after():
    await asyncio.sleep(0)

async def test_cancels():
    assert await manager.cancel_all() is None
""")
    result.assert_outcomes(passed=4, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_leaves*"])


def test_tasks_that_a_fixture_ends_are_not_left(run_suite, mark):
    """An application that drains in a fixture's teardown fails no test."""
    fixture = "pytest_asyncio.fixture" if "asyncio" in mark else "pytest.fixture"
    result = run_suite(f"""
import pytest_asyncio

@{fixture}
async def manager():
    async with BackgroundTaskManager(drain_timeout=10) as manager:
        manager.create_task(asyncio.sleep(0.01))
        yield manager

{mark}
@pytest.mark.bgtasks_leaks("error")
async def test_with_application(manager):
    manager.create_task(asyncio.sleep(0.01))
""")
    result.assert_outcomes(passed=1)


def test_a_background_exception_fails_the_test_that_started_the_task(run_suite, mark):
    """The report has the task and the traceback; the next test passes."""
    result = run_suite(f"""
{mark}
async def test_breaks(task_manager):
    task_manager.create_task(failing(), name="mailer")
    await a_few_iterations()

{mark}
async def test_next(task_manager):
    pass
""")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*Background task 'mailer' (failing), created at *test_suite.py:* in test_breaks* failed:",
            "*in failing",
            "ValueError: in the background",
        ]
    )
    assert "never retrieved" not in result.stdout.str()


def test_an_exception_that_the_test_retrieved_does_not_fail_it(run_suite, mark):
    """An exception that was awaited, retrieved, gathered or raised by wait_for_all is the test's business."""
    result = run_suite(f"""
{mark}
async def test_awaits(task_manager):
    with pytest.raises(ValueError):
        await task_manager.create_task(failing())

{mark}
async def test_retrieves(task_manager):
    task = task_manager.create_task(failing())
    await asyncio.wait([task])
    assert isinstance(task.exception(), ValueError)

{mark}
async def test_gathers(task_manager):
    await asyncio.gather(task_manager.create_task(failing()), return_exceptions=True)

{mark}
async def test_waits(task_manager):
    task_manager.create_task(failing())
    task_manager.fire(asyncio.sleep(0))
    with pytest.raises(ValueError):
        await task_manager.wait_for_all()
""")
    result.assert_outcomes(passed=4)


def test_a_fired_task_that_fails_fails_the_test(run_suite, mark):
    """A task without a handle fails its test, even one that fails in its first step."""
    result = run_suite(f"""
async def failing_at_once():
    raise ValueError("at once")

{mark}
async def test_fires(task_manager):
    task_manager.fire(failing(), name="first")
    task_manager.fire(failing_at_once(), name="second")
    await a_few_iterations()
""")
    result.assert_outcomes(failed=1)
    text = result.stdout.str()
    assert "Background task 'first' (failing)" in text
    assert "Background task 'second' (failing_at_once)" in text


def test_a_failing_test_keeps_its_own_failure(run_suite, mark):
    """The findings are a section of the report; the failure is the test's own."""
    result = run_suite(f"""
{mark}
async def test_fails(task_manager):
    task_manager.create_task(failing(), name="mailer")
    await a_few_iterations()
    assert 1 == 2
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*assert 1 == 2*", "*bgtasks*call*", "*Background task 'mailer'*"])


def test_a_late_failure_names_the_test_that_left_the_task(run_suite):
    """A task that fails during a later test does not fail that test; a warning names the test that left it."""
    result = run_suite("""
manager = BackgroundTaskManager()
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.bgtasks_leaks("error")]

async def failing_later(gate):
    await gate.wait()
    raise ValueError("late")

async def test_leaves():
    test_leaves.gate = asyncio.Event()
    manager.create_task(failing_later(test_leaves.gate), name="mailer")

async def test_next():
    test_leaves.gate.set()
    await a_few_iterations()
""")
    result.assert_outcomes(passed=2, errors=1, warnings=1)
    result.stdout.fnmatch_lines(["*left by test_suite.py::test_leaves, failed: ValueError: late*"])


SUITE = """
def asked(text):
    return text

{mark}
async def test_leaves():
    manager = BackgroundTaskManager()
    manager.create_task(forever(), name="watcher")
    manager.create_task(failing(), name="mailer")
    await a_few_iterations()
"""


@pytest.mark.parametrize("mode", ["error", "warn", "off", ""])
def test_the_ini_option_is_for_the_whole_suite(run_suite, mark, mode):
    """With "error" a test fails, with "warn" it warns; "off" and no value ignore a suite without the fixture."""
    result = run_suite(SUITE.format(mark=mark), *(["-o", f"bgtasks_leaks={mode}"] if mode else []))
    outcomes = result.parseoutcomes()
    if mode == "error":
        assert result.ret == 1
        result.stdout.fnmatch_lines(["*'mailer' (failing)*"])
        result.stdout.fnmatch_lines(["*'watcher' (forever)*"])
    elif mode == "warn":
        assert outcomes["passed"] == 1
        assert outcomes["warnings"] >= 1
        result.stdout.fnmatch_lines(["*'mailer' (failing)*"])
        result.stdout.fnmatch_lines(["*'watcher' (forever)*"])
    else:
        assert outcomes == {"passed": 1}


def test_the_marker_takes_precedence_over_the_option_and_the_fixture(run_suite):
    """A single test can be excluded or included."""
    result = run_suite(
        """
@pytest.mark.asyncio
@pytest.mark.bgtasks_leaks("off")
async def test_excepted(task_manager):
    task_manager.create_task(forever())
    task_manager.create_task(failing())
    await a_few_iterations()

@pytest.mark.asyncio
@pytest.mark.bgtasks_leaks("warn")
async def test_warned(task_manager):
    task_manager.create_task(forever())
""",
        "-o",
        "bgtasks_leaks=error",
    )
    result.assert_outcomes(passed=2, warnings=1)


@pytest.mark.parametrize(
    ("marker", "arguments", "valid"),
    [
        ("bgtasks_leaks", arguments, "one of: error, warn, off")
        for arguments in ("'loud'", "", "'error', 'warn'", "mode='error'")
    ]
    + [
        ("bgtasks_failures", arguments, "a number of failures")
        for arguments in ("", "0", "'charge'", "1, 2", "1, name=5", "1, names='charge'")
    ],
)
def test_a_bad_marker_is_an_error_before_the_tests_run(run_suite, marker, arguments, valid):
    """The error names the test and what the marker takes."""
    result = run_suite(f"""
@pytest.mark.{marker}({arguments})
def test_one():
    pass
""")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*test_suite.py::test_one: the marker {marker} takes {valid}*"])


def test_a_bad_option_is_an_error_before_the_tests_run(run_suite):
    """The error names the valid values."""
    result = run_suite("", "-o", "bgtasks_leaks=loud")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*bgtasks_leaks = loud is unknown; it takes one of: error, warn, off*"])


def test_a_suite_that_does_not_use_the_plugin_is_not_changed(run_suite, pytester):
    """Neither bgtasks nor asyncio is imported, no hook of a test is used, and there is no warning."""
    result = run_suite(
        """
import sys

def test_nothing_was_imported(request):
    assert not {name for name in sys.modules if name == "bgtasks" or name.startswith("bgtasks.")}
    assert "asyncio" not in sys.modules
    assert "_bgtasks_pytest" in sys.modules
    assert not request.config.pluginmanager.has_plugin("bgtasks-watch")
    assert sys.get_coroutine_origin_tracking_depth() == 0
""",
        head="",
        others=(),
    )
    result.assert_outcomes(passed=1)


def test_a_suites_own_fixture_of_the_same_name_enables_nothing(run_suite, mark):
    """A manager of the suite's own may have failures, unless its fixture requests the plugin's."""
    result = run_suite(f"""
@pytest.fixture
def task_manager():
    return BackgroundTaskManager()

class TestOurs:
    @pytest.fixture
    def task_manager(self, request):
        return BackgroundTaskManager()

    {mark}
    async def test_own(self, task_manager):
        task_manager.create_task(failing())
        await a_few_iterations()

{mark}
async def test_own(task_manager, request):
    task_manager.create_task(failing())
    await a_few_iterations()
    assert not request.config.pluginmanager.has_plugin("bgtasks-watch")
""")
    result.assert_outcomes(passed=2)
    result = run_suite(f"""
@pytest.fixture
def task_manager(task_manager):
    return task_manager

{mark}
async def test_passed_on(task_manager):
    task_manager.create_task(failing())
    await a_few_iterations()
""")
    result.assert_outcomes(failed=1)


def test_the_plugin_restores_all_classes(run_suite, pytester):
    """After a checked run the classes are as they were."""
    pytester.makeconftest("""
import asyncio
from bgtasks import BackgroundTaskManager

before = vars(BackgroundTaskManager).copy(), vars(asyncio.Runner).copy()

def pytest_configure(config):
    # Called after the clean-up of what is registered later.
    config.add_cleanup(check)

def check():
    assert before == (vars(BackgroundTaskManager), vars(asyncio.Runner))
    print("no trace")
""")
    result = run_suite("def test_one(task_manager): pass", "-s")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["no trace"])
    assert result.ret == 0


def test_the_plugin_loads_with_warnings_as_errors(pytester, monkeypatch, twin):
    """Loading it raises nothing even if the interpreter treats every warning as an error."""
    for name, value in environment(twin).items():
        monkeypatch.setenv(name, value)
    plugin = [] if INSTALLED else ["-p", "_bgtasks_pytest"]
    done = pytester.run(
        sys.executable, "-W", "error", "-X", "dev", "-m", "pytest", "-pno:asyncio", *plugin, "--markers"
    )
    assert done.ret == 0
    done.stdout.fnmatch_lines(["@pytest.mark.bgtasks_leaks(mode)*"])


def test_the_summary_begins_with_the_names(run_suite, mark, monkeypatch):
    """Pytest cuts the lines of its summary: what comes first is the name of the task, not what all of them share."""
    monkeypatch.setenv("COLUMNS", "400")
    result = run_suite(f"""
{mark}
async def test_one(task_manager):
    task_manager.create_task(failing(), name="charge")
    await a_few_iterations()

{mark}
async def test_two(task_manager):
    task_manager.create_task(failing(), name="charge")
    await a_few_iterations()
    task_manager.create_task(forever(), name="watcher")
""")
    result.stdout.re_match_lines(
        [r"(FAILED|ERROR) .*test_one - (Failed: )?'charge' failed: ValueError: in the background$"]
    )
    summary = [line for line in result.stdout.lines if line.startswith(("FAILED", "ERROR"))]
    assert any(re.search(r"test_two - (Failed: )?'charge' failed: ValueError", line) for line in summary)
    assert any(re.search(r"'watcher' is left", line) for line in summary)


def test_a_timeout_is_a_failure(run_suite, mark):
    """A task that times out fails the test, unless the test awaits it or the wait raises its TimeoutError."""
    result = run_suite(
        f"""
{mark}
async def test_unseen(task_manager):
    task = task_manager.create_task(forever(), name="slow", timeout=0.01)
    await asyncio.wait([task])

{mark}
async def test_unseen_and_raised():
    manager = BackgroundTaskManager(timeouts="raise")
    task = manager.create_task(forever(), name="slow, raised", timeout=0.01)
    await asyncio.wait([task])

{mark}
async def test_fired(task_manager):
    task_manager.fire(forever(), name="fired", timeout=0.01)
    while task_manager.get_task_count():
        await asyncio.sleep(0.001)

@pytest.mark.parametrize("timeouts", ["cancel", "raise"])
{mark}
async def test_awaits(timeouts):
    manager = BackgroundTaskManager(timeouts=timeouts)
    task = manager.create_task(forever(), timeout=0.01)
    with pytest.raises(asyncio.CancelledError if timeouts == "cancel" else TimeoutError):
        await task
    manager.create_task(forever(), timeout=0.01)
    with pytest.raises(TimeoutError):
        await manager.wait_for_all()
""",
        "-o",
        "bgtasks_leaks=error",
    )
    result.assert_outcomes(failed=3, passed=2)
    for name in ("slow", "slow, raised", "fired"):
        result.stdout.fnmatch_lines([f"*'{name}' failed: TimeoutError: *timed out after 0.01 seconds*"])


def test_expected_failures(run_suite, mark):
    """The marker says how many failures a test expects, looked at or not; with a name, others count as ever."""
    result = run_suite(f"""
@pytest.mark.bgtasks_failures(2)
{mark}
async def test_two(task_manager):
    task_manager.create_task(failing())
    task_manager.create_task(forever(), timeout=0.01)
    with pytest.raises(ValueError):
        await task_manager.wait_for_all()

@pytest.mark.bgtasks_failures(1, name="charge")
{mark}
async def test_named():
    BackgroundTaskManager().create_task(failing(), name="charge")
    await a_few_iterations()

@pytest.fixture
def late(task_manager):
    yield
    asyncio.run(late_failure(task_manager))

async def late_failure(manager):
    manager.create_task(failing())
    await a_few_iterations()

@pytest.mark.bgtasks_failures(1)
def test_in_a_fixture(late):
    pass
""")
    result.assert_outcomes(passed=3)


def test_another_number_of_failures_than_expected(run_suite, mark):
    """Too many fail the test, too few its teardown; a test that fails or is skipped has no further error."""
    result = run_suite(f"""
@pytest.mark.bgtasks_failures(1)
{mark}
async def test_too_many(task_manager):
    task_manager.create_task(failing(), name="charge")
    task_manager.create_task(failing(), name="refund")
    await a_few_iterations()

@pytest.mark.bgtasks_failures(2)
{mark}
async def test_too_few(task_manager):
    task_manager.create_task(failing(), name="charge")
    await a_few_iterations()

@pytest.mark.bgtasks_failures(1, name="charge")
{mark}
async def test_other_name(task_manager):
    task_manager.create_task(failing(), name="charge")
    task_manager.create_task(failing(), name="refund")
    await a_few_iterations()

@pytest.mark.bgtasks_failures(1)
def test_skipped(task_manager):
    pytest.skip("not here")

@pytest.mark.bgtasks_failures(1)
def test_fails(task_manager):
    raise AssertionError("its own")
""")
    result.assert_outcomes(failed=3, passed=1, errors=1, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "*'charge' failed: ValueError: *; 'refund' failed: ValueError: *; "
            "expected failures of background tasks: 1, came: 2"
        ]
    )
    result.stdout.fnmatch_lines(["*'charge' failed: ValueError: *; expected failures of background tasks: 2, came: 1"])
    assert "expected failures of background tasks: 1, came: 0" not in result.stdout.str()
