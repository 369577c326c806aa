"""Injects managers into functions, from InjectQ containers (extra ``inject``).

InjectQ's own ``Inject[X]`` default keeps the first object that it resolved, and its singleton scope the first object
that it returned. After a new binding both still return the old object, and for an unbound class they silently build
one. The functions here look into the active container at each call; if it holds no manager, their error says how to
bind one.
"""

# ruff: noqa: SLF001  InjectQ's registry tells whether something is bound

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, overload

from bgtasks import errors
from bgtasks.manager import BackgroundTaskManager

try:
    import injectq
    from injectq.utils import get_function_dependencies
except ModuleNotFoundError as _error:
    if _error.name != "injectq":
        raise
    raise errors.missing_extra("inject", "InjectQ", "inject managers") from None

__all__ = ["Inject", "bind", "inject", "lookup"]

Result = TypeVar("Result")
Service = TypeVar("Service")


def bind(
    container: injectq.InjectQ | None = None, manager: BackgroundTaskManager | None = None
) -> BackgroundTaskManager:
    """Bind a manager in a container, which keeps it alive.

    A manager that was bound before is not shut down. Like every manager it lives until its tasks have ended, even if
    its container is cleared or collected. To end the tasks with a block of the program, enter the returned manager:
    ``async with bind(container) as manager``.

    Args:
        container: the container; the active one by default, which is InjectQ's global one if none is active.
        manager: the manager; a new one by default.

    Returns:
        The manager.

    Raises:
        InvalidOptionError: ``container`` is not an InjectQ container, or ``manager`` is not a manager.

    Example:
        >>> @inject
        ... async def order(goods: str, task_manager: BackgroundTaskManager) -> None:
        ...     task_manager.create_task(send_receipt(goods), name="receipt")
        >>> async def main():
        ...     async with bind() as manager:
        ...         await order("tea")
        ...         await manager.wait_for_all()
        >>> asyncio.run(main())
        a receipt for tea

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


if TYPE_CHECKING:
    _InjectBase: TypeAlias = injectq.Inject[Any]
else:
    # At run time injectq.Inject[X] is an object, not a class.
    _InjectBase = injectq.Inject


# The ignored error exists only without InjectQ.
class Inject(_InjectBase):  # type: ignore[misc, unused-ignore]
    """A default value that is looked up in the active container at each use: ``Inject[BackgroundTaskManager]``.

    It works with ``@inject``, with InjectQ's own decorator, and without either.

    Args:
        service_type: the class to look up.

    Raises:
        ManagerNotBoundError: at its use, if the class is a manager class and the container holds no manager.

    Example:
        >>> def order(goods: str, task_manager: BackgroundTaskManager = Inject[BackgroundTaskManager]) -> None:
        ...     task_manager.create_task(send_receipt(goods), name="receipt")
        >>> async def main():
        ...     async with bind() as manager:
        ...         order("tea")
        ...         await manager.wait_for_all()
        >>> asyncio.run(main())
        a receipt for tea

    """

    def _resolve(self) -> Any:
        return lookup(self.service_type, optional=False)

    def _is_bound(self) -> bool:
        return bool(injectq.InjectQ.get_instance().has(self.service_type))

    def __getattribute__(self, name: str) -> Any:
        # Reading a signature must not raise because nothing is bound yet.
        if name == "__class__" and not self._is_bound():
            return Inject
        return super().__getattribute__(name)

    def __repr__(self) -> str:
        return f"Inject[{self.service_type.__name__}]"

    def __eq__(self, other: object) -> bool:
        return self is other or bool(self._is_bound() and self._resolve() == other)

    def __hash__(self) -> int:
        return super().__hash__()


# The result takes any arguments: a type cannot say which of them may be left out.
@overload
def inject(function: Callable[..., Result]) -> Callable[..., Result]: ...


@overload
def inject(*, container: injectq.InjectQ | None = None) -> Callable[[Callable[..., Result]], Callable[..., Result]]: ...


def inject(function: Any = None, *, container: injectq.InjectQ | None = None) -> Any:
    """Fill in missing arguments from a container, at each call.

    An ``Inject[X]`` default is looked up as X, any other parameter by its name, then by its annotation. A parameter
    with an ordinary default keeps it if nothing is bound. Unlike InjectQ's decorator, this one does not change the
    function's own errors, and never builds an unbound manager.

    Args:
        function: the function or coroutine function.
        container: the container; the one that is active at the call by default.

    Raises:
        InvalidOptionError: ``function`` is a class or cannot be called.
        ManagerNotBoundError: at a call, if a manager is wanted and the container holds none.

    Example:
        >>> @inject
        ... async def order(goods: str, task_manager: BackgroundTaskManager) -> None:
        ...     task_manager.create_task(send_receipt(goods), name="receipt")
        >>> async def main():
        ...     async with bind() as manager:
        ...         await order("tea")
        ...         await manager.wait_for_all()
        >>> asyncio.run(main())
        a receipt for tea

    """
    if function is None:
        return functools.partial(inject, container=container)
    if isinstance(function, type) or not callable(function):
        raise errors.InvalidOptionError(f"@inject is for functions, got {errors.describe(function)}")
    signature = inspect.signature(function)
    wanted = get_function_dependencies(function)

    def missing(args: Any, kwargs: Any) -> tuple[inspect.BoundArguments, injectq.InjectQ, dict[str, Any]]:
        """Return the given arguments, the container, and the key to look up for each missing argument."""
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
                # Only for async factories: aget() builds any other object anew each time, or not at all.
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


@overload
def lookup(service_type: type[Service], *, optional: Literal[False]) -> Service: ...


@overload
def lookup(service_type: type[Service], *, optional: bool) -> Service | None: ...


def lookup(service_type: type[Service], *, optional: bool) -> Service | None:
    """Return the object that the active container holds for a class; None if ``optional`` and nothing is bound.

    Raises:
        ManagerNotBoundError: the class is a manager class, not ``optional``, and no manager is bound.

    """
    container = injectq.InjectQ.get_instance()
    return None if optional and not container.has(service_type) else _resolve(container, service_type)


def _is_manager(key: Any) -> bool:
    return isinstance(key, type) and issubclass(key, BackgroundTaskManager)


def _resolve(container: injectq.InjectQ, key: Any) -> Any:
    """Return the object that a container holds for a key; a manager is never built, and never None."""
    # InjectQ's get() reads its singleton scope, which a new binding does not update.
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
