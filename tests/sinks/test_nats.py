"""NATS: what arrives in core NATS and in JetStream, what is stored once, and what is said when it cannot be."""

from __future__ import annotations

import logging
import uuid

import pytest
from arrivals import arrived, emit_numbers, in_jetstream, numbers_in
from event_tools import has_failed
from requirements import need
from servers import NatsServer, free_port

from bgtasks.errors import InvalidOptionError
from bgtasks.events.errors import Reject, SinkError
from bgtasks.events.sinks.nats import NatsPublisher

nats = need("nats")
need("msgspec")


@pytest.fixture
def name():
    """Give the name of a stream and its subject that no other test has."""
    return uuid.uuid4().hex


async def make_stream(server: NatsServer, name: str, **config) -> None:
    """Make a stream in files that takes the subject of its own name."""
    client = await nats.connect(server.url)
    await client.jetstream().add_stream(name=name, subjects=[name], **config)
    await client.close()


async def test_jetstream_has_each_event_once_and_in_order(nats_server, name):
    """Each event is a message with an id, as the bytes that were encoded."""
    await make_stream(nats_server, name)
    publisher = NatsPublisher(nats_server.url, subject=name)
    await emit_numbers(publisher, 1234, rate=1_000_000)
    report = await publisher.close(30)
    assert (report["status"], report["dropped"]) == ("flushed", 0)
    messages = await in_jetstream(nats_server.url, name)
    assert arrived(numbers_in([message.data for message in messages]), 1234) == (0, 0, True)
    assert messages[7].data == b'{"event":"counted","number":7,"padding":"' + b"x" * 100 + b'"}'
    assert len({message.headers["Nats-Msg-Id"] for message in messages}) == 1234


async def test_envelopes_hold_the_events_of_a_batch_as_lines(nats_server, name):
    """An envelope is one message: its lines are the events, its headers say so."""
    await make_stream(nats_server, name)
    publisher = NatsPublisher(nats_server.url, subject=name, envelope=True)
    await emit_numbers(publisher, 5000, rate=1_000_000)
    await publisher.close(30)
    messages = await in_jetstream(nats_server.url, name)
    assert len(messages) <= 20
    assert {message.headers["Content-Type"] for message in messages} == {"application/x-ndjson"}
    lines = [line for message in messages for line in message.data.splitlines()]
    assert arrived(numbers_in(lines), 5000) == (0, 0, True)


async def test_core_nats_reaches_those_who_listen(nats_server, name):
    """A subscriber of the subject gets each event, though no stream takes it."""
    client = await nats.connect(nats_server.url)
    subscription = await client.subscribe(name)
    await client.flush()
    publisher = NatsPublisher(nats_server.url, subject=name, jetstream=False)
    await emit_numbers(publisher, 700, rate=1_000_000)
    await publisher.close(30)
    events = [(await subscription.next_msg(timeout=10)).data for _ in range(700)]
    await client.close()
    assert arrived(numbers_in(events), 700) == (0, 0, True)


@pytest.mark.parametrize("envelope", [False, True])
async def test_a_batch_of_a_known_id_is_not_stored_again(nats_server, name, envelope):
    """The second try of a batch is acknowledged and stores nothing."""
    await make_stream(nats_server, name)
    publisher = NatsPublisher(nats_server.url, subject=name, envelope=envelope)
    await publisher.open()
    for _ in range(2):
        await publisher.write([b"1", b"2"], "some-id")
    await publisher.write([b"3"], "other-id")
    await publisher.release()
    messages = await in_jetstream(nats_server.url, name)
    assert [line for message in messages for line in message.data.split()] == [b"1", b"2", b"3"]


async def test_envelopes_have_other_ids_than_events(nats_server, name):
    """A batch that was tried as events and is tried again as an envelope is stored, not taken for known."""
    await make_stream(nats_server, name)
    for envelope in (False, True):
        publisher = NatsPublisher(nats_server.url, subject=name, envelope=envelope)
        await publisher.open()
        await publisher.write([b"1", b"2"], "some-id")
        await publisher.release()
    assert len(await in_jetstream(nats_server.url, name)) == 3


