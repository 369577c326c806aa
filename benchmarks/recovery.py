"""Measures how soon publishers deliver after an outage of their server, a real Redis, and how evenly they return.

Run it with nothing else on the machine; ``redis-server`` must be installed::

    python benchmarks/recovery.py                       # 200 publishers, down for 10 s
    python benchmarks/recovery.py --publishers 20 --down 30

It ends with status 1 if a goal was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from servers import RedisServer

from bgtasks.events import Publisher
from bgtasks.events.sinks.redis import RedisSink

missed: list[str] = []


def say(what: str, value: float, must: float) -> None:
    """Print a figure in seconds and its goal."""
    print(f"{what:<64} {value:>8.3f} s   must <= {must:g}   {'ok' if value <= must else 'MISSED'}", flush=True)
    if value > must:
        missed.append(what)


class TimedSink(RedisSink):
    """Notes when it tries to connect, and when a batch was written."""

    def __init__(self, url: str, key: str) -> None:
        super().__init__(url, key=key)
        self.tries: list[float] = []
        self.written: list[float] = []

    async def open(self) -> None:
        """Note the time, and connect."""
        self.tries.append(time.monotonic())
        await super().open()

    async def write(self, batch: list[bytes], batch_id: str) -> None:
        """Write, and note the time."""
        await super().write(batch, batch_id)
        self.written.append(time.monotonic())


async def outage(server: RedisServer, count: int, down: float, *, closes: bool) -> None:
    """Stop the server for some seconds; print when each publisher delivers, by itself or in ``close``."""
    sinks = [TimedSink(server.url, f"events:{number}") for number in range(count)]
    publishers = [Publisher(sink, retry_for=None) for sink in sinks]
    for publisher in publishers:
        publisher.emit({"number": 0})
    await asyncio.gather(*(publisher.flush() for publisher in publishers))
    server.kill()
    for publisher in publishers:
        publisher.emit({"number": 1})
    await asyncio.sleep(down)
    await asyncio.to_thread(server.start)
    up = time.monotonic()
    if closes:
        reports = await asyncio.gather(*(publisher.close(5) for publisher in publishers))
        print(f"close: {sum(report['dropped'] for report in reports)} of {count} publishers dropped their event")
    else:
        await asyncio.sleep(3)
    times = [sink.written[1] - up if len(sink.written) > 1 else 60.0 for sink in sinks]
    what = "in close" if closes else "by itself"
    say(f"first delivery after the outage, {what}, median", statistics.median(times), 0.5)
    say(f"first delivery after the outage, {what}, worst", max(times), 1.5)
    tries = sorted(moment for sink in sinks for moment in sink.tries if up - 2 <= moment < up)
    most = max((sum(moment <= other < moment + 0.1 for other in tries) for moment in tries), default=0)
    print(f"tries to connect in the two seconds before: {len(tries) / 2:.0f} a second; {most} in the worst 0.1 s")
    for publisher in publishers:
        await publisher.close()


def main() -> int:
    """Run both cases."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--publishers", type=int, default=200)
    parser.add_argument("--down", type=float, default=10.0, help="seconds")
    arguments = parser.parse_args()
    logging.getLogger("bgtasks").setLevel(logging.ERROR)
    for closes in (False, True):
        with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder)) as server:
            uvloop.run(outage(server, arguments.publishers, arguments.down, closes=closes))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
