"""A publisher whose process forks: the child opens its own connection, and the parent's stays usable."""

from __future__ import annotations

import asyncio
import json
import os
import uuid

import pytest
from arrivals import in_jetstream, in_kafka, in_redis, numbers_in
from requirements import need

from bgtasks.events import Publisher

need("msgspec")

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


def redis_publisher(server, name):
    """Return a publisher into a stream, and a function that reads the stream."""
    need("redis")
    from bgtasks.events.sinks.redis import RedisSink

    return Publisher(RedisSink(server.url, key=name)), lambda: in_redis(server.url, name)


def nats_publisher(server, name):
    """Return a publisher into JetStream, and a function that reads the stream."""
    nats = need("nats")
    from bgtasks.events.sinks.nats import NatsSink

    async def make_stream():
        client = await nats.connect(server.url)
        await client.jetstream().add_stream(name=name, subjects=[name])
        await client.close()

    asyncio.run(make_stream())
    publisher = Publisher(NatsSink(server.url, subject=name))
    return publisher, lambda: [message.data for message in asyncio.run(in_jetstream(server.url, name))]


def kafka_publisher(broker, name):
    """Return a publisher into a topic, and a function that reads the topic."""
    from bgtasks.events.sinks.kafka import KafkaSink

    return Publisher(KafkaSink(broker.url, topic=name, key="k")), lambda: in_kafka(broker.url, name)


@pytest.mark.parametrize(
    ("make", "fixture"),
    [(redis_publisher, "redis_server"), (nats_publisher, "nats_server"), (kafka_publisher, "kafka_broker")],
)
def test_both_processes_publish_after_a_fork(request, make, fixture):
    """Events in the parent's queue stay the parent's; each event arrives once."""
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
        for number in range(2, 10):  # one batch after another, on the connection that was open before the fork
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
