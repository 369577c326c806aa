"""The base class of all sinks. An author writes a sink, and ``Publisher`` does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Any, ClassVar, Self

__all__ = ["Sink"]


class Sink(ABC):
    r"""The destination of a publisher's events: a server, a file, another program.

    Subclasses implement ``write``, and ``open`` and ``close`` if a client has to be connected. A sink has no queue, no
    retries and no counters: these belong to its ``Publisher``. It can be tested, wrapped and used without a publisher.

    Example:
        >>> class HttpSink(Sink):
        ...     async def open(self):
        ...         self.client = httpx.AsyncClient()
        ...
        ...     async def write(self, batch, batch_id):
        ...         headers = {"Idempotency-Key": batch_id}
        ...         response = await self.client.post(URL, content=b"\n".join(batch), headers=headers)
        ...         response.raise_for_status()
        ...
        ...     async def close(self):
        ...         await self.client.aclose()
        >>> async def main():
        ...     async with Publisher(HttpSink(), batch=100) as publisher:
        ...         publisher.emit({"event": "order_paid", "order": 42})
        ...     print(publisher.stats()["delivered"])
        >>> asyncio.run(main())
        1

    """

    # The maximum number of concurrent ``write`` calls, None for no limit; 1 for a sink with one connection or thread.
    max_inflight: ClassVar[int | None] = None
    # False if ``write`` takes the events as they were emitted, unencoded.
    takes_bytes: ClassVar[bool] = True
    # False if the destination keeps nothing: a console, a channel. ``publish(durable=True)`` then needs a spool.
    is_durable: bool = True
    # An upper bound, in seconds, of the time between the first and the last ``write`` of one batch. A sink that detects
    # duplicates by batch ids must remember them for this time. The publisher sets it before the first ``open``.
    retry_window: float = 120.0

    async def open(self) -> None:  # noqa: B027  many sinks have nothing to open
        """Connect, before the first ``write``; an exception counts as a failed ``write``.

        It is called again, after ``close``, when a ``write`` raised anything but ``Retry`` or ``Reject``. In the child
        of a fork and on another loop it is called again without ``close``: the client of the earlier ``open`` belongs
        to another process or to a loop that is gone, and must be neither used nor closed.
        """

    @abstractmethod
    async def write(self, batch: Sequence[Any], batch_id: str) -> None:
        """Write a batch; return when the destination has it.

        Calls run one at a time, or as many at once as the publisher's ``inflight`` allows. A batch that is written
        again has the same events and the same id. Every call must end, if need be by a timeout: a failed client is not
        closed while a call uses it.

        Args:
            batch: encoded events (``bytes``), at least one.
            batch_id: globally unique; the sink may detect duplicates by it.

        Raises:
            Retry: the batch is to be written again.
            Reject: some or all of the events will never be accepted.
            Exception: any other error; ``close`` and ``open`` are called before the next try.

        """

    def written(self, batch_id: str) -> Collection[int]:
        """Return the indexes of the events that are in, of a batch whose ``write`` failed or was cancelled.

        The publisher asks before it gives up a batch: these events count as delivered, and are no dead letters. Only
        for a sink that confirms single events; by default no event is known to be in.
        """
        return ()

    async def close(self) -> None:  # noqa: B027  as above
        """Release the client of ``open``, within one second; exceptions are logged."""

    async def __aenter__(self) -> Self:
        """Open the sink, to use it without a publisher."""
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the sink."""
        await self.close()
