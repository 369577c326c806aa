"""What a publisher's ``write`` raises to say what is to become of a batch, and what bad input raises."""

from __future__ import annotations

from collections.abc import Sequence

from bgtasks.errors import BgtasksError

__all__ = ["EncodeError", "Reject", "Retry", "SinkError", "SpoolError", "SpoolFullError", "SpoolLockedError"]


class Retry(BgtasksError):  # noqa: N818  an order to the flusher, named for what it orders
    r"""The sink is not ready: nothing of the batch was written, or nobody knows; write it again, with the same id.

    Args:
        after: seconds that the sink asked for (its Retry-After); None for exponential back-off with full jitter.
        reason: what is wrong, for the log and for ``last_error``.

    Example:
        >>> async def write(self, batch, batch_id):
        ...     response = await self.client.post(self.url, content=b"\\n".join(batch))
        ...     if response.status_code == 503:
        ...         raise Retry(after=float(response.headers.get("Retry-After", 1)))

    """

    def __init__(self, after: float | None = None, reason: str = "the sink asked for another try") -> None:
        super().__init__(reason)
        self.after = after


class Reject(BgtasksError):  # noqa: N818  as above
    """The sink will never take some events; they go to the dead letters.

    Args:
        indexes: which events of the batch are refused; all others were written. Empty or None where the sink cannot
            tell: nothing was written, and the batch is halved until the bad events are alone.
        reason: why, for the dead letters.

    """

    def __init__(self, indexes: Sequence[int] | None = None, reason: str = "the sink refused it") -> None:
        super().__init__(reason)
        self.indexes = tuple(indexes or ())


class EncodeError(BgtasksError, TypeError):
    """An event cannot be turned into bytes."""


class SinkError(BgtasksError, ConnectionError):
    """A sink cannot be reached, does not answer in time, or answers with an error; the batch is tried again."""


class SpoolError(BgtasksError, RuntimeError):
    """The spool cannot be opened, read or written; the text says why and what to do."""


class SpoolFullError(SpoolError):
    """A batch found no room in the spool: its quota is used up, or the disk is full."""


class SpoolLockedError(SpoolError):
    """The spool is in use by another publisher of this process."""
