"""A pytest plugin for the frameworks' own tests: installs the manager of bgtasks before they import their own."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from bgtasks import BackgroundTaskManager
from bgtasks.integrations import agentflow

FRAMEWORK = os.environ["BGTASKS_FRAMEWORK"]

agentflow.install(FRAMEWORK)


def pytest_report_header() -> str:
    """Name the tested manager."""
    return f"{FRAMEWORK} with the manager of {BackgroundTaskManager.__module__}"


def pytest_sessionfinish() -> None:
    """Fail a run in which a module of the framework has another manager."""
    installed = import_module(f"{FRAMEWORK}.utils.background_task_manager").BackgroundTaskManager
    assert issubclass(installed, BackgroundTaskManager)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == FRAMEWORK:
            assert getattr(module, "BackgroundTaskManager", installed) is installed, name
