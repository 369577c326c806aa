"""Runs the graphs of LangGraph on the executors of bgtasks.

::

    from bgtasks.integrations import langgraph

    langgraph.install()      # graphs that start from now on run on bgtasks
    langgraph.uninstall()    # graphs that start from now on run on LangGraph's own executors again

LangGraph makes an executor for each run of a graph. Its loop imported the two classes by name, so replacing them only
in the module that defines them would change nothing: ``install`` replaces them in every module of LangGraph. A run
needs more from an executor than its signature says; the classes below list these rules.

Importing this module needs no LangGraph; using it does.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import importlib
import sys
from collections.abc import Callable, Container, Mapping
from types import ModuleType
from typing import Any, ClassVar, Final, NamedTuple, TypeAlias, TypeVar

from bgtasks import errors, executor
from bgtasks._internals import ManagerInternals
from bgtasks._locks import Lock
from bgtasks.executor._submit import typed_submit
from bgtasks.manager import BackgroundTaskManager

__all__ = ["AsyncBackgroundExecutor", "BackgroundExecutor", "install", "uninstall"]

Result = TypeVar("Result")

AnyFuture: TypeAlias = "asyncio.Future[Any] | concurrent.futures.Future[Any]"


class _LangGraph(NamedTuple):
    """Objects of LangGraph that it compares by identity, so that copies would not do."""

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


# The manager given to install(), and the lock for calls from several threads.
_manager: BackgroundTaskManager | None = None
_lock: Final = Lock()


class _Rules:
    """The rules of a graph's run that the executors of bgtasks do not have by themselves."""

    _zero_is_no_limit: ClassVar[bool] = True
    _decides_late: ClassVar[bool] = True

    _was_given_manager: bool

    def _chosen(self, manager: BackgroundTaskManager | None) -> BackgroundTaskManager | None:
        """Return the manager for the run: the given one, or else that of ``install``, which may be None."""
        _load()
        manager = _manager if manager is None else manager
        self._was_given_manager = manager is not None
        return manager

    def _context_of(self, config: Mapping[str, Any] | None) -> Mapping[str, object] | None:
        """Return the ids of the run: its ``thread_id`` and ``run_id``, as far as the config names them."""
        if config is None:
            return None
        places = (config, config.get("configurable") or {}, config.get("metadata") or {})
        found = {}
        for name in ("thread_id", "run_id"):
            value = next((place[name] for place in places if place.get(name) is not None), None)
            if value is not None:
                found[name] = str(value)
        return found or None

    def _reports(self, error: BaseException) -> bool:
        """Report failures only to a given manager: the run passes them to its caller, a handler or a waiting node.

        A given manager reports them as it does for any task. An interrupt is never a failure.
        """
        return self._was_given_manager and not isinstance(error, _load().bubble_up)

    def _reraises(self, future: AnyFuture, error: BaseException) -> bool:
        """Raise no interrupt, and no failure that the run has handled by the time of the exit."""
        langgraph = _load()
        return not isinstance(error, langgraph.bubble_up) and future not in langgraph.skipped


