"""The errors by which a sink tells its publisher how to go on, and those of encoding and of spools."""

from __future__ import annotations

from collections.abc import Sequence

from bgtasks.errors import BgtasksError

__all__ = ["EncodeError", "Reject", "Retry", "SinkError", "SpoolError", "SpoolFullError", "SpoolLockedError"]


class Retry(BgtasksError):  # noqa: N818  an instruction to the publisher
    r"""The sink is not ready. The batch was not written, or its outcome is unknown; write it again with the same id.

    Args:
        after: seconds to wait, as asked for by the sink (Retry-After); None for exponential back-off with full jitter.
        reason: the cause, for the log and for ``last_error``.

    Example:
        >>> class HttpSink(Sink):
        ...     async def write(self, batch, batch_id):
        ...         response = await client.post(URL, content=b"\n".join(batch))
        ...         if response.status_code == 503:
        ...             raise Retry(after=float(response.headers.get("Retry-After", 1)))

    """

    def __init__(self, after: float | None = None, reason: str = "the sink asked for another try") -> None:
        super().__init__(reason)
        self.after: float | None = after


class Reject(BgtasksError):  # noqa: N818  as above
    """The sink will never accept some events; they go to the dead letters.

    Args:
        indexes: those of the rejected events in the batch; all others were written. None or empty if the sink
            cannot tell: nothing was written, and the batch is halved until the bad events are isolated.
        reason: the cause, for the dead letters.

    """

    def __init__(self, indexes: Sequence[int] | None = None, reason: str = "the sink refused it") -> None:
        super().__init__(reason)
        self.indexes: tuple[int, ...] = tuple(indexes or ())


class EncodeError(BgtasksError, TypeError):
    """An event cannot be encoded."""


class SinkError(BgtasksError, ConnectionError):
    """A sink cannot be reached, does not answer in time, or answers with an error; the batch is tried again."""


class SpoolError(BgtasksError, RuntimeError):
    """The spool cannot be opened, read or written; the message says why and what to do."""


class SpoolFullError(SpoolError):
    """The spool has no room for a batch: its quota is used up, or the disk is full."""


class SpoolLockedError(SpoolError):
    """The spool is in use by another publisher of this process."""
