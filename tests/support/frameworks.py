"""The installed agent frameworks, with the manager of bgtasks in them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
from requirements import need
from twins import framework_manager_module, manager_module

FRAMEWORKS = ["agentflow", "tenxgraph"]


def needed(name: str) -> Any:
    """Return the names that tests use of a framework; skip or fail if it is not installed."""
    spec = find_spec(name)
    if spec is not None and PathFinder.find_spec(f"{name}.utils", spec.submodule_search_locations) is None:
        pytest.skip(f"{name} is another framework's alias here")
    need(name)
    return SimpleNamespace(
        name=name,
        core=import_module(f"{name}.core"),
        state=import_module(f"{name}.core.state"),
        utils=import_module(f"{name}.utils"),
        metrics=import_module(f"{name}.utils.metrics"),
        publisher=import_module(f"{name}.runtime.publisher"),
        events=import_module(f"{name}.runtime.publisher.events"),
        publish=import_module(f"{name}.runtime.publisher.publish"),
        module=import_module(f"{name}.utils.background_task_manager"),
    )


@contextlib.contextmanager
def clean_containers() -> Iterator[None]:
    """Run the block with a global container of its own, and no active one."""
    import injectq

    with injectq.InjectQ.test_mode():
        injectq.ContainerContext.clear_current()
        try:
            yield
        finally:
            injectq.ContainerContext.clear_current()


@contextlib.contextmanager
def installed_in(name: str, twin: str, **options: Any) -> Iterator[None]:
    """Install the manager of bgtasks, on the twin, into a framework for the length of the block."""
    from bgtasks.integrations import _agentflow_graphs, agentflow

    # install() finds the framework's default values by the cycle collector, which freeze() made ignore them.
    gc.unfreeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agentflow, "FrameworkManager", framework_manager_module(twin).FrameworkManager)
        patch.setattr(_agentflow_graphs, "BackgroundTaskManager", manager_module(twin).BackgroundTaskManager)
        agentflow.install(name, **options)
        try:
            yield
        finally:
            agentflow.uninstall(name)
            # A collection after each test would go through all modules of the frameworks.
            gc.collect()
            gc.freeze()


def graph_of(framework: Any, *nodes: Any, **options: Any) -> Any:
    """Return a graph, not yet compiled, that runs the nodes one after another."""
    graph = framework.core.StateGraph(**options)
    for node in nodes:
        graph.add_node(node.__name__, node)
    names = [node.__name__ for node in nodes]
    graph.set_entry_point(names[0])
    for name, following in zip(names, [*names[1:], framework.utils.END], strict=True):
        graph.add_edge(name, following)
    return graph


def question(framework: Any) -> dict[str, Any]:
    """Return input for a graph."""
    return {"messages": [framework.state.Message.text_message("hello")]}


def recording_publisher(framework: Any) -> Any:
    """Return a publisher of the framework that keeps its events in ``events``."""

    class RecordingPublisher(framework.publisher.BasePublisher):
        def __init__(self) -> None:
            super().__init__({})
            self.events: list[Any] = []

        async def publish(self, event: Any) -> None:
            self.events.append(event)

        async def close(self) -> None:
            self._is_closed = True

        def sync_close(self) -> None:
            self._is_closed = True

    return RecordingPublisher()
