"""A pytest plugin for the frameworks' own tests: it puts our manager in before they import theirs."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from bgtasks import BackgroundTaskManager
from bgtasks.integrations import agentflow

FRAMEWORK = os.environ["BGTASKS_FRAMEWORK"]

agentflow.install(FRAMEWORK)


def pytest_report_header() -> str:
    """Say whose manager is tested."""
    return f"{FRAMEWORK} with the manager of {BackgroundTaskManager.__module__}"


def pytest_sessionfinish() -> None:
    """Fail a run in which a module of the framework came to another manager."""
    ours = import_module(f"{FRAMEWORK}.utils.background_task_manager").BackgroundTaskManager
    assert issubclass(ours, BackgroundTaskManager)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == FRAMEWORK:
            assert getattr(module, "BackgroundTaskManager", ours) is ours, name
