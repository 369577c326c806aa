"""The sinks of the matrix: how each is prepared, written to, and read back."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from arrivals import in_jetstream, in_rabbitmq, in_redis
from servers import NatsServer, RabbitServer, RedisServer, Server, make_queue

from bgtasks.events import Sink

__all__ = ["TARGETS", "Target"]


class Target(NamedTuple):
    """One sink.

    Args:
        server: the class of its server, None for a sink that writes a file.
        scheme: what stands before host and port in the address of the server.
        rate: the events a second that the producer offers.
        knows_ids: whether a batch that is written twice is stored once.
        prepare: makes the stream or the queue at an address.
        make: makes the sink for an address.
        read: returns the events at an address, in their order there.

    """

    server: type[Server] | None
    scheme: str
    rate: int
    knows_ids: bool
    prepare: Callable[[str], Awaitable[Any]] | None
    make: Callable[[str], Sink]
    read: Callable[[str], list[bytes]]


def _redis(address: str) -> Sink:
    from bgtasks.events.sinks.redis import RedisSink

    return RedisSink(address, key="events", maxlen=None, timeout=0.5)


async def _make_stream(address: str) -> None:
    import nats

    client = await nats.connect(address)
    # An hour, as for a publisher with a spool.
    await client.jetstream().add_stream(name="EVENTS", subjects=["events"], duplicate_window=3600)
    await client.close()


def _jetstream(address: str) -> Sink:
    from bgtasks.events.sinks.nats import NatsSink

    return NatsSink(address, subject="events", timeout=0.5)


def _envelopes(address: str) -> Sink:
    from bgtasks.events.sinks.nats import NatsSink

    return NatsSink(address, subject="events", envelope=True, timeout=0.5)


def _read_stream(address: str) -> list[bytes]:
    messages = asyncio.run(in_jetstream(address, "EVENTS"))
    return [line for message in messages for line in message.data.splitlines()]


def _rabbitmq(address: str) -> Sink:
    from bgtasks.events.sinks.rabbitmq import RabbitMQSink

    # A connection takes nine round trips.
    return RabbitMQSink(address, routing_key="events", timeout=5)


def _read_queue(address: str) -> list[bytes]:
    return [message.body for message in asyncio.run(in_rabbitmq(address, "events"))]


def _sqlite(address: str) -> Sink:
    from bgtasks.events.sinks.sqlite import SqliteSink

    return SqliteSink(address)


def _read_table(address: str) -> list[bytes]:
    with closing(sqlite3.connect(address)) as connection:
        return [event.encode() for (event,) in connection.execute("SELECT event FROM events ORDER BY id")]


def _jsonl(address: str) -> Sink:
    from bgtasks.events.sinks.jsonl import JsonlSink

    return JsonlSink(address)


def _read_lines(address: str) -> list[bytes]:
    return Path(address).read_bytes().splitlines()


TARGETS = {
    "redis": Target(RedisServer, "redis://", 4000, True, None, _redis, lambda address: in_redis(address, "events")),
    "jetstream": Target(NatsServer, "nats://", 4000, True, _make_stream, _jetstream, _read_stream),
    "envelopes": Target(NatsServer, "nats://", 4000, True, _make_stream, _envelopes, _read_stream),
    "rabbitmq": Target(
        RabbitServer, "amqp://guest:guest@", 1000, False, lambda url: make_queue(url, "events"), _rabbitmq, _read_queue
    ),
    "sqlite": Target(None, "", 4000, True, None, _sqlite, _read_table),
    # Only the batch that was written last is recognized, and only by the process that wrote it.
    "jsonl": Target(None, "", 4000, False, None, _jsonl, _read_lines),
}
