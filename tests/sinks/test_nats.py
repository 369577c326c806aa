"""NATS: events in core NATS and in JetStream, batches that are stored once, and errors that name their cause."""

from __future__ import annotations

import logging
import uuid

import pytest
from arrivals import arrived, emit_numbers, in_jetstream, numbers_in
from event_tools import has_failed
from requirements import need
from servers import NatsServer, free_port

from bgtasks.errors import InvalidOptionError
from bgtasks.events import Publisher
from bgtasks.events.errors import Reject, SinkError
from bgtasks.events.sinks.nats import NatsSink

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


def test_a_url_of_another_kind_is_refused():
    """The message names the schemes that there are."""
    with pytest.raises(InvalidOptionError, match="begins with nats://, tls://, ws://, wss://; got http://"):
        NatsSink("http://localhost:4222")
    NatsSink("localhost:4222")


async def test_jetstream_has_each_event_once_and_in_order(nats_server, name):
    """Each event is a message with an id; its body is the encoded event."""
    await make_stream(nats_server, name)
    publisher = Publisher(NatsSink(nats_server.url, subject=name))
    await emit_numbers(publisher, 1234, rate=1_000_000)
    report = await publisher.close(30)
    assert (report["status"], report["dropped"]) == ("flushed", 0)
    messages = await in_jetstream(nats_server.url, name)
    assert arrived(numbers_in([message.data for message in messages]), 1234) == (0, 0, True)
    assert messages[7].data == b'{"event":"counted","number":7,"padding":"' + b"x" * 100 + b'"}'
    assert len({message.headers["Nats-Msg-Id"] for message in messages}) == 1234


async def test_envelopes_hold_the_events_of_a_batch_as_lines(nats_server, name):
    """An envelope is one message: its lines are the events, its headers have their content type."""
    await make_stream(nats_server, name)
    publisher = Publisher(NatsSink(nats_server.url, subject=name, envelope=True))
    await emit_numbers(publisher, 5000, rate=1_000_000)
    await publisher.close(30)
    messages = await in_jetstream(nats_server.url, name)
    assert len(messages) <= 20
    assert {message.headers["Content-Type"] for message in messages} == {"application/x-ndjson"}
    lines = [line for message in messages for line in message.data.splitlines()]
    assert arrived(numbers_in(lines), 5000) == (0, 0, True)


async def test_core_nats_reaches_the_subscribers(nats_server, name):
    """A subscriber of the subject gets each event without any stream."""
    client = await nats.connect(nats_server.url)
    subscription = await client.subscribe(name)
    await client.flush()
    publisher = Publisher(NatsSink(nats_server.url, subject=name, jetstream=False))
    await emit_numbers(publisher, 700, rate=1_000_000)
    await publisher.close(30)
    events = [(await subscription.next_msg(timeout=10)).data for _ in range(700)]
    await client.close()
    assert arrived(numbers_in(events), 700) == (0, 0, True)


@pytest.mark.parametrize("envelope", [False, True])
async def test_a_batch_of_a_known_id_is_not_stored_again(nats_server, name, envelope):
    """The second write of a batch is acknowledged and stores nothing."""
    await make_stream(nats_server, name)
    async with NatsSink(nats_server.url, subject=name, envelope=envelope) as sink:
        for _ in range(2):
            await sink.write([b"1", b"2"], "some-id")
        await sink.write([b"3"], "other-id")
    messages = await in_jetstream(nats_server.url, name)
    assert [line for message in messages for line in message.data.split()] == [b"1", b"2", b"3"]


async def test_a_core_nats_sink_alone_reaches_the_subscribers(nats_server, name):
    """``write`` returns when the server has processed the messages; a second write reaches the listeners again."""
    client = await nats.connect(nats_server.url)
    subscription = await client.subscribe(name)
    await client.flush()
    async with NatsSink(nats_server.url, subject=name, jetstream=False) as sink:
        for _ in range(2):
            await sink.write([b"1", b"2"], "some-id")
    received = [(await subscription.next_msg(timeout=10)).data for _ in range(4)]
    await client.close()
    assert received == [b"1", b"2"] * 2


async def test_a_sink_can_be_opened_again(nats_server, name):
    """After ``close``, ``open`` makes a new connection; the stream still knows the ids."""
    await make_stream(nats_server, name)
    sink = NatsSink(nats_server.url, subject=name)
    for batch_id in ("first", "first", "second"):
        await sink.open()
        await sink.write([batch_id.encode()], batch_id)
        await sink.close()
    assert [message.data for message in await in_jetstream(nats_server.url, name)] == [b"first", b"second"]


