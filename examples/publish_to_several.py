"""Publishes events into a file of JSON lines and onto the console, each with a queue of its own.

No server is needed::

    pip install "bgtasks-registry[events]"
    python examples/publish_to_several.py orders.jsonl

"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import bgtasks
from bgtasks import BackgroundTaskManager
from bgtasks.events import Fanout, Publisher
from bgtasks.events.sinks.console import ConsoleSink
from bgtasks.events.sinks.jsonl import JsonlSink

EVENTS = 10


async def main(path: str, manager: BackgroundTaskManager) -> None:
    """Publish."""
    publisher = Fanout([Publisher(JsonlSink(path)), Publisher(ConsoleSink())], manager=manager)
    for number in range(EVENTS):
        publisher.emit({"event": "order_paid", "order": number})
    report = await publisher.close()
    print(f"{EVENTS:,} events for two publishers: {report['delivered']:,} delivered, {report['dropped']:,} dropped")


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else "orders.jsonl"
    bgtasks.run(partial(main, path))
    print(f"{len(Path(path).read_bytes().splitlines()):,} lines in the file")
