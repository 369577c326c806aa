"""Servers of several: the leader is killed, another one takes over, and nothing is lost uncounted."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from arrivals import arrived, emit_numbers, in_jetstream, in_redis, numbers_in
from requirements import need
from servers import NatsServer, RedisServer, free_port

from bgtasks.events import Publisher
from bgtasks.events.sinks.nats import NatsSink
from bgtasks.events.sinks.redis import RedisSink

redis = need("redis")
nats = need("nats")
need("msgspec")

# A failover takes seconds; differences between loops are tested with each sink.
pytestmark = pytest.mark.loops("uvloop")

COUNT = 12_000
PATIENCE = 60


async def until(condition):
    """Wait until an awaited condition holds; an error means that it does not hold yet."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(redis.RedisError, nats.errors.Error):
                if await condition():
                    return
            await asyncio.sleep(0.05)


async def publish_through(publisher, harm):
    """Emit events, do harm after a third of them, and have all delivered."""
    emitting = asyncio.create_task(emit_numbers(publisher, COUNT, rate=6000))
    while publisher.stats()["delivered"] < COUNT // 3:
        await asyncio.sleep(0.01)
    await harm()
    await emitting
    report = await publisher.flush(PATIENCE)
    assert report["status"] == "flushed", report
    await publisher.close(PATIENCE)
    assert publisher.stats()["delivered"] == COUNT
    assert publisher.stats()["retried"]


def client_of(server):
    """Return a client of one server."""
    return redis.asyncio.Redis(host="127.0.0.1", port=server.port, socket_timeout=1)


async def test_redis_sentinel(start_server, tmp_path):
    """Redis replicates without waiting: what it answered and had not passed on is lost; nothing else, nothing doubled.

    The primary is killed once the replica has all that was answered so far; the events of the batch in between are the
    only ones that may be missing.
    """
    primary = start_server(RedisServer)
    replica = start_server(RedisServer, options=("--replicaof", "127.0.0.1", str(primary.port)))
    files = []
    for number in range(3):
        file = tmp_path / f"sentinel-{number}.conf"
        file.write_text(
            f"sentinel monitor events 127.0.0.1 {primary.port} 2\n"
            "sentinel down-after-milliseconds events 500\nsentinel failover-timeout events 5000\n"
        )
        files.append(file)
    sentinels = [start_server(SentinelServer, config=file) for file in files]
    async with client_of(replica) as client:
        await until(lambda: _is_linked(client))
    async with client_of(sentinels[0]) as client:
        await until(lambda: _knows_all(client))

    def make_client():
        from redis.asyncio import Sentinel
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        addresses = [("127.0.0.1", sentinel.port) for sentinel in sentinels]
        sentinel = Sentinel(addresses, socket_timeout=1)
        return sentinel.master_for("events", socket_timeout=1, retry=Retry(NoBackoff(), 0))

    publisher = Publisher(RedisSink(key="events", client_factory=make_client))

    async def kill_primary():
        primary.kill()

    await publish_through(publisher, kill_primary)
    lost, doubled, in_order = arrived(numbers_in(in_redis(replica.url, "events")), COUNT)
    # Replication is asynchronous: at most the last batches that the primary answered.
    assert lost <= 1500
    assert (doubled, in_order) == (0, True)


async def _is_linked(client):
    return (await client.info("replication"))["master_link_status"] == "up"


async def _knows_all(client):
    answer = await client.execute_command("SENTINEL", "CKQUORUM", "events")
    masters = await client.sentinel_masters()
    state = masters["events"]
    return answer and state["num-slaves"] == 1 and state["num-other-sentinels"] == 2


class SentinelServer(RedisServer):
    """A Sentinel.

    Args:
        folder: an empty directory for its log.
        config: its file, which it changes.

    """

    def __init__(self, folder, *, config):
        super().__init__(folder)
        self.config = config

    def arguments(self):
        """Listen on the loopback address only."""
        return [str(self.config), "--sentinel", "--bind", "127.0.0.1", "--port", str(self.port)]


