"""Managers for the parameters of graph nodes that ask for one."""

# ruff: noqa: SLF001  the replaced methods are private in the frameworks

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import injectq


def give_manager(node: Any, manager: object, kinds: tuple[type, ...]) -> None:
    """Have a node called with its graph's manager for each parameter that asks for one, by annotation or default.

    Args:
        node: a node of the framework; one without a function, or without such a parameter, is not changed.
        manager: the manager.
        kinds: the classes that count as a manager.

    """
    names = _names_of_parameters(node.func, kinds)
    if not names:
        return
    given = dict.fromkeys(names, manager)
    # With these arguments filled in, the framework sees a function with the other parameters only.
    rest = SimpleNamespace(func=functools.partial(node.func, **given), _get_cached_signature=inspect.signature)
    for handler in (node.invoke_handler, node.stream_handler):
        handler._prepare_input_data = functools.partial(_prepare, type(handler)._prepare_input_data, rest, given)


def _prepare(prepare: Callable[..., dict[str, Any]], rest: Any, given: dict[str, Any], *args: Any) -> dict[str, Any]:
    return {**prepare(rest, *args), **given}


def _names_of_parameters(function: Any, kinds: tuple[type, ...]) -> list[str]:
    """Return the names of the parameters that ask for a manager."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    try:
        hints = typing.get_type_hints(function)
    except Exception:
        # A name that exists only for type checkers, or not a function: use the annotations as they are.
        hints = {}
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        parameter.name
        for parameter in parameters
        if parameter.kind in by_keyword
        and (
            _is_manager(hints.get(parameter.name, parameter.annotation), kinds)
            if parameter.default is inspect.Parameter.empty
            else issubclass(type(parameter.default), injectq.Inject) and parameter.default.service_type in kinds
        )
    ]


def _is_manager(annotation: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(annotation, str):
        return any(part.strip().rpartition(".")[2] == "BackgroundTaskManager" for part in annotation.split("|"))
    return any(part is kind for part in (annotation, *typing.get_args(annotation)) for kind in kinds)
