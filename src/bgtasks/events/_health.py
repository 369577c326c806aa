"""The last errors of a publisher, for its statistics and its log."""

from __future__ import annotations

__all__ = ["Health"]


class Health:
    """The last error of an event or of the sink, and that of the spool; None after a recovery."""

    __slots__ = ("sink_error", "spool_error")

    def __init__(self) -> None:
        self.sink_error: str | None = None
        self.spool_error: str | None = None

    @property
    def last_error(self) -> str | None:
        """The text of the error to show, None if there is none."""
        return self.sink_error or self.spool_error