async def test_redis_cluster(start_server):
    """Three primaries with a replica each: the owner of the stream is killed, and its replica takes over."""
    nodes = []
    for _ in range(6):
        options = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--cluster-node-timeout", "1000")
        nodes.append(start_server(RedisServer, options=options))
    ports = {}
    for node in nodes:
        async with client_of(node) as client:
            ports[node.port] = int((await client.config_get("cluster-port"))["cluster-port"])
    bounds = [(0, 5460), (5461, 10922), (10923, 16383)]
    for node, (first, last) in zip(nodes[:3], bounds, strict=True):
        async with client_of(node) as client:
            await client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
    async with client_of(nodes[0]) as client:
        for node in nodes[1:]:
            await client.execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, ports[node.port])
        ids = {}
        await until(lambda: _knows_nodes(client, 6))
    for node in nodes:
        async with client_of(node) as client:
            await until(lambda client=client: _knows_nodes(client, 6))
            ids[node.port] = await client.execute_command("CLUSTER", "MYID")
    for primary, replica in zip(nodes[:3], nodes[3:], strict=True):
        async with client_of(replica) as client:
            await client.execute_command("CLUSTER", "REPLICATE", ids[primary.port])
            await until(lambda client=client: _is_linked(client))
    for node in nodes:
        async with client_of(node) as client:
            await until(lambda client=client: _is_ok(client))

    slot = redis.cluster.key_slot(b"events")
    owner = next(number for number, (first, last) in enumerate(bounds) if first <= slot <= last)
    other = nodes[(owner + 1) % 3]

    def make_client():
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        return redis.asyncio.RedisCluster(
            host="127.0.0.1", port=other.port, socket_timeout=1, retry=Retry(NoBackoff(), 0)
        )

    publisher = Publisher(RedisSink(key="events", client_factory=make_client))

    async def kill_owner():
        nodes[owner].kill()

    await publish_through(publisher, kill_owner)
    lost, doubled, in_order = arrived(numbers_in(in_redis(nodes[owner + 3].url, "events")), COUNT)
    assert lost <= 1500
    assert (doubled, in_order) == (0, True)


async def _knows_nodes(client, count):
    info = await client.execute_command("CLUSTER", "INFO")
    text = info if isinstance(info, dict) else dict(line.split(":") for line in info.decode().split())
    return int(text["cluster_known_nodes"]) == count


async def _is_ok(client):
    info = await client.execute_command("CLUSTER", "INFO")
    text = info if isinstance(info, dict) else dict(line.split(":") for line in info.decode().split())
    return text["cluster_state"] == "ok"


@pytest.mark.parametrize("envelope", [False, True], ids=["events", "envelopes"])
async def test_three_nats_servers(start_server, envelope):
    """A stream with three replicas: its leader is killed; 0 lost, 0 doubled."""
    routes = [free_port() for _ in range(3)]
    servers = []
    for number, route in enumerate(routes):
        others = ",".join(f"nats://127.0.0.1:{port}" for port in routes)
        options = (
            *("--name", f"n{number}", "--cluster_name", "events", "--cluster", f"nats://127.0.0.1:{route}"),
            *("--routes", others),
        )
        servers.append(start_server(NatsServer, options=options))
    urls = [server.url for server in servers]
    client = await nats.connect(urls)
    context = client.jetstream(timeout=2)

    async def make_stream():
        await context.add_stream(name="EVENTS", subjects=["events"], num_replicas=3, duplicate_window=120)
        return True

    await until(make_stream)
    leader = (await context.stream_info("EVENTS")).cluster.leader
    await client.close()
    victim = servers[int(leader[1:])]
    rest = next(server for server in servers if server is not victim)

    async def kill_leader():
        victim.kill()

    publisher = Publisher(NatsSink(urls, subject="events", envelope=envelope, timeout=1))
    await publish_through(publisher, kill_leader)
    lines = [line for message in await in_jetstream(rest.url, "EVENTS") for line in message.data.splitlines()]
    assert arrived(numbers_in(lines), COUNT)[:2] == (0, 0)
