"""Managers that arrive in functions by themselves, out of InjectQ containers (extra ``inject``).

InjectQ's own ``Inject[X]`` default keeps the first object it resolved, and its singleton scope the first object it gave
out: after a new binding both still give the old one, and for a class that nobody bound they quietly build an object.
What is here looks into the active container at each call, and where that holds no manager it says how to bind one.
"""

# ruff: noqa: SLF001  InjectQ's registry tells whether something is bound

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, overload

from bgtasks import errors
from bgtasks.manager import BackgroundTaskManager

try:
    import injectq
    from injectq.utils import get_function_dependencies
except ModuleNotFoundError as error:
    if error.name != "injectq":
        raise
    raise errors.missing_extra("inject", "InjectQ", "inject managers") from None

__all__ = ["Inject", "bind", "inject", "lookup"]

Function = TypeVar("Function", bound=Callable[..., Any])


def bind(
    container: injectq.InjectQ | None = None, manager: BackgroundTaskManager | None = None
) -> BackgroundTaskManager:
    """Put a manager into a container and tie its life to it: the container keeps the manager.

    A manager that was bound before is not shut down; like every manager it lives on until its tasks have ended, also
    when its container is cleared or collected. To have the tasks end with a block of the program, enter what is
    returned: ``async with bind(container) as manager``.

    Args:
        container: where to bind; the active container by default, which is InjectQ's global one if none is active.
        manager: what to bind; a new one by default.

    Returns:
        The manager.

    Raises:
        InvalidOptionError: ``container`` is no InjectQ container, or ``manager`` no manager.

    Example:
        >>> manager = bind()
        >>> @inject
        ... async def order(goods: str, task_manager: BackgroundTaskManager) -> None:
        ...     task_manager.create_task(send_receipt(goods), name="receipt")

    """
    if container is None:
        container = injectq.InjectQ.get_instance()
    elif not isinstance(container, injectq.InjectQ):
        raise errors.InvalidOptionError(f"container must be an InjectQ container, got {errors.describe(container)}")
    if manager is None:
        manager = BackgroundTaskManager()
    elif not isinstance(manager, BackgroundTaskManager):
        raise errors.InvalidOptionError(f"manager must be a BackgroundTaskManager, got {errors.describe(manager)}")
    # In the transient scope, which caches nothing: InjectQ itself then sees a later binding, too.
    container.bind(BackgroundTaskManager, manager, scope=injectq.ScopeType.TRANSIENT)
    return manager


# Of the ignored errors a checker sees one where InjectQ is installed and another where it is not.
class Inject(injectq.Inject):  # type: ignore[type-arg, misc, unused-ignore]  # Inject[X] is no class but an object
    """A default value that stands for what the active container holds at each use: ``Inject[BackgroundTaskManager]``.

    Works with ``@inject``, with InjectQ's own, and in a function without either.

    Args:
        service_type: the class to look up.

    Raises:
        ManagerNotBoundError: at its use, if the class is a manager's and the container holds none.

    Example:
        >>> def order(goods: str, task_manager: BackgroundTaskManager = Inject[BackgroundTaskManager]) -> None:
        ...     task_manager.create_task(send_receipt(goods), name="receipt")

    """

    def _resolve(self) -> Any:
        return lookup(self.service_type, optional=False)

    def _is_bound(self) -> bool:
        return bool(injectq.InjectQ.get_instance().has(self.service_type))

    def __getattribute__(self, name: str) -> Any:
        # Whoever only looks at a signature must not be told that nothing is bound yet.
        if name == "__class__" and not self._is_bound():
            return Inject
        return super().__getattribute__(name)

    def __repr__(self) -> str:
        return f"Inject[{self.service_type.__name__}]"

    def __eq__(self, other: object) -> bool:
        return self is other or bool(self._is_bound() and self._resolve() == other)

    __hash__ = injectq.Inject.__hash__


