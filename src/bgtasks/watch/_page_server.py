"""A small HTTP server for the page, on this machine alone; one request per connection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any, Final

from bgtasks.errors import WatchError
from bgtasks.watch._page import Page

__all__ = ["serve"]

logger: Final = logging.getLogger("bgtasks.watch")

ADDRESS: Final = "127.0.0.1"
LONGEST_HEAD: Final = 16384
LONGEST_BODY: Final = 65536
# Seconds that a client may take for its request.
PATIENCE: Final = 10.0


async def serve(page: Page, port: int) -> asyncio.Server:
    """Listen, and return the server.

    Raises:
        WatchError: the port cannot be used.

    """

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await _Connection(reader, writer).run(page)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, TimeoutError):
            # The client is gone, too slow, or speaks something else.
            pass
        except asyncio.CancelledError:
            # At the end of the command, for which asyncio would log the cancellation of each connection.
            pass
        except Exception:
            logger.exception("A request of the page failed")
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    try:
        return await asyncio.start_server(connected, ADDRESS, port, limit=LONGEST_HEAD)
    except (OSError, OverflowError) as error:
        text = getattr(error, "strerror", None) or error
        raise WatchError(f"cannot listen on port {port}: {text}; choose another with --port") from error


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._body: bytes | None = b""

    async def run(self, page: Page) -> None:
        """Read a request and have the page answer it."""
        async with asyncio.timeout(PATIENCE):
            scope = await self._read_head()
            length = int(dict(scope["headers"]).get(b"content-length", b"0"))
            if not 0 <= length <= LONGEST_BODY:
                return
            self._body = await self._reader.readexactly(length)
        await page(scope, self._receive, self._send)

    async def _read_head(self) -> dict[str, Any]:
        first, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, version = first.split(" ")
        path, _, query = target.partition("?")
        headers = []
        for line in lines[:-2]:
            name, separator, value = line.partition(":")
            if not separator:
                raise ValueError("a header without a colon")
            headers.append((name.lower().encode("latin-1"), value.strip().encode("latin-1")))
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": version.removeprefix("HTTP/"),
            "method": method,
            "scheme": "http",
            "path": path,
            "root_path": "",
            "query_string": query.encode("latin-1"),
            "headers": headers,
        }

    async def _receive(self) -> MutableMapping[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        # Nothing but the end is expected; pipelined requests are not answered.
        while await self._reader.read(1024):
            pass
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            status = HTTPStatus(message["status"])
            lines = [b"HTTP/1.1 %d %s" % (status, status.phrase.encode()), b"connection: close"]
            lines += [b"%s: %s" % header for header in message["headers"]]
            self._writer.write(b"\r\n".join(lines) + b"\r\n\r\n")
        else:
            self._writer.write(message["body"])
        await self._writer.drain()
