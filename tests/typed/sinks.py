"""What a type checker is to accept and to refuse of each sink; never run."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import assert_type

from bgtasks.events import PublishesOne, Sink
from bgtasks.events.sinks.console import ConsoleSink
from bgtasks.events.sinks.jsonl import JsonlSink
from bgtasks.events.sinks.kafka import KafkaSink
from bgtasks.events.sinks.memory import MemorySink
from bgtasks.events.sinks.nats import NatsSink
from bgtasks.events.sinks.otlp import LogExporter, OtlpSink
from bgtasks.events.sinks.publish import PublishSink
from bgtasks.events.sinks.rabbitmq import RabbitMQSink
from bgtasks.events.sinks.redis import Mode, RedisSink
from bgtasks.events.sinks.sqlite import Rows, SqliteSink, Sync


def all_of_them() -> list[Sink]:
    """Every sink is a ``Sink``."""
    return [
        ConsoleSink(),
        JsonlSink("events.jsonl"),
        KafkaSink(),
        MemorySink(),
        NatsSink(),
        OtlpSink(),
        RabbitMQSink(),
        RedisSink(),
        SqliteSink("events.db"),
    ]


async def memory() -> None:
    """What arrived can be looked at."""
    async with MemorySink() as sink:
        assert_type(sink.events, list[bytes])
        assert_type(sink.batches, list[tuple[str, int]])
    MemorySink(5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def console() -> None:
    """A stream of text."""
    ConsoleSink(sys.stderr)
    ConsoleSink(stream=None)
    ConsoleSink(io.BytesIO())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    ConsoleSink("events.txt")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def jsonl() -> None:
    """A path, and what becomes of a long or old file."""
    sink = JsonlSink(Path("events.jsonl"), rotate_bytes=None, rotate_age=3600, keep=2, fsync=True)
    assert_type(sink.path, Path)
    assert_type(sink.repaired_bytes, int)
    JsonlSink()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    JsonlSink("events.jsonl", 1 << 20)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    JsonlSink("events.jsonl", rotate_bytes=1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    JsonlSink("events.jsonl", keep=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    JsonlSink("events.jsonl", max_bytes=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def sqlite(rows: Rows, sync: Sync) -> None:
    """A path, and the shape of the table."""
    SqliteSink(Path("events.db"), table="orders", rows=rows, sync=sync)
    SqliteSink("events.db", "orders")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    SqliteSink("events.db", rows="column")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SqliteSink("events.db", sync="off")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def redis(mode: Mode) -> None:
    """An address, and what is written there."""
    RedisSink("redis://localhost", key="k", mode=mode, field="f", maxlen=None, remember_for=None, timeout=5)
    RedisSink(client_factory=object)
    RedisSink("redis://localhost", "k")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    RedisSink(mode="set")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    RedisSink(timeout=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    RedisSink(client_factory=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    RedisSink(batch=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def nats() -> None:
    """One address or several."""
    NatsSink("nats://localhost", subject="s", jetstream=False, envelope=True, timeout=5, connect_options={"user": "u"})
    NatsSink(["nats://one", "nats://two"])
    NatsSink("nats://localhost", "s")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    NatsSink(subject=b"s")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    NatsSink(connect_options=[("user", "u")])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    NatsSink(user="u")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def rabbitmq() -> None:
    """An address, an exchange and a routing key."""
    RabbitMQSink("amqp://localhost", exchange="e", routing_key="k", envelope=True, timeout=5, connect_options={})
    RabbitMQSink("amqp://localhost", "e")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    RabbitMQSink(timeout="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    RabbitMQSink(exchange=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def kafka() -> None:
    """Addresses, a topic, and librdkafka's settings."""
    KafkaSink("localhost:9092", topic="t", key=b"k", timeout=5, config={"compression.type": "lz4", "linger.ms": 5})
    KafkaSink("localhost:9092", "t")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    KafkaSink(key=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    KafkaSink(config={5: "lz4"})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]


class Exporter:
    """What OpenTelemetry's exporters have."""

    def export(self, batch: Sequence[int]) -> str:
        """Return a result."""
        return str(len(batch))

    def shutdown(self) -> None:
        """Do nothing."""


def otlp() -> None:
    """An address, or an exporter that the program made."""
    exporter: LogExporter = Exporter()
    OtlpSink("http://localhost:4318/v1/logs", headers={"a": "b"}, timeout=5, resource={"service.name": "shop"})
    OtlpSink(exporter=exporter)
    OtlpSink(exporter="http://localhost:4318/v1/logs")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    OtlpSink(headers={"a": 5})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
    OtlpSink(None, {})  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def another_publisher(other: PublishesOne) -> None:
    """What has an ``async publish``."""
    PublishSink(other)
    PublishSink(other, workers=2)
    PublishSink(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    PublishSink(other, 2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    PublishSink(other, workers=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
