"""Puts our manager into the place of agentflow's and 10xGraph's own (extras ``agentflow``, ``tenxgraph``).

After ``install()`` every ``StateGraph`` builds one of ours, and whatever names the framework's
``BackgroundTaskManager`` means ours. The program stays as it is. ``publisher()`` has a graph publish its events through
``bgtasks.events``.
"""

# ruff: noqa: SLF001  what is replaced is private in the frameworks

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from bgtasks import errors
from bgtasks._checks import check_seconds
from bgtasks.integrations._agentflow_manager import FrameworkManager
from bgtasks.integrations._agentflow_metrics import Totals
from bgtasks.integrations._agentflow_publisher import FrameworkPublisher, publisher_of, straight
from bgtasks.manager import BackgroundTaskManager

if TYPE_CHECKING:
    from bgtasks.events import BasePublisher

__all__ = ["install", "publisher", "uninstall"]

# The packages and the extras that bring them; 10xGraph is the newer name of agentflow.
FRAMEWORKS: Final = ("tenxgraph", "agentflow")


@dataclass(frozen=True)
class _Installation:
    module: ModuleType
    drain_timeout: float
    undo: contextlib.ExitStack


_installed: dict[str, _Installation] = {}
_lock = threading.RLock()


def install(*frameworks: str, drain_timeout: float | None = None) -> None:
    """Replace the framework's ``BackgroundTaskManager`` by ours, wherever it was or will be imported.

    Call it once, before the program builds its graphs; graphs that exist keep the manager that they have. What is
    installed already stays as it is: a second call does nothing, and one ``uninstall`` undoes both.

    Args:
        frameworks: ``"agentflow"``, ``"tenxgraph"`` or both; those that can be imported by default.
        drain_timeout: seconds that ``shutdown`` and ``aclose`` let tasks finish before they cancel them, as a part of
            the shutdown's own time; 0, which is the frameworks' way, by default.

    Raises:
        MissingExtraError: the framework is not installed.
        InvalidOptionError: another framework was named, ``drain_timeout`` is no length of time, or the framework has
            our manager already with another ``drain_timeout``.

    Example:
        >>> from bgtasks.integrations import agentflow
        >>> agentflow.install(drain_timeout=10.0)

    """
    if drain_timeout is not None:
        check_seconds("drain_timeout", drain_timeout)
    with _lock:
        modules = {_package_of(module): module for module in map(_manager_module, _checked(frameworks) or _found())}
        for name in modules:
            there = _installed.get(name)
            if there is not None and drain_timeout not in (None, there.drain_timeout):
                raise errors.InvalidOptionError(
                    f"{name} has our manager already, with drain_timeout={there.drain_timeout}: uninstall() it first"
                )
        for name, module in modules.items():
            if name not in _installed:
                _installed[name] = _install(name, module, drain_timeout or 0.0)


def uninstall(*frameworks: str) -> None:
    """Put the framework's own ``BackgroundTaskManager`` back; graphs that exist keep the manager that they have.

    Args:
        frameworks: as for ``install``; all by default. Nothing happens to one that was not installed.

    Raises:
        InvalidOptionError: another framework was named.

    """
    with _lock:
        for name in _checked(frameworks) or list(_installed):
            module = sys.modules.get(_module_name(name))
            installation = _installed.pop(name if module is None else _package_of(module), None)
            if installation is not None:
                installation.undo.close()


def publisher(ours: BasePublisher, framework: str | None = None) -> Any:
    """Return a publisher for ``StateGraph(publisher=...)`` whose events go into one of ours.

    It is an instance of the framework's own ``BasePublisher``. Each event is encoded when it passes, since the
    frameworks go on changing it, and gets the time of that moment where it carries that of the framework's import. With
    ``install()`` this happens inside ``publish_event``, without a task for each event, and the manager of the graph
    flushes the publisher before it cancels tasks; without, the framework starts a task an event, as ever.

    Its ``close`` closes ours. ``sync_close`` does, too, and returns when that is done; where a loop runs in this thread
    it cannot wait: the loop closes ours after the call.

    Args:
        ours: where the events go: a publisher of ``bgtasks.events`` that takes bytes.
        framework: ``"agentflow"`` or ``"tenxgraph"``; by default the one that is installed or, of two, imported.

    Raises:
        InvalidOptionError: ``ours`` is no such publisher, another framework was named, or two are in question.
        MissingExtraError: the framework is not installed.

    Example:
        >>> graph = StateGraph(publisher=agentflow.publisher(RedisPublisher("redis://localhost:6379/0")))

    """
    name = _package_of(_manager_module(_the_one() if framework is None else _checked((framework,))[0]))
    return publisher_of(name, ours)


