"""An ASGI application under a path of an aiohttp application: requests and responses, no websockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

from aiohttp import web

__all__ = ["Application", "as_handler"]

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

# Seconds between two looks at a connection that nothing is read from.
GLANCE: Final = 0.5


def as_handler(
    application: Application, root: str, state_of: Callable[[web.Request], dict[str, Any]]
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Return a handler that has an ASGI application answer.

    Args:
        application: the ASGI application.
        root: the path under which it stands.
        state_of: returns the state for the scope of a request.

    """

    async def handle(request: web.Request) -> web.StreamResponse:
        exchange = _Exchange(request)
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": f"{request.version.major}.{request.version.minor}",
            "method": request.method,
            "scheme": request.scheme,
            "path": request.path,
            "root_path": root,
            "query_string": request.query_string.encode(),
            "headers": [(name.lower(), value) for name, value in request.raw_headers],
            "client": (request.remote, 0),
            "state": state_of(request),
        }
        # aiohttp raises it when something is sent to a viewer that is gone.
        with contextlib.suppress(ConnectionResetError):
            await application(scope, exchange.receive, exchange.send)
        return exchange.response

    return handle


class _Exchange:
    """A request and its response."""

    def __init__(self, request: web.Request) -> None:
        self.response = web.StreamResponse()
        self._request = request
        self._is_read = False

    async def receive(self) -> Message:
        """Return the body, and then the end of the connection."""
        if not self._is_read:
            self._is_read = True
            return {"type": "http.request", "body": await self._request.read(), "more_body": False}
        # aiohttp has no event for it.
        while self._request.transport is not None and not self._request.transport.is_closing():  # noqa: ASYNC110
            await asyncio.sleep(GLANCE)
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Send a part of the response."""
        if message["type"] == "http.response.start":
            self.response.set_status(message["status"])
            for name, value in message["headers"]:
                self.response.headers.add(name.decode("latin-1"), value.decode("latin-1"))
            await self.response.prepare(self._request)
            return
        if message["body"]:
            await self.response.write(message["body"])
        if not message.get("more_body", False):
            await self.response.write_eof()