@overload
def inject(function: Function) -> Function: ...


@overload
def inject(*, container: injectq.InjectQ) -> Callable[[Function], Function]: ...


def inject(function: Any = None, *, container: injectq.InjectQ | None = None) -> Any:
    """Fill in the arguments that a caller leaves out, from a container, at each call.

    An ``Inject[X]`` default is looked up as X, any other parameter by its name, then by its annotation. A parameter
    with an ordinary default keeps that where nothing is bound. Unlike InjectQ's decorator this one lets the function's
    own errors through as they are, and builds no manager that nobody bound.

    Args:
        function: the function or coroutine function.
        container: where to look; the active container at the time of the call by default.

    Raises:
        InvalidOptionError: ``function`` is a class or cannot be called.
        ManagerNotBoundError: at a call, if a manager is wanted and the container holds none.

    Example:
        >>> @inject
        ... async def order(goods: str, task_manager: BackgroundTaskManager) -> None:
        ...     task_manager.create_task(send_receipt(goods), name="receipt")

    """
    if function is None:
        return functools.partial(inject, container=container)
    if isinstance(function, type) or not callable(function):
        raise errors.InvalidOptionError(f"@inject is for functions, got {errors.describe(function)}")
    signature = inspect.signature(function)
    wanted = get_function_dependencies(function)

    def missing(args: Any, kwargs: Any) -> tuple[inspect.BoundArguments, injectq.InjectQ, dict[str, Any]]:
        """Return the arguments given, the container, and what to look up for each argument to fill in."""
        given = signature.bind_partial(*args, **kwargs)
        source = injectq.InjectQ.get_instance() if container is None else container
        keys: dict[str, Any] = {}
        for name, kind in wanted.items():
            if name in given.arguments:
                continue
            default = signature.parameters[name].default
            if isinstance(default, injectq.Inject):
                keys[name] = kind
            elif source.has(name):
                keys[name] = name
            elif source.has(kind) or default is inspect.Parameter.empty:
                keys[name] = kind
        return given, source, keys

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def filled_async(*args: Any, **kwargs: Any) -> Any:
            given, source, keys = missing(args, kwargs)
            for name, key in keys.items():
                # Not aget() for all: what is no factory it builds anew each time, or not at all.
                is_async = inspect.iscoroutinefunction(source._registry.get_factory(key))
                given.arguments[name] = await source.aget(key) if is_async else _resolve(source, key)
            return await function(*given.args, **given.kwargs)

        return filled_async

    @functools.wraps(function)
    def filled(*args: Any, **kwargs: Any) -> Any:
        given, source, keys = missing(args, kwargs)
        for name, key in keys.items():
            given.arguments[name] = _resolve(source, key)
        return function(*given.args, **given.kwargs)

    return filled


def lookup(service_type: Any, *, optional: bool) -> Any:
    """Return what the active container holds for a class now; None if ``optional`` and nothing is bound.

    Raises:
        ManagerNotBoundError: the class is a manager's, not ``optional``, and none is bound.

    """
    container = injectq.InjectQ.get_instance()
    return None if optional and not container.has(service_type) else _resolve(container, service_type)


def _is_manager(key: Any) -> bool:
    return isinstance(key, type) and issubclass(key, BackgroundTaskManager)


def _resolve(container: injectq.InjectQ, key: Any) -> Any:
    """Return what a container holds under a key now; a manager is never built, and never None."""
    # InjectQ's get() answers from its singleton scope, which does not hear of a new binding.
    binding = container._registry.get_binding(key)
    if binding is not None and not container._registry.has_factory(key):
        found = binding.implementation
        if isinstance(found, type):
            found = container.get(key)
    elif _is_manager(key) and not container.has(key):
        raise errors.manager_not_bound(key)
    else:
        found = container.get(key)
    if found is None and _is_manager(key):
        raise errors.manager_not_bound(key)
    return found
