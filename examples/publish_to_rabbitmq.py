"""Publishes events into a durable queue of RabbitMQ, as envelopes, and takes them out again.

Start a server, and install what the example needs::

    rabbitmq-server
    pip install "bgtasks-registry[rabbitmq]"
    python examples/publish_to_rabbitmq.py amqp://guest:guest@localhost/

"""

from __future__ import annotations

import json
import sys
from functools import partial

import aio_pika

import bgtasks
from bgtasks import BackgroundTaskManager
from bgtasks.events import Publisher
from bgtasks.events.sinks.rabbitmq import RabbitMQSink

EVENTS = 10_000


async def main(url: str, manager: BackgroundTaskManager) -> None:
    """Make the queue, publish, read the lines of the envelopes."""
    connection = await aio_pika.connect(url)
    channel = await connection.channel()
    queue = await channel.declare_queue("orders", durable=True)

    publisher = Publisher(RabbitMQSink(url, routing_key="orders", envelope=True), manager=manager)
    for number in range(EVENTS):
        publisher.emit({"event": "order_paid", "order": number})
    report = await publisher.close()
    print(f"{report['delivered']:,} of {EVENTS:,} events delivered, {report['dropped']:,} dropped")

    orders = set()
    while message := await queue.get(no_ack=True, fail=False):
        orders |= {json.loads(line)["order"] for line in message.body.splitlines()}
    print(f"{len(orders):,} orders in the queue")
    await connection.close()


if __name__ == "__main__":
    bgtasks.run(partial(main, sys.argv[1] if len(sys.argv) > 1 else "amqp://guest:guest@localhost/"))
