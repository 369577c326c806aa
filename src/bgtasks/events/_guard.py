"""Marks the context in which a ring's own events are written, so that it does not feed itself."""

from __future__ import annotations

from contextvars import ContextVar

# The ring whose flusher, sink or log record is at work here. An event emitted into that same ring by what happens
# there, by a logging handler for one, would make the next event, and so on for ever.
at_work: ContextVar[object] = ContextVar("bgtasks_ring_at_work", default=None)
