"""Publishes events into a topic of Kafka, which numbers those of one publisher and stores none twice.

Start a broker, and install what the example needs::

    docker run --publish 9092:9092 apache/kafka
    pip install "bgtasks-registry[kafka]"
    python examples/publish_to_kafka.py localhost:9092

"""

from __future__ import annotations

import sys
from functools import partial

import bgtasks
from bgtasks import BackgroundTaskManager
from bgtasks.events import Publisher
from bgtasks.events.sinks.kafka import KafkaSink

EVENTS = 10_000


async def main(servers: str, manager: BackgroundTaskManager) -> None:
    """Publish; ``async with`` flushes and closes, and ``connect`` has it fail at once if no broker answers."""
    async with Publisher(
        KafkaSink(servers, topic="orders", config={"compression.type": "lz4"}), connect=True, manager=manager
    ) as publisher:
        for number in range(EVENTS):
            publisher.emit({"event": "order_paid", "order": number})
    stats = publisher.stats()
    print(f"{stats['delivered']:,} of {EVENTS:,} events delivered, {sum(stats['dropped'].values()):,} dropped")


if __name__ == "__main__":
    bgtasks.run(partial(main, sys.argv[1] if len(sys.argv) > 1 else "localhost:9092"))
