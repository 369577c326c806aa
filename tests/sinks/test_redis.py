"""Redis: events in streams, lists and channels, batches that are written once, and errors that name their cause."""

from __future__ import annotations

import asyncio
import logging
import uuid

import pytest
from arrivals import arrived, emit_numbers, in_redis, numbers_in
from event_tools import has_failed
from requirements import need
from servers import RedisServer, free_port

from bgtasks.errors import InvalidOptionError
from bgtasks.events import Publisher
from bgtasks.events.errors import Retry, SinkError
from bgtasks.events.sinks.redis import RedisSink

redis = need("redis")
need("msgspec")


@pytest.fixture
def key():
    """Give a name that no other test has."""
    return f"events:{uuid.uuid4().hex}"


@pytest.fixture
def client(redis_server):
    """Give a client of the server that the tests share."""
    with redis.Redis.from_url(redis_server.url) as client:
        yield client


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_events_arrive_once_and_in_order(redis_server, key, mode):
    """Accepted events are in the stream or list, in the order of emission, as the encoded bytes."""
    publisher = Publisher(RedisSink(redis_server.url, key=key, mode=mode))
    await emit_numbers(publisher, 2345, rate=1_000_000)
    report = await publisher.close()
    assert (report["status"], report["dropped"]) == ("flushed", 0)
    events = in_redis(redis_server.url, key, mode)
    assert arrived(numbers_in(events), 2345) == (0, 0, True)
    assert events[7] == b'{"event":"counted","number":7,"padding":"' + b"x" * 100 + b'"}'


async def test_events_reach_the_subscribers_of_a_channel(redis_server, key):
    """A subscriber gets each event as a message."""
    client = redis.asyncio.Redis.from_url(redis_server.url)
    async with client.pubsub() as channel:
        await channel.subscribe(key)
        publisher = Publisher(RedisSink(redis_server.url, key=key, mode="pubsub"))
        await emit_numbers(publisher, 700, rate=1_000_000)
        await publisher.close()
        events = []
        async for message in channel.listen():
            if message["type"] == "message":
                events.append(message["data"])
            if len(events) == 700:
                break
    await client.aclose()
    assert arrived(numbers_in(events), 700) == (0, 0, True)


@pytest.mark.parametrize("mode", ["stream", "list", "pubsub"])
async def test_a_batch_of_a_known_id_is_not_written_again(redis_server, client, key, mode):
    """A second write of a batch succeeds and changes nothing."""
    listener = client.pubsub(ignore_subscribe_messages=True)
    listener.subscribe(key)
    async with RedisSink(redis_server.url, key=key, mode=mode) as sink:
        for _ in range(2):
            await sink.write([b"1", b"2"], "some-id")
        await sink.write([b"3"], "other-id")
    if mode == "pubsub":
        received = [message["data"] for _ in range(10) if (message := listener.get_message(timeout=0.1))]
    else:
        received = in_redis(redis_server.url, key, mode)
    listener.close()
    assert received == [b"1", b"2", b"3"]


@pytest.mark.parametrize("mode", ["stream", "list"])
@pytest.mark.parametrize("scripted", [True, False], ids=["script", "transaction"])
async def test_a_batch_that_was_refused_is_written_by_the_next_try(redis_server, client, key, mode, scripted):
    """A batch that Redis refused leaves no id: the next try must not take it for written."""
    client.set(key, "of another type")
    sink = RedisSink(redis_server.url, key=key, mode=mode)
    sink._is_scripted = scripted
    async with sink:
        with pytest.raises(Retry, match="WRONGTYPE"):
            await sink.write([b"1"], "some-id")
        client.delete(key)
        await sink.write([b"1"], "some-id")
    assert in_redis(redis_server.url, key, mode) == [b"1"]


@pytest.mark.parametrize("target", ["events", "{shop}:events", "a{b", "a{b}{c}"])
async def test_the_id_of_a_batch_is_in_the_slot_of_the_key(redis_server, client, key, target):
    """A Cluster runs a script only if its keys hash to one slot; the id expires after remember_for seconds."""
    target += key.replace("events:", "")
    async with RedisSink(redis_server.url, key=target, remember_for=100) as sink:
        await sink.write([b"1"], "the-id")
    (id_key,) = (found for found in client.keys("*:b:the-id") if client.ttl(found) > 0 and key[7:].encode() in found)
    assert redis.cluster.key_slot(id_key) == redis.cluster.key_slot(target.encode())
    assert 90 < client.ttl(id_key) <= 100
    client.delete(id_key)


