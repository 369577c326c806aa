"""An event of an agent program, with the fields of ``EventModel`` in agentflow and 10xGraph."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterator
from typing import Any

from bgtasks._fork import at_fork
from bgtasks.errors import missing_extra

try:
    import msgspec
except ModuleNotFoundError as _error:
    raise missing_extra("events", "msgspec", "make events") from _error

__all__ = ["EventModel"]


class _Ids:
    """Makes globally unique ids at the cost of a counter: a random prefix per process, then a number."""

    numbers: Iterator[str]

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Choose a new prefix; also called in the child of a fork."""
        self.numbers = map(f"{uuid.uuid4().hex}-{{}}".format, itertools.count())

    def next(self) -> str:
        """Return a new id."""
        return next(self.numbers)


_ids = _Ids()
at_fork(in_child=_ids.begin)


class EventModel(msgspec.Struct, kw_only=True, gc=False):
    """One event of an agent program.

    Each event has its own time and id; a reader can detect duplicates by the id. The garbage collector does not track
    events: ``data`` must not refer back to its event.

    Args:
        event: its source: ``"graph_execution"``, ``"node_execution"``, ``"tool_execution"``, ``"streaming"``.
        event_type: its phase: ``"start"``, ``"progress"``, ``"result"``, ``"end"``, ``"update"``, ``"error"``.
        content: streamed text.
        content_blocks: structured content.
        data: further data.
        content_type: the kinds of content.
        node_name: the node that emitted it.
        run_id: the run it belongs to.
        thread_id: the conversation it belongs to.
        user_id: the user it belongs to.
        timestamp: its creation, in seconds since 1970.
        is_error: whether it reports an error.
        metadata: further data for its readers.
        event_id: globally unique.

    Example:
        >>> EventModel(event="node_execution", event_type="start", thread_id="t1", node_name="plan").node_name
        'plan'

    """

    event: str
    event_type: str
    content: str = ""
    content_blocks: list[Any] | None = None
    data: dict[str, Any] = {}
    content_type: list[str] | None = None
    node_name: str = ""
    run_id: str = ""
    thread_id: str | int = ""
    user_id: str | int | None = None
    timestamp: float = msgspec.field(default_factory=time.time)
    is_error: bool = False
    metadata: dict[str, Any] = {}
    event_id: str = msgspec.field(default_factory=_ids.next)