class BackgroundExecutor(_Rules, executor.BackgroundExecutor):
    """Runs the functions of one run of a graph in threads, as LangGraph's class of this name does.

    On exit it waits for every running function, those with ``__cancel_on_exit__`` included, as LangGraph's does: a node
    that outlived its run would write to a checkpointer that the program has closed.

    It differs from ``bgtasks.BackgroundExecutor`` in some rules. A ``max_concurrency`` of 0 means no limit, as None
    does. A ``GraphBubbleUp``, with which a node interrupts its graph, is not raised on exit, nor is the exception of a
    future in LangGraph's ``SKIP_RERAISE_SET``, whenever it was put there. Failures are logged only by a given manager.
    The context of its tasks has the ``thread_id`` and the ``run_id`` of the run, as far as the config names them.

    Args:
        config: a ``RunnableConfig``; of its keys ``max_concurrency`` is used, and what names the run.
        manager: the manager that keeps the tasks; None for that of ``install``, or else a new one.

    Raises:
        InvalidOptionError: ``max_concurrency`` is not a whole number, or is negative.
        MissingExtraError: LangGraph is not installed.

    """

    def __init__(self, config: Mapping[str, object], *, manager: BackgroundTaskManager | None = None) -> None:
        super().__init__(config, manager=self._chosen(manager), abandon_running=False)

    @typed_submit
    def submit(
        self,
        fn: Callable[..., Result],
        /,
        *args: Any,
        __name__: str | None = None,
        __cancel_on_exit__: bool = False,
        __reraise_on_exit__: bool = True,
        __next_tick__: bool = False,
        __timeout__: float | None = None,
        **kwargs: Any,
    ) -> concurrent.futures.Future[Result]:
        """Run a function in a thread, as ``bgtasks.BackgroundExecutor.submit`` does.

        LangGraph names a node only if it submits a coroutine; this method names a node of a function, too.
        """
        if __name__ is None and fn is _load().run_node:
            __name__ = args[0].name
        return super().submit(
            fn,
            *args,
            __name__=__name__,
            __cancel_on_exit__=__cancel_on_exit__,
            __reraise_on_exit__=__reraise_on_exit__,
            __next_tick__=__next_tick__,
            __timeout__=__timeout__,
            **kwargs,
        )


class AsyncBackgroundExecutor(_Rules, executor.AsyncBackgroundExecutor):
    """Runs the coroutines of one run of a graph as tasks, as LangGraph's class of this name does.

    It differs from ``bgtasks.AsyncBackgroundExecutor`` as ``BackgroundExecutor`` does from its base. A cancelled exit
    waits for its cancelled tasks first; LangGraph's leaves them running.

    Args:
        config: a ``RunnableConfig``; of its keys ``max_concurrency`` is used, and what names the run.
        manager: the manager that keeps the tasks; None for that of ``install``, or else a new one.

    Raises:
        InvalidOptionError: ``max_concurrency`` is not a whole number, or is negative.
        MissingExtraError: LangGraph is not installed.

    """

    def __init__(self, config: Mapping[str, object], *, manager: BackgroundTaskManager | None = None) -> None:
        super().__init__(config, manager=self._chosen(manager))


REPLACEMENTS: Final[tuple[type, type]] = (BackgroundExecutor, AsyncBackgroundExecutor)


def install(*, manager: BackgroundTaskManager | None = None) -> None:
    """Have every graph that starts from now on run on bgtasks, until ``uninstall``.

    It may be called from any thread, before or after LangGraph is imported; it imports LangGraph itself. A second call
    changes only the manager.

    Args:
        manager: the manager that keeps and shows the tasks of all graphs; None for a new one per run.

    Raises:
        InvalidOptionError: ``manager`` is not a manager.
        MissingExtraError: LangGraph is not installed, or its release has its executors elsewhere.

    Example:
        >>> manager = BackgroundTaskManager()
        >>> install(manager=manager)
        >>> answer = graph.invoke({"question": "how many?"})
        >>> sorted(manager.stats()["names"])
        ['ask', 'search']

    """
    global _manager
    if manager is not None:
        ManagerInternals(manager)
    with _lock:
        _replace(_load().originals, REPLACEMENTS)
        _manager = manager


def uninstall() -> None:
    """Put LangGraph's own executors back; without ``install`` before, do nothing.

    Runs that have begun keep their executors.
    """
    global _manager
    with _lock:
        _manager = None
        if _load.cache_info().currsize:
            _replace(REPLACEMENTS, _load().originals)


def _replace(old: tuple[type, type], new: tuple[type, type]) -> None:
    """Replace classes in the globals of every loaded module of LangGraph."""
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] != "langgraph" or not isinstance(module, ModuleType):
            continue
        for name, value in list(vars(module).items()):
            for one, other in zip(old, new, strict=True):
                if value is one:
                    setattr(module, name, other)
