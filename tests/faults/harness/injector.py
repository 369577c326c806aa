"""The injector: owns the server and the disk of a row, and does harm to them, or to the producer.

``python -m harness.injector FOLDER TARGET FAULT SEED``. It prints the addresses of the sink, then carries out the
commands of its standard input, a line each, and answers each with a line. It ends, and with it the server, when the
input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cutting_proxy import CuttingProxy
from disks import fill_disk, small_disk

from harness.ledger import Ledger
from harness.targets import TARGETS

LENGTH = 1.0  # seconds that a fault lasts
DISK = 24  # MiB
LATENCY = 0.2
LOSS = 0.01


class Injector:
    """The faults of one row.

    Args:
        folder: the folder of the row.
        target: the name of the sink.
        fault: the name of the fault.
        seed: of what is drawn by chance.

    """

    def __init__(self, folder: Path, target: str, fault: str, seed: int) -> None:
        self.folder, self.target, self.fault = folder, TARGETS[target], fault
        self.chance = random.Random(seed)
        self.ledger = Ledger(folder / "injector.ledger")
        self.server: Any = None
        self.proxy: CuttingProxy | None = None
        self.sink_disk = folder / ("disk" if fault == "disk" and not self.target.server else "sink")

    async def run(self) -> None:
        """Start the server, and serve commands."""
        async with contextlib.AsyncExitStack() as stack:
            address = direct = str(self.sink_disk / "events")
            try:
                if self.fault == "disk":
                    stack.enter_context(small_disk(self.folder / "disk", DISK))
                if self.target.server is not None:
                    direct, address = await self._start_server(stack)
            except pytest.skip.Exception as skipped:
                print(json.dumps({"skipped": str(skipped)}), flush=True)
                return
            self.sink_disk.mkdir(exist_ok=True)
            print(json.dumps({"direct": direct, "address": address}), flush=True)
            loop = asyncio.get_running_loop()
            while line := await loop.run_in_executor(None, sys.stdin.readline):
                command, *arguments = line.split()
                await getattr(self, f"do_{command}")(*arguments)
                print("done", flush=True)

    async def _start_server(self, stack: contextlib.AsyncExitStack) -> tuple[str, str]:
        (self.folder / "server").mkdir()
        self.server = self.target.server(self.folder / "server")
        stack.enter_context(self.server)
        scheme = self.target.scheme
        direct = f"{scheme}127.0.0.1:{self.server.port}"
        if self.target.prepare is not None:
            await self.target.prepare(direct)
        if self.fault not in ("cut", "slow"):
            return direct, direct
        slow = {"delay": LATENCY / 2, "stalls": LOSS} if self.fault == "slow" else {}
        self.proxy = await stack.enter_async_context(CuttingProxy(self.server.port, **slow))
        return direct, f"{scheme}127.0.0.1:{self.proxy.port}"

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """Note the beginning and the end of a fault."""
        self.ledger.write(fault=self.fault, is_over=False)
        yield
        self.ledger.write(fault=self.fault, is_over=True)

    async def do_freeze(self) -> None:
        """Suspend the server."""
        with self._noted():
            self.server.freeze()
            await asyncio.sleep(LENGTH)
            self.server.thaw()

    async def do_kill(self) -> None:
        """Kill the server, and start it again; the fault is over when it answers."""
        with self._noted():
            self.server.kill()
            await asyncio.sleep(LENGTH)
            await asyncio.to_thread(self.server.start)

    async def do_cut(self) -> None:
        """Break the connections again and again."""
        assert self.proxy is not None
        with self._noted():
            async with contextlib.AsyncExitStack() as stack:
                cutting = asyncio.create_task(self.proxy.cut_again_and_again(0.05))
                stack.callback(cutting.cancel)
                await asyncio.sleep(LENGTH)

    async def do_disk(self) -> None:
        """Fill the disk of the spool or of the sink, and make it empty again."""
        with self._noted():
            filler = fill_disk(self.folder / "disk")
            await asyncio.sleep(LENGTH)
            filler.unlink()

    async def do_wait(self) -> None:
        """Let the producer emit for a while."""
        await asyncio.sleep(self.chance.uniform(0.2, 1.5))

    async def do_signal(self, pid: str, name: str) -> None:
        """Send a signal to the producer."""
        with self._noted():
            os.kill(int(pid), signal.Signals[name])

    async def do_hide(self) -> None:
        """Have the sink be unreachable."""
        if self.server is not None:
            self.server.kill()
        else:
            self.sink_disk.rmdir()

    async def do_damage(self, stem: str) -> None:
        """Overwrite 64 bytes at three places in each file of the spool, and have the sink be reachable again."""
        with self._noted():
            files = [path for path in Path(stem).parent.iterdir() if not path.name.endswith("-shm")]
            assert files, "no file of a spool is left to be damaged"
            for path in files:
                with path.open("r+b") as file:
                    size = path.stat().st_size
                    for _ in range(3 if size > 64 else 0):
                        file.seek(self.chance.randrange(size - 64))
                        file.write(self.chance.randbytes(64))
            if self.server is not None:
                await asyncio.to_thread(self.server.start)
            else:
                self.sink_disk.mkdir()


if __name__ == "__main__":
    asyncio.run(Injector(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])).run())
