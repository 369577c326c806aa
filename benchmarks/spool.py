"""Times the spool beside a loop that produces: events made, encoded and committed, and read and deleted again.

A loop makes events of 226 bytes of JSON as fast as it can, encodes them in batches of 500 and hands those to the
spool's thread, never more than a few ahead. Each round runs every contender once; printed is the median::

    python benchmarks/spool.py                 # about 30 s
    python benchmarks/spool.py --directory /mnt/disk --events 2000000 --rounds 9

``must`` is the floor.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import platform
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from bgtasks.events.spool import Spool, SpoolSync

BATCH = 500
AHEAD = 8
READ_AT_ONCE = 4
MUST = 250_000


class Event(msgspec.Struct, gc=False):
    """An event of 226 bytes, encoded."""

    event: str
    run_id: str
    node_name: str
    sequence: int
    data: str


encode = msgspec.json.Encoder().encode


def produce(first: int) -> list[bytes]:
    """Make and encode a batch."""
    return [
        encode(
            Event("node.completed", "8c9a7a1c-5d0e-4a53-9c3b-0d6d6cf2a111", "summarise", 1_000_000 + number, "x" * 99)
        )
        for number in range(first, first + BATCH)
    ]


async def only_produce(events: int, directory: Path) -> float:
    """Make and encode, and discard: the most that the loop alone can do."""
    begun = time.perf_counter()
    for first in range(0, events, BATCH):
        produce(first)
        await asyncio.sleep(0)
    return time.perf_counter() - begun


async def commit(events: int, directory: Path, sync: SpoolSync, forward: bool) -> float:
    """Make, encode and commit; with ``forward`` read and delete as well, until nothing is left."""
    loop = asyncio.get_running_loop()
    spool = Spool(directory / "events", sync=sync, max_bytes=1 << 40)

    def turn_over(done: list[str]) -> list[str]:
        for batch_id in done:
            spool.done(batch_id)
        return [batch_id for batch_id, _ in spool.oldest(READ_AT_ONCE)]

    async def drain() -> None:
        sent: list[str] = []
        while sent or not produced.is_set() or spool.stats()["events"]:
            sent = await loop.run_in_executor(thread, turn_over, sent)

    produced = asyncio.Event()
    with ThreadPoolExecutor(1) as thread:
        await loop.run_in_executor(thread, spool.open)
        begun = time.perf_counter()
        drainer = asyncio.create_task(drain()) if forward else None
        ahead: list[asyncio.Future[None]] = []
        for first in range(0, events, BATCH):
            if len(ahead) >= AHEAD:
                await ahead.pop(0)
            ahead.append(loop.run_in_executor(thread, spool.append, produce(first), f"benchmark-{first}"))
            # Lets the loop run its other callbacks.
            await asyncio.sleep(0)
        await asyncio.gather(*ahead)
        produced.set()
        if drainer is not None:
            await drainer
        seconds = time.perf_counter() - begun
        await loop.run_in_executor(thread, spool.close)
    return seconds


CONTENDERS: dict[str, tuple[Callable[[int, Path], Awaitable[float]], int]] = {
    "make and encode, no spool": (only_produce, 0),
    "commit, sync=interval": (lambda events, directory: commit(events, directory, "interval", False), MUST),
    "commit, sync=normal": (lambda events, directory: commit(events, directory, "normal", False), MUST),
    "commit, sync=full": (lambda events, directory: commit(events, directory, "full", False), 0),
    "commit, read and delete, sync=interval": (
        lambda events, directory: commit(events, directory, "interval", True),
        0,
    ),
}


def main() -> None:
    """Run the rounds and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=500_000, help="a run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="on the disk to measure; that of temporary files by default")
    options = parser.parse_args()
    assert len(produce(0)[0]) == 226
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with contextlib.suppress(ImportError):
        import uvloop

        loop_factory = uvloop.new_event_loop
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name, (run, _) in CONTENDERS.items():
            with (
                tempfile.TemporaryDirectory(dir=options.directory) as directory,
                asyncio.Runner(loop_factory=loop_factory) as runner,
            ):
                rates[name].append(options.events / runner.run(run(options.events, Path(directory))))
    print(
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {loop_factory.__module__}; "
        f"{options.rounds} rounds of {options.events:,} events, batches of {BATCH}"
    )
    for name, (_, must) in CONTENDERS.items():
        floor = f"   must {must:,}: {'yes' if statistics.median(rates[name]) >= must else 'NO'}" if must else ""
        print(f"{name:40} {statistics.median(rates[name]):>12,.0f} events/s{floor}")


if __name__ == "__main__":
    main()
