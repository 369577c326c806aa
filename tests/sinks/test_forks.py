"""A publisher whose process forks: the child connects anew, and the parent's connection goes on."""

from __future__ import annotations

import asyncio
import json
import os
import uuid

import pytest
from arrivals import in_jetstream, in_kafka, in_redis, numbers_in
from requirements import need

need("msgspec")

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


def redis_publisher(server, name):
    """Give a publisher into a stream, and what reads it."""
    need("redis")
    from bgtasks.events.sinks.redis import RedisPublisher

    return RedisPublisher(server.url, key=name), lambda: in_redis(server.url, name)


def nats_publisher(server, name):
    """Give a publisher into JetStream, and what reads it."""
    nats = need("nats")
    from bgtasks.events.sinks.nats import NatsPublisher

    async def make_stream():
        client = await nats.connect(server.url)
        await client.jetstream().add_stream(name=name, subjects=[name])
        await client.close()

    asyncio.run(make_stream())
    publisher = NatsPublisher(server.url, subject=name)
    return publisher, lambda: [message.data for message in asyncio.run(in_jetstream(server.url, name))]


def kafka_publisher(broker, name):
    """Give a publisher into a topic, and what reads it."""
    from bgtasks.events.sinks.kafka import KafkaPublisher

    return KafkaPublisher(broker.url, topic=name, key="k"), lambda: in_kafka(broker.url, name)


@pytest.mark.parametrize(
    ("make", "fixture"),
    [(redis_publisher, "redis_server"), (nats_publisher, "nats_server"), (kafka_publisher, "kafka_broker")],
)
def test_both_processes_publish_after_a_fork(request, make, fixture):
    """What the parent has in its queue stays its own; each event arrives once."""
    publisher, read = make(request.getfixturevalue(fixture), uuid.uuid4().hex)

    async def publish(*numbers):
        for number in numbers:
            assert publisher.emit({"number": number})
        assert (await publisher.flush(30))["status"] == "flushed"

    async def in_parent():
        await publish(0)
        publisher.emit({"number": 1})  # in the queue while the process forks
        child = os.fork()
        if child == 0:
            os._exit(in_child())
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        for number in range(2, 10):  # one batch after another on the connection from before
            await publish(number)
        await publisher.close(30)
        return status

    def in_child():
        asyncio._set_running_loop(None)
        try:
            asyncio.run(publish_and_close())
        except BaseException:
            return 1
        return 0 if publisher.stats()["delivered"] == 2 else 2

    async def publish_and_close():
        await publish(100, 101)
        await publisher.close(30)

    assert asyncio.run(in_parent()) == 0
    assert publisher.stats()["delivered"] == 10
    assert publisher.stats()["retried"] == 0
    assert sorted(numbers_in(read())) == [*range(10), 100, 101]
    assert json.loads(read()[0])["number"] == 0
