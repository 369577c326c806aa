"""Offers 100,000 events a second for 3 seconds to agentflow's Redis publisher, as its nodes do; prints what arrived.

Run by a Python that has agentflow, not bgtasks; ``sinks.py`` does::

    python benchmarks/agentflow_publisher.py REDIS-URL
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time

import uvloop
from agentflow.runtime.publisher.events import ContentType, Event, EventModel, EventType
from agentflow.runtime.publisher.publish import publish_event
from agentflow.runtime.publisher.redis_publisher import RedisPublisher
from agentflow.utils.background_task_manager import BackgroundTaskManager
from redis.asyncio import Redis

RATE = 100_000
SECONDS = 3.0
TICK = 0.001


def make_event(number: int) -> EventModel:
    """Return an event like those of ``sinks.py``, with the fields of agentflow's model."""
    return EventModel(
        event=Event.NODE_EXECUTION,
        event_type=EventType.PROGRESS,
        content="x" * 88,
        content_type=[ContentType.TEXT],
        sequence_id=number,
        node_name="reply",
        run_id="r-1",
        thread_id="t-1",
    )


async def main(url: str) -> None:
    """Offer, wait until nothing is pending, count."""
    publisher = RedisPublisher({"url": url, "mode": "stream", "stream": "events"})
    manager = BackgroundTaskManager()
    begun = time.perf_counter()
    offered = 0
    while (passed := time.perf_counter() - begun) < SECONDS:
        for number in range(offered, due := int(passed * RATE)):
            publish_event(make_event(number), publisher, manager)
        offered = due
        await asyncio.sleep(TICK)
    # Tasks that are pending when the time is up get two more seconds.
    await asyncio.sleep(2)
    async with Redis.from_url(url) as client:
        delivered = await client.xlen("events")
    print(json.dumps({"offered": offered, "delivered": delivered, "seconds": SECONDS}), flush=True)
    sys.exit(0)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    uvloop.run(main(sys.argv[1]))
