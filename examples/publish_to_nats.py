"""Publishes events into JetStream, a message each and as envelopes, and asks the stream what it has.

Start a server, and install what the example needs::

    nats-server --jetstream --addr 127.0.0.1 --port 4222
    pip install "bgtasks-registry[nats]"
    python examples/publish_to_nats.py nats://localhost:4222

"""

from __future__ import annotations

import sys
from functools import partial

import nats
from nats.js.api import StreamConfig

import bgtasks
from bgtasks import BackgroundTaskManager
from bgtasks.events import Publisher
from bgtasks.events.sinks.nats import NatsSink

EVENTS = 10_000


async def main(url: str, manager: BackgroundTaskManager) -> None:
    """Make the stream, publish twice."""
    client = await nats.connect(url)
    stream = client.jetstream()
    # Ids are known for an hour: a batch that is tried again within it is not stored twice.
    await stream.add_stream(StreamConfig(name="ORDERS", subjects=["orders"], duplicate_window=3600))

    for envelope in (False, True):
        before = (await stream.stream_info("ORDERS")).state.messages
        publisher = Publisher(NatsSink(url, subject="orders", envelope=envelope), manager=manager)
        for number in range(EVENTS):
            publisher.emit({"event": "order_paid", "order": number})
        report = await publisher.close()
        messages = (await stream.stream_info("ORDERS")).state.messages - before
        print(f"{report['delivered']:,} of {EVENTS:,} events delivered, as {messages:,} messages")
    await client.close()


if __name__ == "__main__":
    bgtasks.run(partial(main, sys.argv[1] if len(sys.argv) > 1 else "nats://localhost:4222"))
