"""RabbitMQ: confirmed messages in queues, and errors that name their cause."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid

import pytest
from arrivals import arrived, emit_numbers, in_rabbitmq, numbers_in
from cutting_proxy import CuttingProxy
from event_tools import has_failed, until
from requirements import need
from servers import free_port, make_queue

from bgtasks.errors import InvalidOptionError
from bgtasks.events import Publisher
from bgtasks.events.errors import Reject, SinkError
from bgtasks.events.sinks import rabbitmq as rabbitmq_module
from bgtasks.events.sinks.rabbitmq import RabbitMQSink

aio_pika = need("aio_pika")
need("msgspec")


@pytest.fixture
def name():
    """Give the name of a queue that no other test has."""
    return uuid.uuid4().hex


async def test_events_arrive_once_and_in_order(rabbit_server, name):
    """Each event is a persistent message with an id of its own."""
    queue = await make_queue(rabbit_server.url, name)
    publisher = Publisher(RabbitMQSink(rabbit_server.url, routing_key=queue))
    await emit_numbers(publisher, 600, rate=1_000_000)
    report = await publisher.close(30)
    assert (report["status"], report["dropped"]) == ("flushed", 0)
    messages = await in_rabbitmq(rabbit_server.url, queue)
    assert arrived(numbers_in([message.body for message in messages]), 600) == (0, 0, True)
    assert len({message.message_id for message in messages}) == 600
    assert {message.delivery_mode for message in messages} == {aio_pika.DeliveryMode.PERSISTENT}


async def test_envelopes_hold_the_events_of_a_batch_as_lines(rabbit_server, name):
    """An envelope is one message of JSON lines."""
    queue = await make_queue(rabbit_server.url, name)
    publisher = Publisher(RabbitMQSink(rabbit_server.url, routing_key=queue, envelope=True))
    await emit_numbers(publisher, 5000, rate=1_000_000)
    await publisher.close(30)
    messages = await in_rabbitmq(rabbit_server.url, queue)
    assert {message.content_type for message in messages} == {"application/x-ndjson"}
    lines = [line for message in messages for line in message.body.splitlines()]
    assert arrived(numbers_in(lines), 5000) == (0, 0, True)


@pytest.mark.loops("uvloop")
@pytest.mark.parametrize("inflight", [1, 4])
async def test_nothing_is_lost_while_the_connection_breaks(rabbit_server, name, inflight):
    """A message that arrives twice has the same id both times, so its reader can tell."""
    queue = await make_queue(rabbit_server.url, name)
    async with CuttingProxy(rabbit_server.port) as proxy:
        url = rabbit_server.url.replace(str(rabbit_server.port), str(proxy.port))
        publisher = Publisher(RabbitMQSink(url, routing_key=queue), batch=20, inflight=inflight)
        cutting = asyncio.create_task(proxy.cut_again_and_again(0.2))
        await emit_numbers(publisher, 1000, rate=1000)
        cutting.cancel()
        await asyncio.wait((cutting,))
        await publisher.close(60)
    assert publisher.stats()["delivered"] == 1000
    assert proxy.cuts >= 1
    messages = await in_rabbitmq(rabbit_server.url, queue)
    ids = {message.message_id: message.body for message in messages}
    assert sorted(numbers_in(list(ids.values()))) == list(range(1000))


async def test_a_sink_alone_writes_and_can_be_opened_again(rabbit_server, name):
    """``write`` returns when the broker has confirmed the batch; after ``close``, ``open`` makes a new connection."""
    await make_queue(rabbit_server.url, name)
    sink = RabbitMQSink(rabbit_server.url, routing_key=name)
    for batch_id in ("first", "second"):
        await sink.open()
        await sink.write([b"1", b"2"], batch_id)
        await sink.close()
    messages = await in_rabbitmq(rabbit_server.url, name)
    assert [message.body for message in messages] == [b"1", b"2", b"1", b"2"]
    assert [message.message_id for message in messages] == ["first:0", "first:1", "second:0", "second:1"]


async def test_an_event_with_a_line_feed_fits_in_no_envelope(rabbit_server, name):
    """It is refused alone; the others of its batch are in one message."""
    await make_queue(rabbit_server.url, name)
    async with RabbitMQSink(rabbit_server.url, routing_key=name, envelope=True) as sink:
        with pytest.raises(Reject) as refused:
            await sink.write([b"1", b"2\n2", b"3"], "id")
    assert refused.value.indexes == (1,)
    assert [message.body for message in await in_rabbitmq(rabbit_server.url, name)] == [b"1\n3\n"]


async def test_confirmed_messages_are_not_sent_again(rabbit_server, name, monkeypatch):
    """The next try of a batch has only the messages that were not confirmed, so that tries come to an end."""
    await make_queue(rabbit_server.url, name)
    async with RabbitMQSink(rabbit_server.url, routing_key=name) as sink:
        send, failures = sink._exchange.publish, [OSError("gone")]

        async def fail_once(message, *arguments, **options):
            if message.message_id == "id:1" and failures:
                raise failures.pop()
            return await send(message, *arguments, **options)

        monkeypatch.setattr(sink._exchange, "publish", fail_once)
        batch = [b"0", b"1", b"2"]
        with pytest.raises(SinkError, match="1 of 3 messages were not confirmed"):
            await sink.write(batch, "id")
        await sink.write(batch, "id")
    assert [message.body for message in await in_rabbitmq(rabbit_server.url, name)] == [b"0", b"2", b"1"]


async def test_batches_that_were_given_up_are_forgotten(rabbit_server, name):
    """A sink remembers the confirmations of a bounded number of batches."""
    async with RabbitMQSink(rabbit_server.url, routing_key=name) as sink:
        for number in range(100):
            with pytest.raises(SinkError, match="NO_ROUTE"):
                await sink.write([b"1"], f"id-{number}")
    assert len(sink._confirmed) < 100


async def test_a_missing_queue_is_reported(rabbit_server, name):
    """A message that no queue takes is not delivered; once the queue exists, it is."""
    publisher = Publisher(RabbitMQSink(rabbit_server.url, routing_key=name))
    publisher.emit({"number": 0})
    await has_failed(publisher)
    report = await publisher.flush(0.01)
    assert "1 of 1 messages were not confirmed" in report["last_error"]
    await make_queue(rabbit_server.url, name)
    await publisher.close(30)
    assert publisher.stats()["delivered"] == 1


async def test_a_missing_exchange_is_an_error_at_the_start(rabbit_server, name):
    """With ``connect``, ``start`` raises the error."""
    publisher = Publisher(RabbitMQSink(rabbit_server.url, exchange=name), connect=True)
    with pytest.raises(SinkError, match=f"RabbitMQ at .*{name}"):
        await publisher.start()
    await publisher.close(1)


async def test_a_wrong_password_is_reported_and_not_shown(rabbit_server, name):
    """The report names the server, but not the password."""
    publisher = Publisher(RabbitMQSink(rabbit_server.url.replace("guest@", "wrong@"), routing_key=name))
    publisher.emit({"number": 0})
    await has_failed(publisher)
    report = await publisher.close(0.1)
    assert f"RabbitMQ at 127.0.0.1:{rabbit_server.port}: " in report["last_error"]
    assert "wrong" not in report["last_error"]


async def test_an_unreachable_server_is_named(name):
    """The report of ``close`` has its address."""
    port = free_port()
    publisher = Publisher(RabbitMQSink(f"amqp://guest:guest@127.0.0.1:{port}/", routing_key=name))
    publisher.emit({"number": 0})
    await has_failed(publisher)
    report = await publisher.close(0.1)
    assert (report["status"], report["dropped"]) == ("timeout", 1)
    assert f"RabbitMQ at 127.0.0.1:{port}: " in report["last_error"]


@pytest.mark.parametrize(("options", "text"), [({"url": "http://localhost"}, "amqp"), ({"timeout": "1"}, "timeout")])
def test_an_option_outside_its_values_is_refused(options, text):
    """The error names the option when the sink is made."""
    with pytest.raises(InvalidOptionError, match=text):
        RabbitMQSink(**options)


async def test_an_unknown_virtual_host_is_named(rabbit_server):
    """The broker's refusal says what is wrong with the URL."""
    url = f"amqp://guest:guest@127.0.0.1:{rabbit_server.port}/no%20where"
    with pytest.raises(SinkError, match="there is no virtual host 'no where', or this user may not use it"):
        await RabbitMQSink(url).open()


