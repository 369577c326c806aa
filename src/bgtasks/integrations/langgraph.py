"""The executors in the place of LangGraph's own.

::

    from bgtasks.integrations import langgraph

    langgraph.install()      # graphs that start from now on run on bgtasks
    langgraph.uninstall()    # and from now on on LangGraph's own executors again

LangGraph makes an executor for each run of a graph. Its loop imported the two classes by name, so that a new value in
the module that defines them would change nothing: ``install`` looks for them in every module of LangGraph. What a run
asks of an executor is more than its signature says; the classes below say what they add for it.

Importing this module needs no LangGraph; using it does.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import importlib
import sys
import threading
from collections.abc import Callable, Container, Mapping
from types import ModuleType
from typing import Any, ClassVar, Final, NamedTuple, TypeAlias

from bgtasks import errors, executor
from bgtasks._internals import ManagerInternals
from bgtasks.manager import BackgroundTaskManager

__all__ = ["AsyncBackgroundExecutor", "BackgroundExecutor", "install", "uninstall"]

AnyFuture: TypeAlias = "asyncio.Future[Any] | concurrent.futures.Future[Any]"


class _LangGraph(NamedTuple):
    """What is LangGraph's own: objects that it compares with, so that copies would not do."""

    originals: tuple[type, type]
    bubble_up: type[BaseException]
    skipped: Container[AnyFuture]
    run_node: Callable[..., Any]


@functools.cache
def _load() -> _LangGraph:
    """Import LangGraph, with every module of it that holds an executor's class."""
    try:
        importlib.import_module("langgraph.pregel")
    except ModuleNotFoundError as error:
        if error.name not in ("langgraph", "langgraph.pregel"):
            raise
        raise errors.missing_extra("langgraph", "langgraph", "run its graphs on bgtasks") from error
    try:
        failures, executors, _, runner = (
            importlib.import_module(f"langgraph.{name}")
            for name in ("errors", "pregel._executor", "pregel._loop", "pregel._runner")
        )
        originals = (executors.BackgroundExecutor, executors.AsyncBackgroundExecutor)
        return _LangGraph(originals, failures.GraphBubbleUp, runner.SKIP_RERAISE_SET, runner.run_with_retry)
    except (AttributeError, ModuleNotFoundError) as error:
        raise errors.missing_extra("langgraph", "a release of langgraph from 1.0 on", "know its executors") from error


# The manager given to install(), and what makes two calls from two threads one after the other.
_manager: BackgroundTaskManager | None = None
_lock: Final = threading.Lock()


class _Rules:
    """What a run of a graph asks of its executor beyond what ours do by themselves."""

    _zero_is_no_limit: ClassVar[bool] = True
    _decides_late: ClassVar[bool] = True

    _was_given_manager: bool

    def _chosen(self, manager: BackgroundTaskManager | None) -> BackgroundTaskManager | None:
        """Return the manager that the run gets: the one given, or else that of ``install``, which may be none."""
        _load()
        manager = _manager if manager is None else manager
        self._was_given_manager = manager is not None
        return manager

    def _reports(self, error: BaseException) -> bool:
        """Report nothing by ourselves: the run hands its failures to its caller, to a handler, or to a waiting node.

        A manager that the program gave reports them as it does for any task; an interrupt is no failure anywhere.
        """
        return self._was_given_manager and not isinstance(error, _load().bubble_up)

    def _reraises(self, future: AnyFuture) -> bool:
        """Raise no interrupt, and nothing that the run has taken care of by the time of the exit."""
        langgraph = _load()
        return not isinstance(future.exception(), langgraph.bubble_up) and future not in langgraph.skipped


