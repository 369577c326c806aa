"""Publishes events over a TCP connection, through a sink of one's own, and sends again what was refused.

``TcpSink`` is all that the author of a sink writes; ``Receiver`` stands for the server. No server is needed::

    pip install "bgtasks-registry[events]"
    python examples/publish_to_own_sink.py refused.jsonl

"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import bgtasks
from bgtasks import BackgroundTaskManager
from bgtasks.events import Publisher, Reject, Retry, Sink, SinkError

EVENTS = 10_000


class TcpSink(Sink):
    """Sends a batch as lines and waits for the receiver's answer.

    The first line holds the id of the batch and the number of its events, each further line one event. The answer is
    one line: ``ok``, ``busy SECONDS``, or ``refused INDEX...`` where all other events were accepted.
    """

    # One connection, whose answers come in order.
    max_inflight = 1

    def __init__(self, host: str, port: int, *, timeout: float = 5.0) -> None:
        self._address = (host, port)
        self._timeout = timeout

    async def open(self) -> None:
        """Connect."""
        async with asyncio.timeout(self._timeout):
            self._reader, self._writer = await asyncio.open_connection(*self._address)

    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Send a batch; return when the receiver has it."""
        # An event that was encoded as JSON holds no line break.
        lines = [f"{batch_id} {len(batch)}".encode(), *batch]
        # What raises here, the timeout included, has the publisher close the sink, open it again and write again.
        async with asyncio.timeout(self._timeout):
            self._writer.write(b"\n".join(lines) + b"\n")
            await self._writer.drain()
            answer = (await self._reader.readline()).decode().split()
        match answer:
            case ["ok"]:
                return
            case ["busy", seconds]:
                raise Retry(after=float(seconds), reason="the receiver is busy")
            case ["refused", *indexes]:
                raise Reject([int(index) for index in indexes], "the receiver refused it")
        raise SinkError("the receiver closed the connection without an answer")

    async def close(self) -> None:
        """Disconnect."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


class Receiver:
    """Keeps orders, refuses those without a shop, and is busy when the first batch comes."""

    def __init__(self) -> None:
        self.orders: list[object] = []
        self._seen: set[str] = set()
        self._is_busy = True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection until it ends."""
        while head := await reader.readline():
            batch_id, count = head.decode().split()
            events = [json.loads(await reader.readline()) for _ in range(int(count))]
            writer.write(self._answer(batch_id, events).encode() + b"\n")
        writer.close()

    def _answer(self, batch_id: str, events: list[dict[str, object]]) -> str:
        if self._is_busy:
            self._is_busy = False
            return "busy 0.01"
        refused = [index for index, event in enumerate(events) if event["shop"] is None]
        # A batch whose answer was lost comes again with the same id.
        if batch_id not in self._seen:
            self._seen.add(batch_id)
            self.orders += [event["order"] for event in events if event["shop"] is not None]
        return f"refused {' '.join(map(str, refused))}" if refused else "ok"


def dead_letters_in(path: str) -> list[dict[str, object]]:
    """Return the events in a file of dead letters: each line holds one of them, its reason, error and batch id."""
    return [json.loads(json.loads(line)["event"]) for line in Path(path).read_bytes().splitlines()]


async def main(path: str, manager: BackgroundTaskManager) -> None:
    """Publish, then read the refused events from the file of dead letters and send them, corrected."""
    receiver = Receiver()
    async with await asyncio.start_server(receiver.serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        async with Publisher(TcpSink(host, port), dead_letters=path, manager=manager) as publisher:
            for number in range(EVENTS):
                publisher.emit({"event": "order_paid", "order": number, "shop": "Ghent" if number % 1000 else None})
        stats = publisher.stats()
        print(f"{stats['delivered']:,} of {EVENTS:,} events delivered, {stats['dropped']['rejected']:,} refused")

        corrected = [json.dumps({**event, "shop": "Leeds"}).encode() for event in dead_letters_in(path)]
        # A sink works without a publisher, too.
        async with TcpSink(host, port) as sink:
            await sink.write(corrected, "corrected")
        print(f"{len(corrected):,} sent again, {len(set(receiver.orders)):,} orders with the receiver")


if __name__ == "__main__":
    bgtasks.run(partial(main, sys.argv[1] if len(sys.argv) > 1 else "refused.jsonl"))