async def test_a_line_feed_and_an_event_too_long_fit_in_no_envelope(nats_server, name):
    """They are refused alone; the others of their batch are stored, in as many envelopes as they need."""
    await make_stream(nats_server, name)
    publisher = NatsPublisher(nats_server.url, subject=name, envelope=True)
    await publisher.open()
    with pytest.raises(Reject) as refused:
        await publisher.write([b"1", b"2\n2", b"x" * 600_000, b"x" * 1_048_500, b"y" * 600_000, b"5"], "some-id")
    await publisher.release()
    assert refused.value.indexes == (1, 3)
    messages = await in_jetstream(nats_server.url, name)
    lengths = [[len(line) for line in message.data.splitlines()] for message in messages]
    assert lengths == [[1, 600_000], [600_000, 1]]


async def test_an_event_longer_than_the_server_allows_is_refused_alone(nats_server, name):
    """NATS would close the connection over it; it is not sent."""
    await make_stream(nats_server, name)
    publisher = NatsPublisher(nats_server.url, subject=name)
    await publisher.open()
    with pytest.raises(Reject) as refused:
        await publisher.write([b"1", b"x" * 1_048_500, b"3"], "some-id")
    with pytest.raises(Reject):
        await publisher.write([b"x" * 1_048_500], "another-id")
    await publisher.write([b"4"], "other-id")
    await publisher.release()
    assert refused.value.indexes == (1,)
    assert [message.data for message in await in_jetstream(nats_server.url, name)] == [b"1", b"3", b"4"]


async def test_a_full_stream_is_tried_again(nats_server, name):
    """What the stream has no room for is not lost: it is stored when there is room."""
    await make_stream(nats_server, name, max_msgs=10, discard="new")
    publisher = NatsPublisher(nats_server.url, subject=name)
    await emit_numbers(publisher, 15)
    await has_failed(publisher)
    report = await publisher.flush(0.01)
    assert "maximum messages exceeded" in report["last_error"]
    client = await nats.connect(nats_server.url)
    await client.jetstream().purge_stream(name)
    await client.close()
    report = await publisher.close(30)
    assert (report["status"], publisher.stats()["dropped"]) == ("flushed", {})
    assert numbers_in([message.data for message in await in_jetstream(nats_server.url, name)]) == [*range(10, 15)]


# -- what is said ------------------------------------------------------------------------------------------------------


async def test_no_stream_takes_the_subject(nats_server, name):
    """The first flush reports what is missing; made, it gets the events."""
    publisher = NatsPublisher(nats_server.url, subject=name, connect=True)
    with pytest.raises(SinkError, match=f"no stream takes the subject '{name}'"):
        await publisher.start()
    publisher.emit({"number": 0})
    await has_failed(publisher)
    assert "no stream takes" in (await publisher.flush(0.01))["last_error"]
    await make_stream(nats_server, name)
    await publisher.close(30)
    assert publisher.stats()["delivered"] == 1


async def test_nobody_listens(name):
    """The report names the address."""
    port = free_port()
    publisher = NatsPublisher(f"nats://someone:secret@127.0.0.1:{port}", subject=name)
    publisher.emit({"number": 0})
    await has_failed(publisher)
    report = await publisher.close(0.1)
    assert (report["status"], report["dropped"]) == ("deadline", 1)
    assert f"127.0.0.1:{port}" in report["last_error"]
    assert "secret" not in report["last_error"]


async def test_a_wrong_token(start_server, name):
    """The report names the reason, not the token."""
    server = start_server(NatsServer, token="right")
    publisher = NatsPublisher(server.url.replace("right", "wrong"), subject=name)
    publisher.emit({"number": 0})
    await has_failed(publisher)
    report = await publisher.close(0.1)
    assert "Authorization Violation" in report["last_error"]
    assert "wrong" not in report["last_error"]


async def test_a_stream_that_forgets_too_early_is_warned_of(nats_server, name, caplog):
    """A duplicate window shorter than the time between tries is said once, with both lengths."""
    caplog.set_level(logging.WARNING)
    await make_stream(nats_server, name, duplicate_window=5)
    publisher = NatsPublisher(nats_server.url, subject=name)
    await publisher.open()
    await publisher.release()
    (record,) = caplog.records
    assert "forgets ids after 5 seconds" in record.getMessage()
    assert "120 seconds" in record.getMessage()


@pytest.mark.parametrize(("options", "text"), [({"servers": []}, "servers"), ({"timeout": 0}, "timeout")])
def test_options_outside_their_values(options, text):
    """A bad option is refused by name when the publisher is made."""
    with pytest.raises(InvalidOptionError, match=text):
        NatsPublisher(**options)
