"""Hooks in the graphs of agentflow and 10xGraph, with which they bind their manager and pass it on."""

# ruff: noqa: SLF001  the frameworks keep these attributes private

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from bgtasks.integrations._agentflow_manager import FrameworkManager
from bgtasks.integrations._agentflow_publisher import FrameworkPublisher
from bgtasks.integrations._agentflow_references import bind
from bgtasks.manager import BackgroundTaskManager

__all__ = ["hook_graphs"]


@contextlib.contextmanager
def hook_graphs(graphs: ModuleType, publishers: ModuleType, original: type, replacement: type[FrameworkManager]) -> Any:
    """Have graphs bind their manager under both classes, and pass it to their publisher and the nodes that ask."""
    # Late: it needs InjectQ, which comes with the frameworks.
    from bgtasks.integrations._agentflow_nodes import give_manager

    kinds = (replacement, original, BackgroundTaskManager)

    def after_init(graph: Any) -> None:
        manager = graph._task_manager
        if isinstance(manager, replacement):
            for kind in (replacement, original):
                bind(graph._container, kind, manager)
            if graph._publisher is not None:
                bind(graph._container, publishers.BasePublisher, graph._publisher)
            if isinstance(graph._publisher, FrameworkPublisher):
                # It ends with this graph anyway: aclose() of a graph closes its publisher.
                graph._publisher.target.attach(manager)

    def after_compile(graph: Any) -> None:
        if isinstance(graph._task_manager, replacement):
            for node in graph.nodes.values():
                give_manager(node, graph._task_manager, kinds)

    def after_override(app: Any) -> None:
        after_compile(app._state_graph)

    with (
        _followed(graphs.StateGraph, "__init__", after_init),
        _followed(graphs.StateGraph, "compile", after_compile),
        _followed(graphs.CompiledGraph, "override_node", after_override),
    ):
        yield


@contextlib.contextmanager
def _followed(kind: type, name: str, follow: Callable[[Any], None]) -> Any:
    """Have ``follow(self)`` called after each call of a method."""
    method = kind.__dict__[name]

    @functools.wraps(method)
    def followed(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        follow(self)
        return result

    setattr(kind, name, followed)
    try:
        yield
    finally:
        setattr(kind, name, method)
