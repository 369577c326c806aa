"""A sink for RabbitMQ: persistent messages that the broker confirms."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from itertools import islice
from typing import Any, Final, TypeAlias
from urllib.parse import unquote, urlsplit

from bgtasks._checks import check_seconds
from bgtasks.errors import InvalidOptionError, missing_extra, text_of
from bgtasks.events.errors import Reject, SinkError
from bgtasks.events.sink import Sink
from bgtasks.events.sinks._envelope import CONTENT_TYPE, fill_envelopes
from bgtasks.events.sinks._inherited import keep_inherited

__all__ = ["RabbitMQSink"]

# Bytes. RabbitMQ takes 16 MiB since version 4, and more before; by default a batch is smaller.
ENVELOPE_LIMIT: Final = 8 << 20
# The number of batches whose confirmed messages are remembered; batches that were given up make room.
REMEMBERED: Final = 64
# Whether this context belongs to a connection of a sink.
_is_quiet: ContextVar[bool] = ContextVar("bgtasks_rabbitmq_is_quiet", default=False)


# Id, body, and the indexes of its events in the batch.
_Message: TypeAlias = tuple[str, bytes, Sequence[int]]


class RabbitMQSink(Sink):
    """Writes to an exchange of RabbitMQ.

    A batch counts as delivered when the broker has confirmed each of its messages: the message is in all queues it was
    routed to, on disk if these are durable. A message that no queue takes counts as a failure and is tried again,
    without the confirmed messages of its batch. A message whose confirmation was lost is stored twice: the broker does
    not detect duplicates. Consumers can, by the ``message_id``, which is the same for each try.

    Each message takes time of the loop. An envelope carries a batch in one message, as JSON lines, and is many times as
    fast; its readers must split it.

    Args:
        url: ``amqp://[user:password@]host[:port]/[vhost]``, ``amqps://`` for TLS.
        exchange: the name of an existing exchange; "" for the default one, which routes to the queue named by the
            routing key.
        routing_key: the routing key of every message.
        envelope: send a batch as one message.
        timeout: seconds for a connection, and for the confirmation of a batch; after that a new connection is made.
        connect_options: further keywords for ``aio_pika.connect``, ``ssl_context`` for example.

    Raises:
        InvalidOptionError: the URL does not begin with ``amqp://`` or ``amqps://``.
        MissingExtraError: aio-pika is not installed.

    Example:
        >>> publisher = Publisher(RabbitMQSink("amqp://guest:guest@localhost/", routing_key="orders", envelope=True))

    """

    def __init__(
        self,
        url: str = "amqp://guest:guest@localhost/",
        *,
        exchange: str = "",
        routing_key: str = "bgtasks.events",
        envelope: bool = False,
        timeout: float = 10.0,
        connect_options: Mapping[str, object] | None = None,
    ) -> None:
        try:
            import aio_pika
        except ModuleNotFoundError as error:
            raise missing_extra("rabbitmq", "aio-pika", "publish into RabbitMQ") from error
        if not url.startswith(("amqp://", "amqps://")):
            raise InvalidOptionError(
                "url must begin with amqp:// or amqps://, for example amqp://guest:guest@localhost/"
            )
        check_seconds("timeout", timeout, positive=True)
        self._url = url
        self._exchange_name = exchange
        self._routing_key = routing_key
        self._envelope = envelope
        self._timeout = timeout
        self._connect_options = dict(connect_options or {})
        self._server = f"RabbitMQ at {url.rpartition('@')[2].rpartition('//')[2].partition('/')[0]}"
        self._make_message = aio_pika.Message
        self._persistent = aio_pika.DeliveryMode.PERSISTENT
        self._expected = (aio_pika.exceptions.AMQPError, OSError, TimeoutError, RuntimeError)
        self._connection: Any = None
        self._exchange: Any = None
        # Batch id -> ids of its messages that were confirmed -> the indexes of their events.
        self._confirmed: dict[str, dict[str, Sequence[int]]] = {}
        _hide_client_logs()

    async def open(self) -> None:
        """Connect, and find the exchange."""
        import aio_pika

        keep_inherited(self._connection)
        self._connection = None
        connection = None
        # The client's tasks, which are made here, inherit it.
        quiet = _is_quiet.set(True)
        try:
            async with asyncio.timeout(self._timeout):
                # Not connect_robust: it would send messages again by itself, unnoticed here.
                connection = await aio_pika.connect(self._url, timeout=self._timeout, **self._connect_options)
                channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
                if self._exchange_name:
                    self._exchange = await channel.get_exchange(self._exchange_name)
                else:
                    self._exchange = channel.default_exchange
        except BaseException as error:
            if connection is not None:
                await connection.close()
            if isinstance(error, self._expected):
                raise SinkError(f"{self._server}: {self._reason(error)}") from error
            raise
        finally:
            _is_quiet.reset(quiet)
        self._connection = connection

    def _reason(self, error: BaseException) -> str:
        text = text_of(error)
        if "Connection.OpenOk" in text and "Connection.Close" in text:
            # aiormq does not pass the broker's words on.
            vhost = _vhost_of(self._url)
            return f"there is no virtual host {vhost!r}, or this user may not use it; the URL ends with its name"
        return text

    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Publish a batch and wait until the broker has confirmed it."""
        bodies, unfit = self._bodies(batch, batch_id)
        confirmed = self._confirmed_of(batch_id)
        left = [self._publish(*body, confirmed) for body in bodies if body[0] not in confirmed]
        try:
            async with asyncio.timeout(self._timeout):
                results = await asyncio.gather(*left, return_exceptions=True)
        except TimeoutError as error:
            raise SinkError(f"{self._server}: no confirmation within {self._timeout:g} seconds") from error
        failed = [result for result in results if isinstance(result, BaseException)]
        if failed:
            raise SinkError(
                f"{self._server}: {len(failed)} of {len(bodies)} messages were not confirmed, the first: "
                f"{text_of(failed[0])}"
            ) from failed[0]
        self._confirmed.pop(batch_id, None)
        if unfit:
            raise Reject(unfit, "an event with a line feed, or too long for an envelope")

    async def close(self) -> None:
        """Disconnect."""
        connection, self._connection = self._connection, None
        self._exchange = None
        if connection is not None:
            await connection.close()

    def written(self, batch_id: str) -> list[int]:
        """Return the indexes of the events that the broker has confirmed, of a batch that failed or was cancelled."""
        return [index for indexes in self._confirmed.get(batch_id, {}).values() for index in indexes]

    def _bodies(self, batch: Sequence[bytes], batch_id: str) -> tuple[list[_Message], list[int]]:
        """Return the messages of a batch, and the indexes of the events that fit in none."""
        if not self._envelope:
            return [(f"{batch_id}:{index}", event, (index,)) for index, event in enumerate(batch)], []
        envelopes, unfit = fill_envelopes(batch, ENVELOPE_LIMIT)
        skipped = set(unfit)
        indexes = iter([index for index in range(len(batch)) if index not in skipped])
        return [
            (f"{batch_id}:e{number}", body, tuple(islice(indexes, body.count(b"\n")))) for number, body in envelopes
        ], unfit

    def _confirmed_of(self, batch_id: str) -> dict[str, Sequence[int]]:
        if batch_id not in self._confirmed and len(self._confirmed) >= REMEMBERED:
            del self._confirmed[next(iter(self._confirmed))]
        return self._confirmed.setdefault(batch_id, {})

    async def _publish(
        self, message_id: str, body: bytes, indexes: Sequence[int], confirmed: dict[str, Sequence[int]]
    ) -> None:
        content_type = CONTENT_TYPE if self._envelope else "application/json"
        message = self._make_message(
            body, message_id=message_id, content_type=content_type, delivery_mode=self._persistent
        )
        await self._exchange.publish(message, self._routing_key, mandatory=True)
        confirmed[message_id] = indexes


def _vhost_of(url: str) -> str:
    """Return the name of the virtual host in a URL."""
    return unquote(urlsplit(url).path[1:]) or "/"


def _hide_client_logs() -> None:
    """Have aiormq log the connections of this sink at level DEBUG only: the publisher logs an outage in one line."""
    # A filter that is there already is not added again.
    logging.getLogger("aiormq.connection").addFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    return not _is_quiet.get() or logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
