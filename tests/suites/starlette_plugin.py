"""A pytest plugin for the tests of Starlette and FastAPI: has their background tasks run on a manager of bgtasks.

Requests wait for them, as those tests expect.
"""

from __future__ import annotations

from bgtasks import BackgroundTaskManager
from bgtasks.integrations.starlette import install

manager = BackgroundTaskManager()
install(manager=manager, wait=True)


def pytest_report_header() -> str:
    """Name the tested manager."""
    return f"background tasks on {manager!r}"


def pytest_sessionfinish() -> None:
    """Fail a run in which no background task ran on the manager."""
    assert manager.stats()["started"] > 0, "no background task ran on the manager"
