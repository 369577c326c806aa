"""Kafka: messages in a topic, events that are refused alone, and errors that name their cause."""

from __future__ import annotations

import asyncio
import uuid

import pytest
from arrivals import arrived, emit_numbers, in_kafka, numbers_in
from event_tools import has_failed
from requirements import need
from servers import free_port

from bgtasks.errors import InvalidOptionError
from bgtasks.events import Publisher
from bgtasks.events.errors import Reject, Retry, SinkError
from bgtasks.events.sinks.kafka import KafkaSink

need("confluent_kafka")
need("msgspec")


@pytest.fixture
def topic():
    """Give the name of a topic that no other test has."""
    return uuid.uuid4().hex


async def test_events_arrive_once_and_in_order(kafka_broker, topic):
    """With one key all events are in one partition, in the order of emission."""
    publisher = Publisher(KafkaSink(kafka_broker.url, topic=topic, key="one"))
    await emit_numbers(publisher, 2345, rate=1_000_000)
    report = await publisher.close(30)
    assert (report["status"], report["dropped"], report["last_error"]) == ("flushed", 0, None)
    events = await asyncio.to_thread(in_kafka, kafka_broker.url, topic)
    assert arrived(numbers_in(events), 2345) == (0, 0, True)


async def test_a_sink_alone_writes_and_can_be_opened_again(kafka_broker, topic):
    """``write`` returns when the broker has the batch; after ``close``, ``open`` makes a new producer."""
    sink = KafkaSink(kafka_broker.url, topic=topic, key="one")
    for batch_id in ("first", "second"):
        await sink.open()
        await sink.write([b"1", b"2"], batch_id)
        assert (await asyncio.to_thread(in_kafka, kafka_broker.url, topic))[-2:] == [b"1", b"2"]
        await sink.close()
    assert await asyncio.to_thread(in_kafka, kafka_broker.url, topic) == [b"1", b"2", b"1", b"2"]


async def test_an_event_too_long_is_rejected_with_its_index(kafka_broker, topic):
    """The other events of its batch are stored."""
    async with KafkaSink(kafka_broker.url, topic=topic, key="one", config={"message.max.bytes": 1000}) as sink:
        with pytest.raises(Reject) as refused:
            await sink.write([b"1", b"x" * 2000, b"3"], "id")
    assert refused.value.indexes == (1,)
    assert await asyncio.to_thread(in_kafka, kafka_broker.url, topic) == [b"1", b"3"]


async def test_events_too_long_are_refused_alone(kafka_broker, topic, tmp_path):
    """One event in a hundred is too long for a message: it is a dead letter, all others arrive once."""
    config = {"message.max.bytes": 1000}
    publisher = Publisher(
        KafkaSink(kafka_broker.url, topic=topic, key="k", config=config), dead_letters=tmp_path / "dead"
    )
    for number in range(2000):
        assert publisher.emit({"number": number, "padding": "x" * (2000 if number % 100 == 50 else 10)})
    await publisher.close(30)
    stats = publisher.stats()
    assert (stats["delivered"], stats["dropped"]) == (1980, {"rejected": 20})
    events = await asyncio.to_thread(in_kafka, kafka_broker.url, topic)
    assert numbers_in(events) == [number for number in range(2000) if number % 100 != 50]
    assert len((tmp_path / "dead").read_text().splitlines()) == 20


@pytest.mark.loops("uvloop")
async def test_a_try_that_times_out_is_waited_for_and_not_sent_again(topic):
    """If the broker answers late, the next try of a batch waits for what librdkafka still has; events come once."""
    confluent_kafka = need("confluent_kafka")
    carrier = confluent_kafka.Producer({"test.mock.num.brokers": 1, "test.mock.broker.rtt": 400, "log_level": 0})
    address = ",".join(f"{broker.host}:{broker.port}" for broker in carrier.list_topics(timeout=30).brokers.values())
    batch = [b"%d" % number for number in range(100)]
    tries = []
    async with KafkaSink(address, topic=topic, key="k") as sink:
        sink._timeout = 0.05
        while True:
            try:
                await sink.write(batch, "some-id")
            except Retry as error:
                tries.append(str(error))
            else:
                break
    assert len(tries) >= 2
    assert all("no answer for 100 messages yet" in text for text in tries)
    assert await asyncio.to_thread(in_kafka, address, topic) == batch


async def test_an_unreachable_broker_is_named(topic):
    """The report of ``close`` has its address; with ``connect``, ``start`` raises; ``close`` keeps to its timeout."""
    address = f"127.0.0.1:{free_port()}"
    publisher = Publisher(KafkaSink(address, topic=topic, timeout=0.3), connect=True)
    with pytest.raises(SinkError, match=f"Kafka at {address}"):
        await publisher.start()
    publisher.emit({"number": 0})
    async with asyncio.timeout(30):
        await has_failed(publisher)
        report = await publisher.close(0.1)
    assert (report["status"], report["dropped"]) == ("timeout", 1)
    assert address in report["last_error"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"config": {"no.such.setting": 1}}, "no.such.setting"),
        ({"config": {"acks": "some"}}, "acks"),
        ({"timeout": float("inf")}, "timeout"),
    ],
)
def test_an_option_outside_its_values_is_refused(options, text):
    """Settings that librdkafka does not know are refused by name when the sink is made."""
    with pytest.raises(InvalidOptionError, match=text):
        KafkaSink(**options)


def test_the_client_reconnects_within_a_second(kafka_broker):
    """By default, librdkafka waits for up to ten seconds between its tries; the options of the user win."""
    assert KafkaSink(kafka_broker.url, topic="x")._settings["reconnect.backoff.max.ms"] == 1000
    own = KafkaSink(kafka_broker.url, topic="x", config={"reconnect.backoff.max.ms": 5000})
    assert own._settings["reconnect.backoff.max.ms"] == 5000
