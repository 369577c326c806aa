"""Replaces the task manager of agentflow and 10xGraph with that of bgtasks (extras ``agentflow``, ``tenxgraph``).

After ``install()`` every ``StateGraph`` builds a manager of bgtasks, and every reference to the framework's
``BackgroundTaskManager`` means its class. The program needs no change. ``publisher()`` has a graph publish its events
through ``bgtasks.events``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from importlib.machinery import PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

from bgtasks import errors
from bgtasks._checks import check_seconds
from bgtasks._locks import Lock
from bgtasks.integrations._agentflow_graphs import hook_graphs
from bgtasks.integrations._agentflow_manager import FrameworkManager
from bgtasks.integrations._agentflow_metrics import Totals
from bgtasks.integrations._agentflow_publisher import publisher_of, straight
from bgtasks.integrations._agentflow_references import rebind_names, replace_class

if TYPE_CHECKING:
    from bgtasks.events import BasePublisher

__all__ = ["Framework", "install", "publisher", "uninstall"]

# The packages and the extras that bring them; 10xGraph is the newer name of agentflow.
Framework: TypeAlias = Literal["tenxgraph", "agentflow"]
FRAMEWORKS: Final = get_args(Framework)


@dataclass(frozen=True)
class _Installation:
    module: ModuleType
    drain_timeout: float
    undo: contextlib.ExitStack


_installed: dict[str, _Installation] = {}
_lock = Lock()


def install(*frameworks: Framework, drain_timeout: float | None = None) -> None:
    """Replace the framework's ``BackgroundTaskManager`` with that of bgtasks, wherever it was or will be imported.

    Call it once, before the program builds its graphs; existing graphs keep their manager. A second call for the same
    framework does nothing, and one ``uninstall`` undoes both.

    Args:
        frameworks: ``"agentflow"``, ``"tenxgraph"`` or both; by default those that are installed.
        drain_timeout: seconds that ``shutdown`` and ``aclose`` let tasks finish before they cancel them, as a part of
            their timeout; 0 by default, as in the frameworks.

    Raises:
        MissingExtraError: the framework is not installed.
        InvalidOptionError: a framework is unknown, ``drain_timeout`` is not a number of seconds, or a former call had
            another ``drain_timeout``.

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
                    f"{name} is installed already, with drain_timeout={there.drain_timeout}: uninstall() it first"
                )
        for name, module in modules.items():
            if name not in _installed:
                _installed[name] = _install(name, module, drain_timeout or 0.0)


def uninstall(*frameworks: Framework) -> None:
    """Put the framework's own ``BackgroundTaskManager`` back; existing graphs keep their manager.

    Args:
        frameworks: as for ``install``; all by default. One that was not installed is left alone.

    Raises:
        InvalidOptionError: a framework is unknown.

    """
    with _lock:
        for name in _checked(frameworks) or list(_installed):
            module = sys.modules.get(_module_name(name))
            installation = _installed.pop(name if module is None else _package_of(module), None)
            if installation is not None:
                installation.undo.close()


# Any: the framework's class can be named only if the framework is installed.
def publisher(target: BasePublisher, framework: Framework | None = None) -> Any:
    """Return a publisher for ``StateGraph(publisher=...)`` that passes events on to a publisher of ``bgtasks.events``.

    It is an instance of the framework's own ``BasePublisher``. It encodes each event at once, because the frameworks
    change events afterwards. An event with the time of the framework's import gets the current time. With ``install()``
    this happens inside ``publish_event``, without a task per event, and the manager of the graph flushes the publisher
    before it cancels tasks. Without it, the framework starts a task per event, as usual.

    ``close`` and ``sync_close`` close both publishers. ``sync_close`` waits for that, unless a loop runs in this
    thread: that loop then closes them after the call.

    Args:
        target: the publisher of ``bgtasks.events``; its sink must take bytes.
        framework: ``"agentflow"`` or ``"tenxgraph"``; by default the one that is installed or, of two, imported.

    Raises:
        InvalidOptionError: ``target`` is not such a publisher, the framework is unknown, or two are possible.
        MissingExtraError: the framework is not installed.

    Example:
        >>> graph = StateGraph(publisher=agentflow.publisher(Publisher(RedisSink("redis://localhost:6379/0"))))

    """
    name = _package_of(_manager_module(_the_one() if framework is None else _checked((framework,))[0]))
    return publisher_of(name, target)


def _the_one() -> str:
    found = _found()
    imported = [name for name in found if name in sys.modules] if len(found) > 1 else found
    if len(imported) == 1:
        return imported[0]
    raise errors.InvalidOptionError(f"{' and '.join(found)} are installed: pass the one to use, framework={found[0]!r}")


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
        # 10xGraph installs a package "agentflow" that only refers to 10xGraph, and warns when imported.
        if spec is not None and PathFinder.find_spec(f"{name}.utils", spec.submodule_search_locations) is not None:
            found.append(name)
    if not found:
        raise errors.missing_extra("agentflow", "agentflow, or tenxgraph by its own extra,", "replace its task manager")
    return found


def _manager_module(name: str) -> ModuleType:
    if importlib.util.find_spec(name) is None:
        raise errors.missing_extra(name, name, "replace its task manager")
    return importlib.import_module(_module_name(name))


def _module_name(name: str) -> str:
    return f"{name}.utils.background_task_manager"


def _package_of(module: ModuleType) -> str:
    # Not the given name, which may be the alias.
    return module.__name__.partition(".")[0]


def _install(name: str, module: ModuleType, drain_timeout: float) -> _Installation:
    original: type = module.BackgroundTaskManager
    totals = Totals(module.metrics)
    replacement = type(
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
        undo.callback(replace_class, replacement, original)
        replace_class(original, replacement)
        by_task = publishers.publish_event
        queued = straight(by_task, importlib.import_module(f"{name}.utils.injection").fresh)
        undo.callback(rebind_names, queued, by_task)
        rebind_names(by_task, queued)
        undo.callback(totals.detach)
        totals.attach()
        undo.enter_context(hook_graphs(graphs, publishers, original, replacement))
        return _Installation(module, drain_timeout, undo.pop_all())