class BackgroundExecutor(_Rules, executor.BackgroundExecutor):
    """Runs the functions of one run of a graph in threads, as LangGraph's class of this name does.

    On exit it waits for every function that runs, those with ``__cancel_on_exit__`` included, as LangGraph's does: a
    node that outlived its run would write to a checkpointer that the program has closed.

    What it adds to ``bgtasks.BackgroundExecutor``: ``max_concurrency`` 0 is no limit, as None is; a ``GraphBubbleUp``,
    by which a node interrupts its graph, is not raised on exit, and neither is the exception of a future in LangGraph's
    ``SKIP_RERAISE_SET``, whenever it was put there. Failures are logged only by a manager that was given.

    Args:
        config: a ``RunnableConfig``; of its keys ``max_concurrency`` counts.
        manager: keeps the tasks; None for the one given to ``install``, or else one of its own.

    Raises:
        InvalidOptionError: ``max_concurrency`` is no whole number, or negative.
        MissingExtraError: LangGraph is not installed.

    """

    def __init__(self, config: Mapping[str, Any], *, manager: BackgroundTaskManager | None = None) -> None:
        super().__init__(config, manager=self._chosen(manager), abandon_running=False)

    def submit(
        self, fn: Callable[..., Any], /, *args: Any, __name__: str | None = None, **options: Any
    ) -> concurrent.futures.Future[Any]:
        """Run a function in a thread, as ``bgtasks.BackgroundExecutor.submit`` does.

        LangGraph names a node only where it hands in a coroutine: here a node gets its name, too.
        """
        if __name__ is None and fn is _load().run_node:
            __name__ = args[0].name
        return super().submit(fn, *args, __name__=__name__, **options)


class AsyncBackgroundExecutor(_Rules, executor.AsyncBackgroundExecutor):
    """Runs the coroutines of one run of a graph as tasks, as LangGraph's class of this name does.

    What it adds to ``bgtasks.AsyncBackgroundExecutor`` is what ``BackgroundExecutor`` adds to its base. An exit that
    is cancelled settles its tasks first, where LangGraph's leaves them running.

    Args:
        config: a ``RunnableConfig``; of its keys ``max_concurrency`` counts.
        manager: keeps the tasks; None for the one given to ``install``, or else one of its own.

    Raises:
        InvalidOptionError: ``max_concurrency`` is no whole number, or negative.
        MissingExtraError: LangGraph is not installed.

    """

    def __init__(self, config: Mapping[str, Any], *, manager: BackgroundTaskManager | None = None) -> None:
        super().__init__(config, manager=self._chosen(manager))


OURS: Final[tuple[type, type]] = (BackgroundExecutor, AsyncBackgroundExecutor)


def install(*, manager: BackgroundTaskManager | None = None) -> None:
    """Have every graph that starts from now on run on bgtasks, until ``uninstall``.

    It may be called before LangGraph is imported, which it does then, or after, and from any thread. A second call
    changes nothing but the manager.

    Args:
        manager: keeps the tasks of all graphs, and shows them; None for one a run.

    Raises:
        InvalidOptionError: ``manager`` is no manager.
        MissingExtraError: LangGraph is not installed, or in a release that has its executors elsewhere.

    Example:
        >>> manager = BackgroundTaskManager()
        >>> install(manager=manager)
        >>> await graph.ainvoke({"question": "..."})
        >>> manager.stats()["names"]

    """
    global _manager
    if manager is not None:
        ManagerInternals(manager)
    with _lock:
        _replace(_load().originals, OURS)
        _manager = manager


def uninstall() -> None:
    """Put LangGraph's own executors back; without ``install`` before, do nothing.

    Runs that have begun end on the executors they began with.
    """
    global _manager
    with _lock:
        _manager = None
        if _load.cache_info().currsize:
            _replace(OURS, _load().originals)


def _replace(old: tuple[type, type], new: tuple[type, type]) -> None:
    """Put new classes in the place of old ones wherever a loaded module of LangGraph has them as a global."""
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] != "langgraph" or not isinstance(module, ModuleType):
            continue
        for name, value in list(vars(module).items()):
            for one, other in zip(old, new, strict=True):
                if value is one:
                    setattr(module, name, other)
