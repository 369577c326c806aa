"""An event of agent programs, with the fields that agentflow's and 10xGraph's ``EventModel`` have."""

from __future__ import annotations

import itertools
import os
import time
import uuid
from collections.abc import Iterator
from typing import Any

from bgtasks.errors import missing_extra

try:
    import msgspec
except ModuleNotFoundError as error:
    raise missing_extra("events", "msgspec", "make events") from error

__all__ = ["EventModel"]


class _Ids:
    """Makes ids that are unique for all time at the price of a counter: a random prefix for the process, a number."""

    numbers: Iterator[str]

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Take a new prefix; in the child of a fork, too."""
        self.numbers = map(f"{uuid.uuid4().hex}-{{}}".format, itertools.count())

    def next(self) -> str:
        """Return a new id."""
        return next(self.numbers)


_ids = _Ids()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_ids.begin)


class EventModel(msgspec.Struct, kw_only=True, gc=False):
    """One event of an agent program.

    Each has its own time and its own id, by which a reader can tell duplicates. The garbage collector does not look
    into it: its ``data`` must not refer back to it.

    Args:
        event: where it comes from: ``"graph_execution"``, ``"node_execution"``, ``"tool_execution"``, ``"streaming"``.
        event_type: its phase: ``"start"``, ``"progress"``, ``"result"``, ``"end"``, ``"update"``, ``"error"``.
        content: text that is streamed.
        content_blocks: structured content.
        data: whatever else there is.
        content_type: what the content means.
        node_name: the node that made it.
        run_id: the run that it belongs to.
        thread_id: the thread (of a conversation) that it belongs to.
        user_id: the user it was made for.
        timestamp: when it was made, in seconds since 1970.
        is_error: whether it tells of an error.
        metadata: for the reader.
        event_id: unique for all time.

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
