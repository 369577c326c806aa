"""A span of OpenTelemetry for each task of a traced manager; other managers execute nothing of it."""

# ruff: noqa: SLF001  a traced manager has other functions in the place of its own

from __future__ import annotations

import asyncio
import logging
from asyncio.events import _get_running_loop
from collections.abc import Callable, Container, Coroutine, Mapping
from contextvars import Context, copy_context
from functools import partial
from typing import Any, Final, Literal, TypeAlias, TypeVar, get_args

from opentelemetry.context import Context as TraceContext
from opentelemetry.context import attach, get_current
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    Span,
    Status,
    StatusCode,
    Tracer,
    get_current_span,
    get_tracer,
    set_span_in_context,
)

from bgtasks._checks import check_choice
from bgtasks.errors import InvalidOptionError, describe, text_of
from bgtasks.registry import Record
from bgtasks.watch._published import checked_manager, encodable

__all__ = ["SpanParent", "trace"]

logger: Final = logging.getLogger("bgtasks.watch")

Result = TypeVar("Result")

SpanParent: TypeAlias = Literal["link", "child"]

# The functions of a manager that tracing replaces.
REPLACED: Final = ("create_task", "fire", "_report", "_on_abandoned")


def trace(
    manager: Any,
    *,
    parent: SpanParent = "link",
    names: Container[str] | None = None,
    tracer: Tracer | None = None,
    name: str = "default",
) -> None:
    """Have a span for each task that a manager starts from now on.

    A span begins with the creation of the task and ends with the task; in the task it is the current span. Its name is
    that of the task. It has the attributes ``bgtasks.manager``, ``bgtasks.task.name``, ``bgtasks.task.coroutine``,
    ``bgtasks.task.id`` and ``bgtasks.task.outcome``. A failure is recorded with its traceback. ``create_task``,
    ``fire``, ``spawn`` and ``create_task_threadsafe`` make spans; executors and ``task_factory`` do not.

    Without this call, no task executes a single instruction for traces. With it, tasks run in a context of their own:
    of one that is passed as ``contextvars_context``, a copy. The ``context`` of a task is a copy, too. Submitted
    functions, the runs of schedules, and services have no spans.

    Args:
        manager: the manager.
        parent: ``"link"``: each span is the root of a new trace, linked to the caller's span, so that a trace of a
            request ends with the request; ``"child"``: it is a child of the caller's span.
        names: trace only tasks with these names; None for all.
        tracer: what makes the spans; one of the global provider by default.
        name: the attribute ``bgtasks.manager`` of the spans.

    Raises:
        InvalidOptionError: an argument has an invalid value, or the manager is traced already.
        MissingExtraError: on import, if ``opentelemetry-api`` is not installed.

    Example:
        >>> async def main():
        ...     async with BackgroundTaskManager() as manager:
        ...         trace(manager, parent="child", names={"greeting"})
        ...         manager.create_task(send("hello"), name="greeting")
        ...         await manager.wait_for_all()
        >>> asyncio.run(main())

    """
    check_choice("parent", parent, get_args(SpanParent))
    checked_manager(manager)
    if isinstance(names, str) or not (names is None or hasattr(names, "__contains__")):
        raise InvalidOptionError(f"names must be a set of names, or None; got {describe(names)}")
    if isinstance(getattr(manager.create_task, "__self__", None), _Tracing):
        raise InvalidOptionError("this manager is traced already: call trace() once for each manager")
    tracer = get_tracer("bgtasks") if tracer is None else tracer
    tracing = _Tracing(manager, partial(_start_span, tracer, parent, name), names)
    for function in REPLACED:
        setattr(manager, function, getattr(tracing, function))
    # Otherwise the ends of tasks that do not fail are reported only while their log records are wanted.
    manager._muted = None


def _start_span(tracer: Tracer, parent: SpanParent, manager: str, name: str, coro: Any) -> Span:
    """Start the span of a task, without making it the current one."""
    caller = get_current_span().get_span_context()
    is_root = parent == "link"
    # The baggage of the caller is kept.
    context: TraceContext = set_span_in_context(INVALID_SPAN) if is_root else get_current()
    attributes = {
        "bgtasks.manager": manager,
        "bgtasks.task.name": name,
        "bgtasks.task.coroutine": _coroutine_name(coro),
    }
    links = [Link(caller)] if is_root and caller.is_valid else []
    return tracer.start_span(name, context, attributes=attributes, links=links)


def _coroutine_name(coro: Any) -> str:
    name: str = getattr(coro, "__qualname__", None) or type(coro).__qualname__
    return name