def _the_one() -> str:
    found = _found()
    imported = [name for name in found if name in sys.modules] if len(found) > 1 else found
    if len(imported) == 1:
        return imported[0]
    raise errors.InvalidOptionError(f"{' and '.join(found)} are installed: say which one, framework={found[0]!r}")


def _checked(frameworks: tuple[str, ...]) -> tuple[str, ...]:
    for name in frameworks:
        if name not in FRAMEWORKS:
            raise errors.InvalidOptionError(
                f"framework must be one of {', '.join(FRAMEWORKS)}; got {errors.describe(name)}"
            )
    return frameworks


def _found() -> list[str]:
    """Return the frameworks that are installed, without importing them."""
    found = []
    for name in FRAMEWORKS:
        spec = importlib.util.find_spec(name)
        # 10xGraph brings a package "agentflow" along that only points to itself, and warns when imported.
        if spec is not None and PathFinder.find_spec(f"{name}.utils", spec.submodule_search_locations) is not None:
            found.append(name)
    if not found:
        raise errors.missing_extra("agentflow", "agentflow, or tenxgraph by its own extra,", "put our manager into it")
    return found


def _manager_module(name: str) -> ModuleType:
    if importlib.util.find_spec(name) is None:
        raise errors.missing_extra(name, name, "put our manager into it")
    return importlib.import_module(_module_name(name))


def _module_name(name: str) -> str:
    return f"{name}.utils.background_task_manager"


def _package_of(module: ModuleType) -> str:
    # Not the name asked for: that may be the alias.
    return module.__name__.partition(".")[0]


def _install(name: str, module: ModuleType, drain_timeout: float) -> _Installation:
    original: type = module.BackgroundTaskManager
    totals = Totals(module.metrics)
    ours = type(
        original.__name__,
        (FrameworkManager,),
        {
            "__doc__": FrameworkManager.__doc__,
            "__module__": module.__name__,
            "_framework": module,
            "_totals": totals,
            "_drains": drain_timeout,
        },
    )
    graphs = importlib.import_module(f"{name}.core.graph")
    publishers = importlib.import_module(f"{name}.runtime.publisher")
    with contextlib.ExitStack() as undo:
        undo.callback(_replace, ours, original)
        _replace(original, ours)
        by_task = publishers.publish_event
        by_ring = straight(by_task, importlib.import_module(f"{name}.utils.injection").fresh)
        undo.callback(_rename, by_ring, by_task)
        _rename(by_task, by_ring)
        undo.callback(totals.detach)
        totals.attach()
        undo.enter_context(_hooked(graphs, publishers, original, ours))
        return _Installation(module, drain_timeout, undo.pop_all())


def _replace(old: type, new: type) -> None:
    """Have every module, ``Inject`` default and container that names one class mean the other."""
    import injectq

    _rename(old, new)
    for thing in gc.get_objects():
        # By type(), never isinstance: that would resolve the default.
        kind = type(thing)
        if kind is injectq.Inject and vars(thing).get("service_type") is old:
            thing.service_type = new
            thing._injected_value = None
        elif kind is injectq.InjectQ and thing.has(old) and not thing.has(new):
            _bind(thing, new, thing.get(old))


def _rename(old: object, new: object) -> None:
    """Have every module that names one thing mean the other."""
    for module in list(sys.modules.values()):
        # A lazy module is not to be loaded by a look at it, and what else programs put there is none of ours.
        if issubclass(type(module), ModuleType):
            namespace = object.__getattribute__(module, "__dict__")
            for name, value in list(namespace.items()):
                if value is old:
                    namespace[name] = new


def _bind(container: Any, kind: type, thing: object) -> None:
    from injectq import ScopeType

    # InjectQ's singleton scope would go on giving what the first graph bound after the second one did.
    container.bind(kind, thing, scope=ScopeType.TRANSIENT, allow_concrete=False)


@contextlib.contextmanager
def _hooked(graphs: ModuleType, publishers: ModuleType, original: type, ours: type[FrameworkManager]) -> Any:
    """Have graphs bind their manager under both classes, and hand it to their publisher and the nodes that ask."""
    from bgtasks.integrations._agentflow_nodes import give_manager

    kinds = (ours, original, BackgroundTaskManager)

    def after_init(graph: Any) -> None:
        manager = graph._task_manager
        if isinstance(manager, ours):
            for kind in (ours, original):
                _bind(graph._container, kind, manager)
            if graph._publisher is not None:
                _bind(graph._container, publishers.BasePublisher, graph._publisher)
            if isinstance(graph._publisher, FrameworkPublisher):
                # It ends with this graph anyway: aclose() closes the publisher that its graph was made with.
                graph._publisher.ours.attach(manager)

    def after_compile(graph: Any) -> None:
        if isinstance(graph._task_manager, ours):
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
