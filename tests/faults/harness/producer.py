"""The producer: emits numbered events through the public API, and writes down what was accepted and what is durable.

``python -m harness.producer SPECIFICATION``, JSON with the fields of ``Producer``. It prints "emitting" once its first
event is delivered, so that a fault meets a publisher at work.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import bgtasks
from bgtasks.events import Publisher
from bgtasks.events.spool import Spool
from harness.ledger import Ledger, ids_of
from harness.targets import TARGETS

GROUP = 50  # the last event of each group is published with durable=True
DAY = 86_400.0
PATIENCE = 60.0


class ListingSpool:
    """A spool that writes down which events it returns: if one of these is missing, it was not lost on the disk."""

    def __init__(self, spool: Spool, ledger: Ledger) -> None:
        self._spool = spool
        self._ledger = ledger
        self._returned: set[str] = set()
        self.append, self.done, self.stats, self.close = spool.append, spool.done, spool.stats, spool.close

    def oldest(self, count: int, /) -> list[tuple[str, list[bytes]]]:
        """Return the oldest batches."""
        batches = self._spool.oldest(count)
        for batch_id, events in batches:
            if batch_id not in self._returned:
                self._returned.add(batch_id)
                self._ledger.write(returned=ids_of(events))
        return batches


@dataclasses.dataclass
class Producer:
    """One producer process.

    Args:
        folder: the folder of the row, for the ledger and the spool.
        name: the name of the producer, in its events and its ledger.
        target: the name of the sink.
        address: the address of the sink.
        spool: the stem of the spool's files.
        count: the number of events.
        fault: "clock", "fork" or "overload", which happen within the producer, or another one.
        waits: whether the first event has to be delivered before the others are emitted.
        stays: whether to wait for SIGKILL at the end, with what is in the spool.

    """

    folder: str
    name: str
    target: str
    address: str
    spool: str
    count: int
    fault: str
    waits: bool = True
    stays: bool = False

    async def run(self, manager: bgtasks.BackgroundTaskManager) -> None:
        """Emit the events, and close the publisher."""
        self.ledger = Ledger(Path(self.folder, f"{self.name}.ledger"))
        self.next = self.child = 0
        # Of an overload only 500 fit into the queue, which a batch empties.
        bound = 500 if self.fault == "overload" else 200_000
        sink = TARGETS[self.target].make(self.address)
        spool = ListingSpool(Spool(self.spool), self.ledger)
        letters = Path(self.folder, f"{self.name}.dead")
        self.publisher = Publisher(sink, spool=spool, max_events=bound, dead_letters=letters, manager=manager)
        sampler = asyncio.create_task(self._sample())
        try:
            await self._emit_all()
            if self.stays:
                print("done", flush=True)
                await asyncio.sleep(1000)
            await self.publisher.flush(PATIENCE)
        finally:
            # After SIGTERM the manager has closed the publisher; a second close waits for nothing.
            report = await self.publisher.close(PATIENCE)
            sampler.cancel()
            self.ledger.write(producer=self.name, closed=report, stats=self.publisher.stats())
            if self.child:
                # Some sinks let one process write at a time: the child's turn has come.
                os.waitpid(self.child, 0)

    async def _emit_all(self) -> None:
        await self._emit_group()
        if self.waits:
            while not self.publisher.stats()["delivered"]:
                await asyncio.sleep(0.005)
        print("emitting", flush=True)
        begun, rate = time.monotonic(), TARGETS[self.target].rate
        while self.next < self.count:
            if self.next >= self.count // 3 and self.fault in ("clock", "fork"):
                getattr(self, f"_{self.fault}")()
                self.fault = ""
            await self._emit_group()
            if self.fault != "overload":
                await asyncio.sleep(max(begun + self.next / rate - time.monotonic(), 0))

    async def _emit_group(self) -> None:
        """Emit a group, and write down which events were refused and that the others are on the disk."""
        events = range(self.next, self.next + GROUP)
        if self.fault == "overload":
            events = range(self.next, self.next + 20 * GROUP)
        self.next = events.stop
        refused = [number for number in events[:-1] if not self.publisher.emit(self._event(number))]
        last = asyncio.ensure_future(self.publisher.publish(self._event(events[-1]), durable=True))
        is_durable = await last
        if not is_durable:
            refused.append(events[-1])
        self.ledger.write(producer=self.name, offered=[events.start, events.stop], refused=refused, durable=is_durable)

    def _event(self, number: int) -> dict[str, Any]:
        return {"producer": self.name, "number": number, "padding": "x" * 100}

    def _clock(self) -> None:
        """Set the clock of this process: back by a day, and at the next call of ``time.time`` after that, on by two."""
        real, ledger = time.time, self.ledger
        jumps = iter((-DAY,))
        time.time = lambda: real() + next(jumps, DAY)
        ledger.write(fault="clock")

    def _fork(self) -> None:
        """Have a child emit events of its own through the publisher that it inherited."""
        self.ledger.write(fault="fork")
        self.child = os.fork()
        if self.child:
            return
        name = f"{self.name}-child"
        ledger = Ledger(Path(self.folder, f"{name}.ledger"))
        self.name = name
        refused = [number for number in range(1000) if not self.publisher.emit(self._event(number))]
        ledger.write(producer=name, offered=[0, 1000], refused=refused, durable=False)
        # A child has no loop: one of a thread sends what the child emitted.
        deadline = time.monotonic() + PATIENCE
        while self.publisher.stats()["delivered"] < 1000 - len(refused) and time.monotonic() < deadline:
            time.sleep(0.01)
        ledger.write(producer=name, closed=None, stats=self.publisher.stats())
        os._exit(0)

    async def _sample(self) -> None:
        """Write down when deliveries were seen."""
        seen = 0
        while True:
            delivered = self.publisher.stats()["delivered"]
            if delivered > seen:
                seen = delivered
                self.ledger.write(producer=self.name, delivered=delivered)
            await asyncio.sleep(0.005)


if __name__ == "__main__":
    bgtasks.run(Producer(**json.loads(sys.argv[1])).run)