class _TaskContext(dict[str, Any]):
    """The context of a traced task, by which the end of the task finds the span."""

    __slots__ = ("span",)

    span: Span


class _Tracing:
    """The functions of a traced manager."""

    def __init__(self, manager: Any, start: Callable[[str, Any], Span], names: Container[str] | None) -> None:
        self._original_create_task: Callable[..., asyncio.Task[Any]] = manager.create_task
        self._original_fire: Callable[..., bool] = manager.fire
        self._original_report: Callable[[Record, BaseException | None], BaseException | None] = manager._report
        self._original_on_abandoned: Callable[[dict[str, int]], None] = manager._on_abandoned
        self._start = start
        self._names = names
        # The spans that have not ended, with the loops of their tasks: those of a closed loop are abandoned unreported.
        self._open: dict[Span, asyncio.AbstractEventLoop] = {}

    def create_task(
        self,
        coro: Coroutine[Any, Any, Result],
        *,
        name: str | None = None,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
        eager_start: bool = False,
        contextvars_context: Context | None = None,
        service: bool = False,
        retry: None = None,
    ) -> asyncio.Task[Result]:
        """Start a task in a span; see ``BackgroundTaskManager.create_task``."""
        options: dict[str, Any] = {"name": name, "timeout": timeout, "eager_start": eager_start}
        options.update(service=service, retry=retry)
        begun = self._begin(coro, name, context, contextvars_context)
        if begun is None:
            return self._original_create_task(coro, **options, context=context, contextvars_context=contextvars_context)
        carrier, variables = begun
        try:
            return self._original_create_task(coro, **options, context=carrier, contextvars_context=variables)
        except BaseException as error:
            self._end(carrier.span, "rejected", error)
            raise

    def fire(
        self,
        coro: Coroutine[Any, Any, Any],
        *,
        name: str | None = None,
        timeout: float | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> bool:
        """Start a task in a span; see ``BackgroundTaskManager.fire``."""
        begun = self._begin(coro, name, context, None)
        if begun is None:
            return self._original_fire(coro, name=name, timeout=timeout, context=context)
        carrier, variables = begun
        try:
            is_accepted = variables.run(self._original_fire, coro, name=name, timeout=timeout, context=carrier)
        except BaseException as error:
            self._end(carrier.span, "rejected", error)
            raise
        if not is_accepted:
            self._end(carrier.span, "dropped")
        return is_accepted

    def _begin(self, coro: Any, name: Any, context: Any, variables: Any) -> tuple[_TaskContext, Context] | None:
        """Start a span; return the contexts of the task, None if it is not traced, or cannot start."""
        name = _coroutine_name(coro) if name is None else str(name)
        has_valid_arguments = isinstance(context, (Mapping, type(None))) and isinstance(
            variables, (Context, type(None))
        )
        if not has_valid_arguments or (self._names is not None and name not in self._names):
            return None
        loop = _get_running_loop()
        if loop is None:
            return None
        try:
            span = self._start(encodable(name), coro)
        except Exception:
            logger.exception("The tracer failed; task %r has no span", name)
            return None
        carrier = _TaskContext(() if context is None else context)
        carrier.span = span
        variables = copy_context() if variables is None else variables.copy()
        variables.run(lambda: attach(set_span_in_context(span)))
        self._open[span] = loop
        return carrier, variables

    def _report(self, record: Record, error: BaseException | None) -> BaseException | None:
        context = record.context
        if isinstance(context, _TaskContext):
            self._end(context.span, record.outcome, error, record.task_id)
        return self._original_report(record, error)

    def _on_abandoned(self, names: dict[str, int]) -> None:
        for span, loop in list(self._open.items()):
            if loop.is_closed():
                self._end(span, "abandoned")
        self._original_on_abandoned(names)

    def _end(self, span: Span, outcome: str, error: BaseException | None = None, task_id: int | None = None) -> None:
        """End a span unless it has ended; log the errors of the tracer."""
        if self._open.pop(span, None) is None:
            return
        try:
            if task_id is not None:
                span.set_attribute("bgtasks.task.id", task_id)
            span.set_attribute("bgtasks.task.outcome", outcome)
            if error is not None and outcome in ("failed", "rejected"):
                span.set_attribute("error.type", type(error).__qualname__)
                span.record_exception(error)
                span.set_status(Status(StatusCode.ERROR, text_of(error)))
            elif outcome not in ("completed", "cancelled"):
                span.set_status(Status(StatusCode.ERROR, outcome.replace("_", " ")))
            span.end()
        except Exception:
            logger.exception("The tracer failed at the end of a span")
