"""Marks the context in which the events of a queue are written, so that a publisher does not feed itself."""

from __future__ import annotations

from contextvars import ContextVar

__all__ = ["at_work"]

# The queue whose flusher, sink or log record runs in this context. An event that is emitted into the same queue from
# here, by a logging handler for example, would cause the next event, without end.
at_work: ContextVar[object] = ContextVar("bgtasks_queue_at_work", default=None)
