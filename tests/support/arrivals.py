"""The events that arrived in a server: read all of them, and count missing and duplicate ones."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

__all__ = ["Arrived", "emit_numbers", "in_jetstream", "in_kafka", "in_rabbitmq", "in_redis", "numbers_in"]


class Arrived(NamedTuple):
    """The difference between the expected and the received events."""

    lost: int
    doubled: int
    in_order: bool


def arrived(numbers: list[int], expected: int) -> Arrived:
    """Compare numbers found with 0 to ``expected`` - 1."""
    counts = Counter(numbers)
    return Arrived(
        lost=sum(1 for number in range(expected) if number not in counts),
        doubled=sum(count - 1 for count in counts.values()),
        in_order=numbers == sorted(numbers),
    )


def numbers_in(events: list[bytes]) -> list[int]:
    """Return the numbers of events as ``emit_numbers`` makes them."""
    return [json.loads(event)["number"] for event in events]


async def emit_numbers(publisher: Any, count: int, *, rate: int = 20_000) -> None:
    """Emit events numbered from 0, at a rate per second; each must be accepted."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for number in range(count):
        if number % 100 == 0:
            await asyncio.sleep(max(begun + number / rate - loop.time(), 0))
        assert publisher.emit({"event": "counted", "number": number, "padding": "x" * 100})


def in_redis(url: str, key: str, mode: str = "stream") -> list[bytes]:
    """Return all events of a stream or a list."""
    import redis

    with redis.Redis.from_url(url) as client:
        if mode == "list":
            return client.lrange(key, 0, -1)
        return [fields[b"data"] for _, fields in client.xrange(key)]


async def in_jetstream(url: str, stream: str) -> list[Any]:
    """Return all messages of a stream, in its order."""
    # On a loop of its own: on a loop in debug mode, reading takes twenty times as long.
    return await asyncio.to_thread(asyncio.run, _read_jetstream(url, stream), debug=False)


async def _answered(request: Callable[[], Awaitable[Any]]) -> Any:
    """Repeat a request until it is answered: servers whose leader was killed first have to elect another one."""
    from nats.errors import NoRespondersError
    from nats.errors import TimeoutError as NoAnswerError
    from nats.js.errors import ServiceUnavailableError

    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(NoAnswerError, NoRespondersError, ServiceUnavailableError):
                return await request()
            await asyncio.sleep(0.05)


async def _read_jetstream(url: str, stream: str) -> list[Any]:
    import nats
    from nats.js.api import AckPolicy, ConsumerConfig

    client = await nats.connect(url)
    try:
        context = client.jetstream()
        info = await _answered(lambda: context.stream_info(stream))
        count = info.state.messages
        subject, reading = info.config.subjects[0], ConsumerConfig(ack_policy=AckPolicy.NONE)
        consumer = await _answered(lambda: context.pull_subscribe(subject, stream=stream, config=reading))
        messages: list[Any] = []
        while left := count - len(messages):
            messages += await _answered(functools.partial(consumer.fetch, min(5000, left), timeout=5))
        return messages
    finally:
        await client.close()


def in_kafka(address: str, topic: str) -> list[bytes]:
    """Return all events of a topic, one partition after another."""
    from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

    # Assigned, not subscribed: the members of a group wait for each other for seconds.
    consumer = Consumer({"bootstrap.servers": address, "group.id": "none", "enable.auto.commit": False, "log_level": 0})
    events: list[bytes] = []
    try:
        partitions = [
            TopicPartition(topic, number, OFFSET_BEGINNING)
            for number in consumer.list_topics(topic, timeout=30).topics[topic].partitions
        ]
        count = sum(consumer.get_watermark_offsets(partition, timeout=30)[1] for partition in partitions)
        consumer.assign(partitions)
        while len(events) < count and (messages := consumer.consume(count - len(events), timeout=30)):
            events += [message.value() for message in messages if message.error() is None]
    finally:
        consumer.close()
    return events


async def in_rabbitmq(url: str, queue: str) -> list[Any]:
    """Take all messages out of a queue."""
    return await asyncio.to_thread(asyncio.run, _read_rabbitmq(url, queue), debug=False)


async def _read_rabbitmq(url: str, queue: str) -> list[Any]:
    import aio_pika

    connection = await aio_pika.connect(url)
    try:
        channel = await connection.channel()
        found = await channel.declare_queue(queue, passive=True)
        messages: list[Any] = []
        while message := await found.get(no_ack=True, fail=False):
            messages.append(message)
        return messages
    finally:
        await connection.close()
