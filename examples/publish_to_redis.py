"""Publishes events into a stream of Redis and reads them back.

Start a server, and install what the example needs::

    redis-server --port 6379
    pip install "bgtasks-registry[redis]"
    python examples/publish_to_redis.py redis://localhost:6379/0

"""

from __future__ import annotations

import sys
from functools import partial

from redis.asyncio import Redis

import bgtasks
from bgtasks import BackgroundTaskManager
from bgtasks.events import Publisher
from bgtasks.events.sinks.redis import RedisSink

EVENTS = 10_000


async def main(url: str, manager: BackgroundTaskManager) -> None:
    """Publish, and read the stream from where it ended before."""
    async with Redis.from_url(url) as client:
        newest = await client.xrevrange("orders", count=1)
        last_id = newest[0][0] if newest else "0"

        publisher = Publisher(RedisSink(url, key="orders", maxlen=1_000_000), manager=manager)
        for number in range(EVENTS):
            publisher.emit({"event": "order_paid", "order": number})
        report = await publisher.close()
        print(f"{report['delivered']:,} of {EVENTS:,} events delivered, {report['dropped']:,} dropped")

        ((_, entries),) = await client.xread({"orders": last_id})
        print(f"{len(entries):,} entries in the stream, the last one: {entries[-1][1][b'data'].decode()}")


if __name__ == "__main__":
    bgtasks.run(partial(main, sys.argv[1] if len(sys.argv) > 1 else "redis://localhost:6379/0"))
