"""A client for a bare ASGI application: no server, no sockets."""

from __future__ import annotations

import asyncio
import json

TOKEN = "a token for the tests of the page"
HOST = "localhost:8000"


class Answer:
    """A response, as far as it was sent."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self.body = b""
        self.is_complete = False

    @property
    def text(self):
        """The body as text."""
        return self.body.decode()

    def header(self, name):
        """Return the first value of a header, None if there is none."""
        return next((value for key, value in self.headers if key == name), None)

    @property
    def frames(self):
        """The frames of a stream."""
        return [
            json.loads(block.removeprefix("data: ")) for block in self.text.split("\n\n") if block.startswith("data: ")
        ]


class Client:
    """Sends requests to an ASGI application.

    Args:
        application: the application.
        headers: the headers of every request; None as a value leaves one out.

    """

    def __init__(self, application, **headers):
        self.application = application
        self.headers = headers

    async def request(self, method, target, *, body=b"", scope=(), until=None, **headers):
        """Send a request and return the response, or what has come of it when ``until(answer)`` is true."""
        answer = Answer()
        changed = asyncio.Event()
        gone = asyncio.Event()
        is_read = False

        async def receive():
            nonlocal is_read
            if not is_read:
                is_read = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = [(name.decode(), value.decode()) for name, value in message["headers"]]
            else:
                answer.body += message["body"]
                answer.is_complete = not message["more_body"]
            changed.set()

        path, _, query = target.partition("?")
        lines = {"host": HOST, **self.headers, **headers}
        whole = {
            "type": "http",
            "method": method,
            "scheme": "http",
            "path": path,
            "query_string": query.encode(),
            "headers": [
                (name.replace("_", "-").encode(), value.encode("latin-1"))
                for name, value in lines.items()
                if value is not None
            ],
            **dict(scope),
        }
        serving = asyncio.ensure_future(self.application(whole, receive, send))
        while until is not None and not serving.done() and not until(answer):
            changed.clear()
            waiting = asyncio.ensure_future(changed.wait())
            await asyncio.wait([serving, waiting], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
        gone.set() if until is not None else None
        await serving
        return answer

    async def get(self, target, **options):
        """Send GET."""
        return await self.request("GET", target, **options)

    async def post(self, target, value=None, **options):
        """Send POST with a JSON object, as the page does."""
        headers = {"content_type": "application/json", "sec_fetch_site": "same-origin", **options}
        return await self.request("POST", target, body=json.dumps({} if value is None else value).encode(), **headers)

    async def frame(self, target="/stream"):
        """Return the first frame of a stream."""
        answer = await self.get(target, until=lambda answer: answer.frames)
        assert answer.status == 200, answer.text
        return answer.frames[0]