@pytest.mark.loops("asyncio")
async def test_an_outage_is_one_line_in_the_log(rabbit_server, name, caplog):
    """The publisher logs it; aiormq's own records of the sink's connections are hidden, those of others are not."""
    caplog.set_level(logging.INFO)
    queue = await make_queue(rabbit_server.url, name)
    async with CuttingProxy(rabbit_server.port) as proxy:
        url = f"amqp://guest:guest@127.0.0.1:{proxy.port}/"
        publisher = Publisher(RabbitMQSink(url, routing_key=queue))
        publisher.emit({"number": 0})
        await publisher.flush(20)
        proxy.refuse()
        publisher.emit({"number": 1})
        await until(lambda: publisher.stats()["retried"] >= 4)
        with pytest.raises(aio_pika.exceptions.AMQPConnectionError):
            await aio_pika.connect(url)
        await publisher.close(0.2)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.name for record in warnings] == ["bgtasks.events", "aiormq.connection", "bgtasks.events"]
    assert ["cannot write" in warnings[0].message, "loses events" in warnings[2].message] == [True, True]


@pytest.mark.parametrize("envelope", [False, True])
async def test_confirmed_messages_of_a_batch_that_is_given_up_are_delivered(
    rabbit_server, name, tmp_path, monkeypatch, envelope
):
    """They are in the queue, so they are neither dropped nor dead letters."""
    monkeypatch.setattr(rabbitmq_module, "ENVELOPE_LIMIT", 60)
    queue = await make_queue(rabbit_server.url, name)
    sink = RabbitMQSink(rabbit_server.url, routing_key=queue, envelope=envelope)
    publisher = Publisher(sink, linger=0.05, retry_for=0.0, dead_letters=tmp_path / "dead")
    publish = sink._publish

    async def publish_most(message_id, body, *arguments):
        if b'"number":7' in body:
            raise RuntimeError("no confirmation")
        await publish(message_id, body, *arguments)

    monkeypatch.setattr(sink, "_publish", publish_most)
    for number in range(8):
        publisher.emit({"number": number})
    await publisher.close(20)
    numbers = [
        json.loads(line)["number"]
        for message in await in_rabbitmq(rabbit_server.url, queue)
        for line in message.body.splitlines()
    ]
    letters = [json.loads(json.loads(line)["event"])["number"] for line in (tmp_path / "dead").read_text().splitlines()]
    assert 7 in letters
    assert sorted(numbers + letters) == list(range(8))
    stats = publisher.stats()
    assert (stats["delivered"], stats["dropped"]) == (len(numbers), {"retries_exhausted": len(letters)})
    assert len(numbers) >= 4