async def test_envelopes_have_other_ids_than_events(nats_server, name):
    """A batch that was tried as events and is tried again as an envelope is stored, not taken for known."""
    await make_stream(nats_server, name)
    for envelope in (False, True):
        async with NatsSink(nats_server.url, subject=name, envelope=envelope) as sink:
            await sink.write([b"1", b"2"], "some-id")
    assert len(await in_jetstream(nats_server.url, name)) == 3


async def test_a_line_feed_and_an_event_too_long_fit_in_no_envelope(nats_server, name):
    """Such events are refused alone; the others of their batch are stored, in as many envelopes as they need."""
    await make_stream(nats_server, name)
    async with NatsSink(nats_server.url, subject=name, envelope=True) as sink:
        with pytest.raises(Reject) as refused:
            await sink.write([b"1", b"2\n2", b"x" * 600_000, b"x" * 1_048_500, b"y" * 600_000, b"5"], "some-id")
    assert refused.value.indexes == (1, 3)
    messages = await in_jetstream(nats_server.url, name)
    lengths = [[len(line) for line in message.data.splitlines()] for message in messages]
    assert lengths == [[1, 600_000], [600_000, 1]]


async def test_an_event_longer_than_the_server_allows_is_refused_alone(nats_server, name):
    """It is not sent, because NATS would close the connection."""
    await make_stream(nats_server, name)
    async with NatsSink(nats_server.url, subject=name) as sink:
        with pytest.raises(Reject) as refused:
            await sink.write([b"1", b"x" * 1_048_500, b"3"], "some-id")
        with pytest.raises(Reject):
            await sink.write([b"x" * 1_048_500], "another-id")
        await sink.write([b"4"], "other-id")
    assert refused.value.indexes == (1,)
    assert [message.data for message in await in_jetstream(nats_server.url, name)] == [b"1", b"3", b"4"]


async def test_a_full_stream_is_tried_again(nats_server, name):
    """Events that do not fit into the stream are stored when there is space again."""
    await make_stream(nats_server, name, max_msgs=10, discard="new")
    publisher = Publisher(NatsSink(nats_server.url, subject=name))
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


# -- errors -----------------------------------------------------------------------------------------------------------


async def test_a_missing_stream_is_reported(nats_server, name):
    """The report of a flush names the subject; once the stream exists it gets the events."""
    publisher = Publisher(NatsSink(nats_server.url, subject=name), connect=True)
    with pytest.raises(SinkError, match=f"no stream takes the subject '{name}'"):
        await publisher.start()
    publisher.emit({"number": 0})
    await has_failed(publisher)
    assert "no stream takes" in (await publisher.flush(0.01))["last_error"]
    await make_stream(nats_server, name)
    await publisher.close(30)
    assert publisher.stats()["delivered"] == 1


async def test_an_unreachable_server_is_named(name):
    """The report has its address, but no password."""
    port = free_port()
    publisher = Publisher(NatsSink(f"nats://someone:secret@127.0.0.1:{port}", subject=name))
    publisher.emit({"number": 0})
    await has_failed(publisher)
    report = await publisher.close(0.1)
    assert (report["status"], report["dropped"]) == ("timeout", 1)
    assert f"127.0.0.1:{port}" in report["last_error"]
    assert "secret" not in report["last_error"]


async def test_a_wrong_token_is_reported_and_not_shown(start_server, name):
    """The report has the reason, but not the token."""
    server = start_server(NatsServer, token="right")
    publisher = Publisher(NatsSink(server.url.replace("right", "wrong"), subject=name))
    publisher.emit({"number": 0})
    await has_failed(publisher)
    report = await publisher.close(0.1)
    assert "Authorization Violation" in report["last_error"]
    assert "wrong" not in report["last_error"]


async def test_a_stream_that_forgets_ids_too_early_is_logged(nats_server, name, caplog):
    """A duplicate window shorter than the time between tries is one warning, with both lengths."""
    caplog.set_level(logging.WARNING)
    await make_stream(nats_server, name, duplicate_window=5)
    async with NatsSink(nats_server.url, subject=name):
        pass
    (record,) = caplog.records
    assert "forgets ids after 5 seconds" in record.getMessage()
    assert "120 seconds" in record.getMessage()


@pytest.mark.parametrize(("options", "text"), [({"servers": []}, "servers"), ({"timeout": 0}, "timeout")])
def test_an_option_outside_its_values_is_refused(options, text):
    """The error names the option when the sink is made."""
    with pytest.raises(InvalidOptionError, match=text):
        NatsSink(**options)
