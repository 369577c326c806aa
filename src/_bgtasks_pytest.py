"""The pytest plugin: a manager for a test, and tests that fail for the background tasks they leave or break.

It stands outside the package, as importing a module of the package imports all of it, asyncio included. pytest loads
this file in every environment that has bgtasks, so it imports nothing but pytest until a test asks for more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from bgtasks import BackgroundTaskManager

NAME: Final = "bgtasks_leaks"
MODES: Final = ("error", "warn", "off")
FAILURES: Final = "bgtasks_failures"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the ini option."""
    parser.addini(
        NAME,
        "what to do with a test that leaves background tasks of bgtasks, or starts one that fails: error, warn, off "
        "(default: error for tests with the fixture task_manager, off for the others)",
        default="",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Add the markers, and check from the beginning if the whole suite asks for it."""
    config.addinivalue_line(
        "markers", f"{NAME}(mode): what to do with background tasks that the test leaves or that fail: error, warn, off"
    )
    config.addinivalue_line(
        "markers",
        f"{FAILURES}(count, name=None): how many background tasks, of this name or of any, fail or time out in it; "
        "a test with another number fails",
    )
    mode = config.getini(NAME)
    if mode not in (*MODES, ""):
        raise pytest.UsageError(f"{NAME} = {mode} is unknown; it takes one of: {', '.join(MODES)}")
    if mode in ("error", "warn"):
        _check(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Check if a test asks for it."""
    modes = {mode_of(item) for item in items}
    if modes - {"off"}:
        _check(config)


def mode_of(item: pytest.Item) -> str:
    """Return the mode of a test: that of its marker, else of the ini option, else the one of its fixtures."""
    marker = item.get_closest_marker(NAME)
    if marker is not None:
        if marker.kwargs or len(marker.args) != 1 or marker.args[0] not in MODES:
            raise pytest.UsageError(f"{item.nodeid}: the marker {NAME} takes one of: {', '.join(MODES)}")
        return str(marker.args[0])
    mode: str = item.config.getini(NAME)
    if expected_of(item) is not None:
        return "warn" if mode == "warn" else "error"
    return mode or ("error" if _uses_fixture(item) else "off")


def expected_of(item: pytest.Item) -> tuple[int, str | None] | None:
    """Return how many failures a test expects, and of tasks of which name (None for any); None without a marker."""
    marker = item.get_closest_marker(FAILURES)
    if marker is None:
        return None
    count = marker.args[0] if len(marker.args) == 1 else None
    name = marker.kwargs.get("name")
    if type(count) is not int or count < 1 or set(marker.kwargs) - {"name"} or not isinstance(name, (str, type(None))):
        raise pytest.UsageError(
            f"{item.nodeid}: the marker {FAILURES} takes a number of failures, 1 or more, and name= of the tasks"
        )
    return count, name


def _uses_fixture(item: pytest.Item) -> bool:
    """Return whether a test gets the fixture ``task_manager`` of bgtasks, perhaps through one that overrides it."""
    info = getattr(item, "_fixtureinfo", None)
    if info is None:
        return False
    for definition in reversed(info.name2fixturedefs.get("task_manager", ())):
        if definition.func.__module__ == __name__:
            return True
        if "task_manager" not in definition.argnames:
            return False
    return False


def _check(config: pytest.Config) -> None:
    if not config.pluginmanager.has_plugin("bgtasks-leaks"):
        from bgtasks.integrations._pytest import LeakChecker

        config.pluginmanager.register(LeakChecker(config, mode_of, expected_of), "bgtasks-leaks")


@pytest.fixture
def task_manager() -> BackgroundTaskManager:
    """Give a ``bgtasks.BackgroundTaskManager``; the test fails if it leaves tasks in it, or if one of them fails."""
    from bgtasks import BackgroundTaskManager

    return BackgroundTaskManager()
