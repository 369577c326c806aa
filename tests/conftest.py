"""Tests with a manager run on both twins; ``async def`` tests run on every loop, in debug mode."""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import signal
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from internals import release_closed_loops
from loops import LOOPS
from server_fixtures import *  # noqa: F403  fixtures are found by name
from twins import MODULES, core_module, manager_module, registry_module, twins_chosen

import bgtasks
from bgtasks import _registry_py


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options for the tested twins, and for the coroutines that tasks of the compiled twin step."""
    parser.addoption("--twin", choices=["both", *MODULES], default="both", help="the registries to test")
    parser.addoption("--native", action="store_true", help="have all tasks step native coroutines")


def pytest_configure(config: pytest.Config) -> None:
    """Set the coroutines that tasks of the compiled registry step, and have Ctrl-C work as in a terminal."""
    if config.option.native:
        core_module("cython").use_wrapper("native")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Background jobs of a shell without job control ignore SIGINT, and so do their children.
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header(config: pytest.Config) -> str:
    """Name the twins that run."""
    return f"bgtasks {bgtasks.__version__}, default registry: {bgtasks.IMPLEMENTATION}, tested: {config.option.twin}"


def pytest_collection_finish() -> None:
    """Exclude imported objects from the cycle collector, which runs after every test: they are most of its work."""
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests with the fixture ``twin`` on each twin, and coroutine functions on each loop."""
    if "twin" in metafunc.fixturenames:
        metafunc.parametrize("twin", twins_chosen(metafunc.config), scope="session")
    if "loop_kind" in metafunc.fixturenames:
        only = metafunc.definition.get_closest_marker("loops")
        metafunc.parametrize("loop_kind", [kind for kind in LOOPS if only is None or kind in only.args])


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: Any, name: str, obj: Any) -> None:
    """Give every ``async def`` test a loop."""
    if collector.istestfunction(obj, name) and inspect.iscoroutinefunction(obj):
        pytest.mark.usefixtures("loop_kind", "loop_errors")(obj)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an ``async def`` test on its loop."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    errors: list[dict[str, Any]] = pyfuncitem.funcargs["loop_errors"]
    with asyncio.Runner(debug=True, loop_factory=LOOPS[pyfuncitem.funcargs["loop_kind"]]) as runner:
        runner.get_loop().set_exception_handler(lambda loop, context: errors.append(context))
        runner.run(pyfuncitem.obj(**arguments))
    return True


@pytest.fixture
def loop_errors() -> Iterator[list[dict[str, Any]]]:
    """Give the calls of the loop's exception handler; the test fails if it leaves any."""
    errors: list[dict[str, Any]] = []
    yield errors
    gc.collect()
    assert not errors, "the loop's exception handler was called"


@pytest.fixture(scope="session")
def registry(twin: str) -> ModuleType:
    """Give the registry module of the twin."""
    return registry_module(twin)


@pytest.fixture(scope="session")
def manager_of_twin(twin: str) -> ModuleType:
    """Give the manager module on the twin."""
    return manager_module(twin)


@pytest.fixture
def make_manager(manager_of_twin: ModuleType) -> Iterator[Callable[..., Any]]:
    """Give a maker of managers; each must be empty at the end of the test."""
    made: list[Any] = []

    def make(*args: Any, **kwargs: Any) -> Any:
        manager = manager_of_twin.BackgroundTaskManager(*args, **kwargs)
        made.append(manager)
        return manager

    yield make
    for manager in made:
        release_closed_loops(manager)
        stats = manager.stats()
        assert manager.get_task_info() == []
        assert stats["started"] == sum(
            stats[outcome] for outcome in ("completed", "failed", "cancelled", "timed_out", "abandoned")
        )
    assert not _registry_py._in_use


@pytest.fixture
def queue_of_twin(twin: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Have publishers use the event queue of the twin, and give its module."""
    from event_tools import queue_module

    from bgtasks.events import _footprint, publisher

    module = queue_module(twin)
    monkeypatch.setattr(publisher, "EventQueue", module.EventQueue)
    monkeypatch.setattr(publisher, "footprints", getattr(module, "footprints", _footprint.footprints))
    return module


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    """Fail a test that leaves a thread behind."""
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]
    assert not left


@pytest.fixture
def bgtasks_module() -> ModuleType:
    """Give the package."""
    return importlib.import_module("bgtasks")
