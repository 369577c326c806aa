"""A TCP proxy that a test cuts: data on its way is lost, as when a router goes down. It can also be slow."""

from __future__ import annotations

import asyncio
import contextlib
import random
from types import TracebackType
from typing import Self

__all__ = ["CuttingProxy"]


class CuttingProxy:
    """Passes bytes to a port of the loopback address, on a port of its own, until it is cut.

    Args:
        target: the port to pass to.
        delay: seconds that data is on its way, in each direction.
        stalls: the share of pieces of data that take one ``delay`` more, as after a lost packet, and hold up what comes
            behind them.

    """

    def __init__(self, target: int, *, delay: float = 0.0, stalls: float = 0.0) -> None:
        self._target = target
        self._delay = delay
        self._stalls = stalls
        self._chance = random.Random(target)
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self.port = 0
        self.cuts = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        self.cut()
        if self._pumps:
            await asyncio.wait(self._pumps)

    def cut(self) -> None:
        """Break all connections."""
        self.cuts += bool(self._writers)
        for writer in self._writers:
            writer.transport.abort()

    def refuse(self) -> None:
        """Break all connections, and accept no further ones."""
        self._server.close()
        self.cut()

    async def cut_again_and_again(self, every: float) -> None:
        """Cut at an interval in seconds, until cancelled."""
        while True:
            await asyncio.sleep(every)
            self.cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pumps.add(task)
        task.add_done_callback(self._pumps.discard)
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers |= {writer, far_writer}
            try:
                pump = self._pump_late if self._delay else self._pump
                await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
            finally:
                self._writers -= {writer, far_writer}
                far_writer.transport.abort()
        writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

    async def _pump_late(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass data on with the delay; what is on its way is in a queue."""
        loop = asyncio.get_running_loop()
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def read() -> None:
            due, data = 0.0, b"-"
            with contextlib.suppress(OSError):
                while data:
                    data = await reader.read(1 << 16)
                    delay = self._delay * (1 + (self._chance.random() < self._stalls))
                    due = max(due, loop.time() + delay)
                    under_way.put_nowait((due, data))

        reading = asyncio.create_task(read())
        try:
            with contextlib.suppress(OSError):
                while True:
                    due, data = await under_way.get()
                    await asyncio.sleep(due - loop.time())
                    if not data:
                        break
                    writer.write(data)
                    await writer.drain()
        finally:
            reading.cancel()
        writer.transport.abort()