async def test_a_publisher_into_a_cluster(start_server, key):
    """A client of a Cluster works like any other client."""
    server = start_server(RedisServer, options=("--cluster-enabled", "yes", "--cluster-port", str(free_port())))
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        while b"cluster_state:ok" not in client.execute_command("CLUSTER", "INFO"):
            await asyncio.sleep(0.01)
    publisher = Publisher(
        RedisSink(key=key, client_factory=lambda: redis.asyncio.RedisCluster(host="127.0.0.1", port=server.port))
    )
    await emit_numbers(publisher, 1200, rate=1_000_000)
    report = await publisher.close()
    assert (report["delivered"], report["last_error"]) == (1200, None)
    assert arrived(numbers_in(in_redis(server.url, key)), 1200) == (0, 0, True)


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_no_more_than_maxlen_stays(redis_server, client, key, mode):
    """The oldest are deleted: in a list exactly, in a stream as soon as Redis can drop a node of it."""
    publisher = Publisher(RedisSink(redis_server.url, key=key, mode=mode, maxlen=1000))
    await emit_numbers(publisher, 5000, rate=1_000_000)
    await publisher.close()
    numbers = numbers_in(in_redis(redis_server.url, key, mode))
    assert numbers == list(range(5000 - len(numbers), 5000))
    assert 1000 <= len(numbers) <= (1000 if mode == "list" else 1200)


@pytest.mark.parametrize("mode", ["stream", "list"])
@pytest.mark.parametrize("forbidden", ["renamed", "by_acl", "all_but_evalsha"])
async def test_where_scripts_are_forbidden_a_transaction_does_the_same(start_server, key, mode, forbidden):
    """Events arrive, and a batch that is sent twice is written once."""
    options = ("--rename-command", "EVALSHA", "", "--rename-command", "EVAL", "") if forbidden == "renamed" else ()
    server = start_server(RedisServer, options=options)
    rights = {"by_acl": ["-@scripting"], "all_but_evalsha": ["-@scripting", "+evalsha"]}.get(forbidden, [])
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("ACL", "SETUSER", "default", *rights)
    publisher = Publisher(RedisSink(server.url, key=key, mode=mode, maxlen=10_000))
    await emit_numbers(publisher, 1100, rate=1_000_000)
    await publisher.flush()
    for _ in range(2):
        await publisher.sink.write([b'{"number":1100}'], "some-id")
    await publisher.close()
    assert arrived(numbers_in(in_redis(server.url, key, mode)), 1101) == (0, 0, True)


async def test_a_server_that_forgot_the_script_gets_it_again(redis_server, client, key):
    """After SCRIPT FLUSH, as after a restart, the next batch arrives."""
    async with RedisSink(redis_server.url, key=key) as sink:
        await sink.write([b"1"], "first")
        client.script_flush()
        await sink.write([b"2"], "second")
    assert in_redis(redis_server.url, key) == [b"1", b"2"]


async def test_a_sink_can_be_opened_again(redis_server, key):
    """After ``close``, ``open`` makes a new client; what was written is still known by its id."""
    sink = RedisSink(redis_server.url, key=key)
    for batch_id in ("first", "first", "second"):
        await sink.open()
        await sink.write([batch_id.encode()], batch_id)
        await sink.close()
    assert in_redis(redis_server.url, key) == [b"first", b"second"]


async def test_a_call_cancelled_in_flight_leaves_no_answer_behind(start_server, key):
    """After a write that was cancelled while the server was frozen, the next one gets its own answer."""
    server = start_server(RedisServer)
    publisher = Publisher(RedisSink(server.url, key=key))
    await emit_numbers(publisher, 10)
    await publisher.flush()
    server.freeze()
    await emit_numbers(publisher, 10)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await publisher.flush(10)
    flusher = next(task for task in asyncio.all_tasks() if task.get_name() == "publisher RedisSink")
    flusher.cancel()
    await asyncio.sleep(0)
    server.thaw()
    await asyncio.wait((flusher,))
    await emit_numbers(publisher, 10)
    await publisher.close()
    assert sorted(numbers_in(in_redis(server.url, key))) == sorted([*range(10)] * 3)


async def test_a_user_needs_only_the_rights_that_the_documentation_names(start_server):
    """With those commands and keys every mode works."""
    server = start_server(RedisServer)
    with redis.Redis.from_url(server.url) as client:
        rights = "+evalsha +eval +exists +set +xadd +xtrim +rpush +ltrim +publish"
        client.execute_command(
            *("ACL", "SETUSER", "writer", "on", ">secret", "~events", "~{events}:b:*", "&events", *rights.split())
        )
        for mode in ("stream", "pubsub", "list"):
            client.delete("events")
            url = server.url.replace("redis://", "redis://writer:secret@")
            publisher = Publisher(RedisSink(url, key="events", mode=mode), connect=True)
            async with publisher:
                await emit_numbers(publisher, 10)
            assert (publisher.stats()["delivered"], publisher.stats()["retried"]) == (10, 0)


