"""Publishes events into a table of an SQLite file and asks it a question.

No server is needed::

    pip install "bgtasks-registry[events]"
    python examples/publish_to_sqlite.py orders.db

"""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from functools import partial

import bgtasks
from bgtasks import BackgroundTaskManager
from bgtasks.events import Publisher
from bgtasks.events.sinks.sqlite import SqliteSink

EVENTS = 10_000
SHOPS = ("Ghent", "Leeds", "Porto")


async def main(path: str, manager: BackgroundTaskManager) -> None:
    """Publish, and count the orders of each shop."""
    async with Publisher(SqliteSink(path, table="orders"), manager=manager) as publisher:
        for number in range(EVENTS):
            publisher.emit({"event": "order_paid", "order": number, "shop": SHOPS[number % len(SHOPS)]})
    stats = publisher.stats()
    print(f"{stats['delivered']:,} of {EVENTS:,} events delivered, {sum(stats['dropped'].values()):,} dropped")

    with closing(sqlite3.connect(path)) as database:
        question = "SELECT json_extract(event, '$.shop') AS shop, count(*) FROM orders GROUP BY shop ORDER BY shop"
        for shop, orders in database.execute(question):
            print(f"{shop}: {orders:,} orders in the table")


if __name__ == "__main__":
    bgtasks.run(partial(main, sys.argv[1] if len(sys.argv) > 1 else "orders.db"))
