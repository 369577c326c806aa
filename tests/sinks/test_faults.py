"""Servers that die, freeze and refuse: no event is lost; none is doubled where the sink knows the ids of batches."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest
from arrivals import arrived, emit_numbers, in_jetstream, in_rabbitmq, in_redis, numbers_in
from cutting_proxy import CuttingProxy
from requirements import need
from servers import NatsServer, RabbitServer, RedisServer, make_queue

from bgtasks.events import Publisher, Reject
from bgtasks.events.sinks.nats import NatsSink
from bgtasks.events.sinks.redis import RedisSink

redis = need("redis")
nats = need("nats")
need("msgspec")

# A fault takes seconds; differences between loops are tested with each sink.
pytestmark = pytest.mark.loops("uvloop")

COUNT = 30_000
PATIENCE = 60  # seconds to wait at most, on a busy machine


@contextlib.asynccontextmanager
async def alongside(coro):
    """Run a coroutine beside a block, and cancel it at the end of the block."""
    task = asyncio.create_task(coro)
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def kill_clients(url: str, every: float) -> None:
    """Close all connections of a Redis server except this one, every ``every`` seconds."""
    async with redis.asyncio.Redis.from_url(url) as client:
        while True:
            await asyncio.sleep(every)
            await client.client_kill_filter(_type="normal", skipme=True)


async def freeze(server, after: float, seconds: float) -> None:
    """Freeze a server for some seconds."""
    await asyncio.sleep(after)
    server.freeze()
    await asyncio.sleep(seconds)
    server.thaw()


async def kill_and_restart(server, after: float, seconds: float) -> None:
    """Kill a server; start it again some seconds later, with the data that it has on disk."""
    await asyncio.sleep(after)
    server.kill()
    await asyncio.sleep(seconds)
    await asyncio.to_thread(server.start)


@pytest.fixture
def own_redis(start_server):
    """Give a Redis server for one test; its append-only file has every command that it answered."""
    return start_server(RedisServer)


async def start_nats(start_server, **config) -> NatsServer:
    """Start a NATS server for one test, with a stream in files."""
    server = start_server(NatsServer)
    client = await nats.connect(server.url)
    await client.jetstream().add_stream(name="EVENTS", subjects=["events"], **config)
    await client.close()
    return server


def rabbitmq_publisher(url: str, timeout: float) -> Publisher:
    """Return a publisher into the queue ``events``."""
    from bgtasks.events.sinks.rabbitmq import RabbitMQSink

    return Publisher(RabbitMQSink(url, routing_key="events", timeout=timeout))


async def start_rabbitmq(start_server) -> RabbitServer:
    """Start a RabbitMQ node for one test, with a queue on disk."""
    need("aio_pika")
    server = start_server(RabbitServer)
    await make_queue(server.url, "events")
    return server


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_redis_connections_killed_every_50_ms(own_redis, mode):
    """Redis: 0 lost, 0 doubled, in order, while the connection dies again and again."""
    publisher = Publisher(RedisSink(own_redis.url, key="events", mode=mode))
    async with alongside(kill_clients(own_redis.url, 0.05)):
        await emit_numbers(publisher, COUNT)
        await publisher.flush(0.2)
    report = await publisher.close(PATIENCE)
    assert (report["status"], publisher.stats()["delivered"]) == ("flushed", COUNT)
    assert publisher.stats()["retried"] >= 1
    assert arrived(numbers_in(in_redis(own_redis.url, "events", mode)), COUNT) == (0, 0, True)


async def test_redis_frozen_for_2_s(own_redis):
    """Redis: 0 lost, 0 doubled, though the server carries out the tries that timed out when it thaws."""
    publisher = Publisher(RedisSink(own_redis.url, key="events", timeout=0.3))
    async with alongside(freeze(own_redis, 0.5, 2)):
        await emit_numbers(publisher, COUNT)
        await publisher.flush(PATIENCE)
    await publisher.close(PATIENCE)
    assert publisher.stats()["delivered"] == COUNT
    assert publisher.stats()["retried"] >= 1
    assert arrived(numbers_in(in_redis(own_redis.url, "events")), COUNT) == (0, 0, True)


async def test_redis_killed_and_restarted_after_2_s(own_redis):
    """Redis: 0 lost, 0 doubled, when the server dies and restarts with its append-only file."""
    publisher = Publisher(RedisSink(own_redis.url, key="events"))
    async with alongside(kill_and_restart(own_redis, 0.5, 2)):
        await emit_numbers(publisher, COUNT)
        await publisher.flush(PATIENCE)
    await publisher.close(PATIENCE)
    assert publisher.stats()["delivered"] == COUNT
    assert publisher.stats()["retried"] >= 1
    assert arrived(numbers_in(in_redis(own_redis.url, "events")), COUNT) == (0, 0, True)


async def test_jetstream_connections_cut_every_50_ms(start_server):
    """JetStream, one message per event: 0 lost, 0 doubled, while the connection breaks again and again."""
    server = await start_nats(start_server)
    async with CuttingProxy(server.port) as proxy:
        publisher = Publisher(NatsSink(f"nats://127.0.0.1:{proxy.port}", subject="events"), batch=100)
        async with alongside(proxy.cut_again_and_again(0.05)):
            await emit_numbers(publisher, COUNT)
        await publisher.close(PATIENCE)
    assert publisher.stats()["delivered"] == COUNT
    assert publisher.stats()["retried"] >= 1
    messages = await in_jetstream(server.url, "EVENTS")
    lost, doubled, _ = arrived(numbers_in([message.data for message in messages]), COUNT)
    assert (lost, doubled) == (0, 0)


async def test_jetstream_envelopes_cut_every_50_ms(start_server):
    """JetStream, envelopes: 0 lost, 0 doubled, in order."""
    server = await start_nats(start_server)
    async with CuttingProxy(server.port) as proxy:
        publisher = Publisher(NatsSink(f"nats://127.0.0.1:{proxy.port}", subject="events", envelope=True))
        async with alongside(proxy.cut_again_and_again(0.05)):
            await emit_numbers(publisher, COUNT)
        await publisher.close(PATIENCE)
    assert publisher.stats()["delivered"] == COUNT
    assert publisher.stats()["retried"] >= 1
    lines = [line for message in await in_jetstream(server.url, "EVENTS") for line in message.data.splitlines()]
    assert arrived(numbers_in(lines), COUNT) == (0, 0, True)


@pytest.mark.parametrize("envelope", [False, True], ids=["events", "envelopes"])
@pytest.mark.parametrize("fault", [freeze, kill_and_restart], ids=["frozen", "killed"])
async def test_jetstream_down_for_2_s(start_server, fault, envelope):
    """JetStream: 0 lost, 0 doubled, when the server freezes, or dies and restarts."""
    server = await start_nats(start_server)
    publisher = Publisher(NatsSink(server.url, subject="events", envelope=envelope, timeout=0.5))
    async with alongside(fault(server, 0.5, 2)):
        await emit_numbers(publisher, COUNT)
        await publisher.flush(PATIENCE)
    await publisher.close(PATIENCE)
    assert publisher.stats()["delivered"] == COUNT
    assert publisher.stats()["retried"] >= 1
    lines = [line for message in await in_jetstream(server.url, "EVENTS") for line in message.data.splitlines()]
    assert arrived(numbers_in(lines), COUNT)[:2] == (0, 0)


async def test_jetstream_refuses_one_in_a_thousand(start_server, tmp_path):
    """Events that are too long for the stream are dead letters; all others are stored once."""
    server = await start_nats(start_server, max_msg_size=1000)
    publisher = Publisher(NatsSink(server.url, subject="events"), dead_letters=tmp_path / "dead.jsonl")
    for number in range(20_000):
        padding = "x" * (2000 if number % 1000 == 500 else 10)
        assert publisher.emit({"number": number, "padding": padding})
    await publisher.close(PATIENCE)
    stats = publisher.stats()
    assert (stats["delivered"], stats["dropped"]) == (19_980, {"rejected": 20})
    numbers = numbers_in([message.data for message in await in_jetstream(server.url, "EVENTS")])
    assert numbers == [number for number in range(20_000) if number % 1000 != 500]
    assert len((tmp_path / "dead.jsonl").read_text().splitlines()) == 20


async def test_jetstream_refuses_an_envelope_for_one_line(start_server):
    """An envelope that is too long is halved until the long event is alone."""
    server = await start_nats(start_server, max_msg_size=5000)
    publisher = Publisher(NatsSink(server.url, subject="events", envelope=True))
    for number in range(3000):
        assert publisher.emit({"number": number, "padding": "x" * (6000 if number == 1234 else 10)})
    await publisher.close(PATIENCE)
    assert publisher.stats()["dropped"] == {"rejected": 1}
    lines = [line for message in await in_jetstream(server.url, "EVENTS") for line in message.data.splitlines()]
    assert numbers_in(lines) == [number for number in range(3000) if number != 1234]


@pytest.mark.parametrize("fault", [freeze, kill_and_restart], ids=["frozen", "killed"])
async def test_rabbitmq_down_for_2_s(start_server, fault):
    """RabbitMQ: 0 lost; a message that is there twice has one id, since the broker knows no duplicates."""
    server = await start_rabbitmq(start_server)
    publisher = rabbitmq_publisher(server.url, timeout=1)
    async with alongside(fault(server, 0.3, 2)) as faulty:
        await emit_numbers(publisher, 2000, rate=2000)
        await faulty
    await publisher.close(PATIENCE)
    assert publisher.stats()["delivered"] == 2000
    assert publisher.stats()["retried"] >= 1
    messages = {message.message_id: message.body for message in await in_rabbitmq(server.url, "events")}
    assert arrived(numbers_in(list(messages.values())), 2000)[:2] == (0, 0)


class PickySink(RedisSink):
    """Rejects some events, which Redis itself never does."""

    async def write(self, batch, batch_id):
        """Write the other events."""
        bad = [index for index, event in enumerate(batch) if json.loads(event)["number"] % 1000 == 500]
        await super().write([event for index, event in enumerate(batch) if index not in bad], batch_id)
        if bad:
            raise Reject(bad, "a bad number")


class WithBadEvents:
    """Emits, before one in a thousand events, another one that cannot be encoded."""

    def __init__(self, publisher):
        self.publisher = publisher

    def emit(self, event):
        """Emit an event."""
        if event["number"] % 1000 == 250:
            assert self.publisher.emit({"number": object()})
        return self.publisher.emit(event)


async def test_one_in_a_thousand_refused_and_one_without_json_while_connections_die(own_redis, tmp_path):
    """With bad events and retries in one batch, each event is once in Redis or in the dead letters."""
    publisher = Publisher(PickySink(own_redis.url, key="events"), dead_letters=tmp_path / "dead.jsonl")
    async with alongside(kill_clients(own_redis.url, 0.05)):
        await emit_numbers(WithBadEvents(publisher), COUNT)
    await publisher.close(PATIENCE)
    stats = publisher.stats()
    bad = COUNT // 1000
    assert (stats["delivered"], stats["dropped"]) == (COUNT - bad, {"rejected": bad, "encode": bad})
    numbers = numbers_in(in_redis(own_redis.url, "events"))
    assert numbers == [number for number in range(COUNT) if number % 1000 != 500]
    assert len((tmp_path / "dead.jsonl").read_text().splitlines()) == 2 * bad


@contextlib.asynccontextmanager
async def hanging(start_server, sink: str) -> AsyncIterator[object]:
    """Give a publisher that is connected to a server that no longer answers."""
    if sink == "redis":
        server = start_server(RedisServer)
        publisher = Publisher(RedisSink(server.url, timeout=60))
    elif sink == "rabbitmq":
        server = await start_rabbitmq(start_server)
        publisher = rabbitmq_publisher(server.url, timeout=60)
    else:
        server = await start_nats(start_server)
        publisher = Publisher(NatsSink(server.url, subject="events", timeout=60))
    publisher.emit({"number": 0})
    await publisher.flush(PATIENCE)
    server.freeze()
    yield publisher
    server.thaw()


@pytest.mark.parametrize("sink", ["redis", "jetstream", "rabbitmq"])
async def test_close_returns_within_its_timeout_when_the_sink_hangs(start_server, sink):
    """The status is "timeout"; each event is accounted for."""
    async with hanging(start_server, sink) as publisher:
        await emit_numbers(publisher, 20_000, rate=1_000_000)
        async with asyncio.timeout(PATIENCE / 2):  # instead of the 60 s that the client would wait
            report = await publisher.close(1.0)
    stats = publisher.stats()
    assert report["status"] == "timeout"
    assert stats["accepted"] == 20_001
    assert stats["delivered"] + sum(stats["dropped"].values()) == 20_001
    assert stats["dropped"]["timeout"] > 0