# -- errors -----------------------------------------------------------------------------------------------------------


async def test_an_unreachable_server_is_named(key):
    """The report of ``close`` has its address; with ``connect``, ``start`` raises the error."""
    port = free_port()
    publisher = Publisher(RedisSink(f"redis://127.0.0.1:{port}", key=key), connect=True)
    with pytest.raises(SinkError, match=rf"Redis at 127\.0\.0\.1:{port}: .*{port}"):
        await publisher.start()
    publisher.emit({"event": "lost"})
    await has_failed(publisher)
    report = await publisher.close(0.1)
    assert (report["status"], report["dropped"]) == ("timeout", 1)
    assert f"127.0.0.1:{port}" in report["last_error"]


async def test_a_wrong_password_is_reported_and_not_shown(start_server, key):
    """The report names the server and the reason, but no password."""
    server = start_server(RedisServer, password="right")
    publisher = Publisher(RedisSink(server.url.replace("right", "wrong"), key=key))
    publisher.emit({"event": "lost"})
    await has_failed(publisher)
    report = await publisher.close(0.1)
    assert f"Redis at 127.0.0.1:{server.port}: " in report["last_error"]
    assert "password" in report["last_error"]
    assert "wrong" not in report["last_error"]


async def test_the_right_password_is_sent(start_server, key):
    """A server with a password takes the events."""
    server = start_server(RedisServer, password="right")
    publisher = Publisher(RedisSink(server.url, key=key))
    publisher.emit({"event": "found"})
    assert (await publisher.close())["delivered"] == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"url": "http://localhost"}, "redis://"),
        ({"url": "redis://localhost:port"}, "url"),
        ({"mode": "topic"}, "'stream', 'pubsub', 'list'"),
        ({"maxlen": 0}, "maxlen"),
        ({"key": "a{}b"}, "brace"),
        ({"key": "a}b"}, "brace"),
        ({"remember_for": 0}, "remember_for"),
        ({"remember_for": float("nan")}, "remember_for"),
        ({"timeout": -1}, "timeout"),
    ],
)
def test_an_option_outside_its_values_is_refused(options, text):
    """The error names the option when the sink is made."""
    with pytest.raises(InvalidOptionError, match=text):
        RedisSink(**options)


async def test_a_server_without_memory_is_tried_again(start_server, key, caplog):
    """An error as the answer keeps the connection open; the events arrive when the server has memory again."""
    caplog.set_level(logging.WARNING)
    server = start_server(RedisServer)
    with redis.Redis.from_url(server.url) as client:
        publisher = Publisher(RedisSink(server.url, key=key))
        await emit_numbers(publisher, 5)
        await publisher.flush()
        client.config_set("maxmemory", 1)
        await emit_numbers(publisher, 5)
        await has_failed(publisher)
        report = await publisher.flush(0.01)
        assert "OOM" in report["last_error"] or "maxmemory" in report["last_error"]
        connections = client.info("stats")["total_connections_received"]
        client.config_set("maxmemory", 0)
        await publisher.close()
        assert client.info("stats")["total_connections_received"] == connections
    assert numbers_in(in_redis(server.url, key)) == [*range(5)] * 2


@pytest.mark.parametrize("url", ["redis:/x", "localhost:6379", "http://localhost"])
def test_a_url_that_is_none_is_refused(url):
    """Not taken for the server on this machine, as redis-py does; no password gets into the message."""
    with pytest.raises(InvalidOptionError, match="url must begin with redis://, rediss:// or unix://"):
        RedisSink(url)
    with pytest.raises(InvalidOptionError) as caught:
        RedisSink("redis:/user:secret@host")
    assert "secret" not in str(caught.value)


async def test_a_missing_password_is_named(start_server):
    """The server's own text does not say that a password is missing."""
    server = start_server(RedisServer, password="secret")
    with pytest.raises(SinkError, match="it demands a password; put it into the URL"):
        await RedisSink(f"redis://127.0.0.1:{server.port}").open()


async def test_missing_rights_are_named(start_server):
    """For a user who may run neither scripts nor transactions the error names the rights to ask for; later it works."""
    server = start_server(RedisServer)
    async with redis.asyncio.Redis.from_url(server.url) as client:
        await client.execute_command("ACL", "SETUSER", "ann", "on", ">word", "~*", "+ping")
        async with RedisSink(f"redis://ann:word@127.0.0.1:{server.port}") as sink:
            with pytest.raises(Retry, match=r"'evalsha' command; .*'watch' command. Grant \+evalsha \+eval"):
                await sink.write([b"1"], "1")
            await client.execute_command("ACL", "SETUSER", "ann", "+@all")
            await sink.write([b"1"], "1")
            assert sink._is_scripted
