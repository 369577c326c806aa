"""The page: a bare ASGI application with one HTML file, a stream of frames, and nothing that changes by GET."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping, Sequence
from functools import partial
from importlib.resources import files
from typing import Any, Final, TypeAlias

from bgtasks._checks import check_flag
from bgtasks.errors import InvalidOptionError, NoManagerError, WatchError, describe
from bgtasks.watch._page_access import Access, Auth, Headers, RefusedError, Scope
from bgtasks.watch._page_frames import Query, make_frame
from bgtasks.watch._page_source import ManagerSource, Source
from bgtasks.watch._page_worker import Worker, server_is_ending

__all__ = ["LOOPBACK", "Page", "SourcePage", "app"]

logger: Final = logging.getLogger("bgtasks.watch")

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Handler: TypeAlias = "Callable[[Request], Awaitable[None]]"

LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
# Seconds between two frames, and between two looks at whether the stream has to end.
INTERVAL: Final = 1.0
GLANCE: Final = 0.1
# A stream ends after this many seconds, and the browser asks for the next one: a server whose end cannot be seen from
# here waits no longer than that.
LONGEST_STREAM: Final = 15.0
# Milliseconds until the browser asks again.
RETRY: Final = 500
MOST_STREAMS: Final = 20
LONGEST_BODY: Final = 4096


def _policy(html: str) -> str:
    """Return the Content-Security-Policy of a page: its own script and style by their hashes, and nothing else."""
    hashes = {
        tag: base64.b64encode(hashlib.sha256(match[1].encode()).digest()).decode()
        for tag in ("script", "style")
        if (match := re.search(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL))
    }
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


class Request:
    """One request, and the answer to it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.receive = receive
        self._send = send
        self.method: str = scope["method"]
        self.is_started = False
        self.is_secure = scope.get("scheme") == "https"
        self.headers: Headers = {}
        for name, value in scope["headers"]:
            key = name.decode("latin-1").lower()
            # Several lines of a header count as one list, which no check accepts as a host or an origin.
            text = value.decode("latin-1")
            separator = "; " if key == "cookie" else ", "
            self.headers[key] = f"{self.headers[key]}{separator}{text}" if key in self.headers else text

    @property
    def path(self) -> str:
        """The path below the mount, without slashes."""
        path: str = self.scope["path"]
        # Starlette has the mount in the path, Litestar does not.
        return path.removeprefix(self.scope.get("root_path", "")).strip("/")

    async def body(self) -> Any:
        """Return the JSON object in the body.

        Raises:
            RefusedError: there is none, or it is too long.

        """
        if self.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise RefusedError(415, "the body must be application/json")
        body = b""
        more = True
        while more:
            message = await self.receive()
            body += message.get("body", b"")
            more = message["type"] == "http.request" and message.get("more_body", False)
            if len(body) > LONGEST_BODY:
                raise RefusedError(413, f"the body must have at most {LONGEST_BODY} bytes")
        try:
            given = json.loads(body)
        except ValueError:
            given = None
        if not isinstance(given, dict):
            raise RefusedError(400, "the body must be a JSON object")
        return given

    async def start(self, status: int, kind: str, *headers: tuple[str, str]) -> None:
        """Send the status and the headers."""
        self.is_started = True
        fixed = (
            ("content-type", kind),
            ("cache-control", "no-store"),
            ("x-content-type-options", "nosniff"),
            ("referrer-policy", "same-origin"),
            ("x-frame-options", "DENY"),
            ("cross-origin-resource-policy", "same-origin"),
            ("cross-origin-opener-policy", "same-origin"),
        )
        lines = [(name.encode(), value.encode()) for name, value in (*fixed, *headers)]
        await self._send({"type": "http.response.start", "status": status, "headers": lines})

    async def send(self, body: bytes, *, more: bool = False) -> None:
        """Send a part of the body."""
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def answer(self, status: int, kind: str, body: bytes, *headers: tuple[str, str]) -> None:
        """Send a whole response."""
        await self.start(status, kind, ("content-length", str(len(body))), *headers)
        await self.send(b"" if self.method == "HEAD" else body)

    async def answer_text(self, status: int, text: str) -> None:
        """Send a text."""
        await self.answer(status, "text/plain; charset=utf-8", text.encode("utf-8", "replace"))

    async def answer_json(self, value: object, *headers: tuple[str, str]) -> None:
        """Send a JSON object."""
        await self.answer(200, "application/json", json.dumps(value).encode(), *headers)


class Page(ABC):
    """An ASGI application that shows the tasks of a manager in a browser; ``app`` makes it.

    It runs nothing until somebody looks. Its streams end when the manager shuts down, when the server was asked to end
    by a signal, and by ``close()``.
    """

    @abstractmethod
    def close(self) -> None:
        """End all streams; the page answers no further requests."""

    @abstractmethod
    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        """Answer a request.

        Raises:
            NoManagerError: the page was made without a manager, and the application has none.

        """


class SourcePage(Page):
    """The page of a source.

    Args:
        find_source: returns the source for a request.
        access: decides about requests.
        allow_cancel: whether viewers may cancel tasks.

    """

    def __init__(self, find_source: Callable[[Scope], Source], access: Access, allow_cancel: bool) -> None:
        self._find_source = find_source
        self._access = access
        self._allow_cancel = allow_cancel
        self._worker = Worker("bgtasks-page")
        self._streams = 0
        self._is_closed = False
        self._html = files("bgtasks.watch").joinpath("_page.html").read_text("utf-8")
        self._policy = _policy(self._html)
        self._gets: dict[str, Handler] = {"": self._page, "stream": self._stream, "stack": self._stack}
        self._posts: dict[str, Handler] = {"login": self._log_in, "logout": self._log_out, "cancel": self._cancel}

    def close(self) -> None:
        """End all streams."""
        self._is_closed = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        match scope["type"]:
            case "http":
                await self._answer(Request(scope, receive, send))
            case "lifespan":
                await self._live(receive, send)
            case _:
                await send({"type": "websocket.close", "code": 1000})

    async def _live(self, receive: Receive, send: Send) -> None:
        """Take part in the lifespan where a server runs the page itself."""
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, request: Request) -> None:
        try:
            self._access.check_host(request.headers)
            handler = self._handler_of(request)
            if request.path:
                self._access.check_origin(request.headers, changes=request.method == "POST")
            await self._access.check_auth(request.scope)
            # The page itself has no data; it shows the form to log in.
            if request.path not in ("", "login"):
                self._access.check_session(request.headers)
            await handler(request)
        except RefusedError as refusal:
            await request.answer_text(refusal.status, str(refusal))
        except WatchError as error:
            if request.is_started:
                logger.warning("A stream of the page ended: %s", error)
                await request.send(b"")
            else:
                await request.answer_text(400, str(error))

    def _handler_of(self, request: Request) -> Handler:
        path, method = request.path, request.method
        if self._is_closed:
            raise RefusedError(503, "the page is closed")
        if method in ("GET", "POST") or (method == "HEAD" and path == ""):
            handler = (self._posts if method == "POST" else self._gets).get(path)
            if handler is not None:
                return handler
        if path in self._gets or path in self._posts:
            raise RefusedError(405, f"{method[:20]} is not for this address; nothing changes by GET, only by POST")
        raise RefusedError(404, "there is nothing here")

    async def _page(self, request: Request) -> None:
        if b"token=" in request.scope.get("query_string", b""):
            raise RefusedError(400, "a token in a URL ends in logs: open the page without it, and log in there")
        headers = ("content-security-policy", self._policy)
        await request.answer(200, "text/html; charset=utf-8", self._html.encode(), headers)

    async def _log_in(self, request: Request) -> None:
        cookie = self._access.log_in((await request.body()).get("token"), request.is_secure)
        await request.answer_json({}, ("set-cookie", cookie))

    async def _log_out(self, request: Request) -> None:
        await request.answer_json({}, ("set-cookie", self._access.log_out(request.is_secure)))

    async def _stack(self, request: Request) -> None:
        query = request.scope.get("query_string", b"").decode("latin-1")
        match = re.fullmatch(r"id=([0-9]{1,20}\.[0-9]{1,20}\.[0-9]{1,20})", query)
        if match is None:
            raise RefusedError(400, "id must be the id of a task, of the form PID.MANAGER.TASK")
        source = self._find_source(request.scope)
        async with self._worker as worker:
            answers, errors = await worker.run(partial(source.ask, "stack", id=match[1]))
        if not answers:
            raise WatchError("; ".join(errors))
        await request.answer_json({"name": answers[0]["name"], "stack": answers[0]["stack"]})

    async def _cancel(self, request: Request) -> None:
        if not self._allow_cancel:
            raise RefusedError(403, "this page is read-only: pass allow_cancel=True to cancel tasks from it")
        given = await request.body()
        chosen = {key: given[key] for key in ("id", "name") if key in given}
        if len(chosen) != 1 or not all(isinstance(value, str) for value in chosen.values()):
            raise RefusedError(400, "either id or name says what to cancel, as a text")
        is_confirmed = given.get("confirmed") is True
        source = self._find_source(request.scope)
        async with self._worker as worker:
            answers, errors = await worker.run(partial(source.ask, "cancel", **chosen, confirmed=is_confirmed))
        key = "cancelled" if is_confirmed else "matching"
        count = sum(answer[key] for answer in answers)
        if is_confirmed:
            logger.warning("Cancelled by a viewer of the page: %r, tasks: %d", chosen, count)
        await request.answer_json({key: count, "processes": sum(each[key] > 0 for each in answers), "errors": errors})

    # -- the stream -----------------------------------------------------------------------------------------------

    async def _stream(self, request: Request) -> None:
        query = Query.parse(request.scope.get("query_string", b""))
        source = self._find_source(request.scope)
        if self._streams >= MOST_STREAMS:
            raise RefusedError(503, f"{MOST_STREAMS} viewers look already")
        self._streams += 1
        gone = asyncio.ensure_future(_wait_until_gone(request.receive))
        try:
            async with self._worker as worker:

                async def make() -> bytes:
                    try:
                        return await worker.run(partial(make_frame, source, query))
                    except OSError as error:
                        # Not to be taken for the error of a server whose viewer is gone.
                        raise WatchError(f"the frame cannot be made: {error}") from error

                # Servers raise it when the viewer is gone.
                with contextlib.suppress(OSError):
                    await self._send_frames(request, source, make, gone)
        finally:
            self._streams -= 1
            gone.cancel()
            await asyncio.wait([gone])
            if not gone.cancelled():
                # Whatever it raises, the viewer is gone.
                gone.exception()

    async def _send_frames(
        self, request: Request, source: Source, make: Callable[[], Awaitable[bytes]], gone: asyncio.Future[None]
    ) -> None:
        loop = asyncio.get_running_loop()
        last = loop.time() + LONGEST_STREAM
        frame = await make()
        await request.start(200, "text/event-stream", ("x-accel-buffering", "no"))
        options = json.dumps({"allow_cancel": self._allow_cancel, "has_token": self._access.has_token}).encode()
        await request.send(b"retry: %d\nevent: options\ndata: %s\n\n" % (RETRY, options), more=True)
        sent = b""
        while True:
            due = loop.time() + INTERVAL
            is_new, sent = frame != sent, frame
            await request.send(b"data: %s\n\n" % frame if is_new else b"event: same\ndata:\n\n", more=True)
            # Looked at after each frame, however long it took to make.
            while not (self._must_end(source) or gone.done() or loop.time() > last):
                if loop.time() >= due:
                    break
                await asyncio.wait([gone], timeout=min(GLANCE, due - loop.time()))
            else:
                await request.send(b"")
                return
            frame = await make()

    def _must_end(self, source: Source) -> bool:
        return self._is_closed or source.has_ended() or server_is_ending()


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def app(
    manager: Any = None,
    *,
    auth: Auth | None = None,
    token: str | None = None,
    allow_cancel: bool = False,
    show_context: Collection[str] = (),
    hosts: Sequence[str] = LOOPBACK,
) -> Page:
    """Return an ASGI application that shows the tasks of a manager in a browser, to be mounted in yours.

    It needs ``auth`` or ``token``; with both, a viewer needs both. It opens no socket, and has a thread only while
    somebody looks.

    Args:
        manager: a manager. None for that of the application, which the lifespans of ``bgtasks.integrations`` make.
        auth: called with the ASGI scope of each request; True, or a coroutine that returns True, lets it in.
        token: a secret of at least 16 characters. Viewers log in with it and get a cookie for 12 hours; programs send
            ``Authorization: Bearer TOKEN``.
        allow_cancel: whether viewers may cancel tasks.
        show_context: the keys of task contexts whose values are shown. The values of all others are hidden.
        hosts: the names or addresses, without ports, under which the application is reached. Requests to other hosts
            are refused: a stranger's page could reach the server under a name of its own.

    Raises:
        InvalidOptionError: there is neither ``auth`` nor ``token``, or an argument has an invalid value.

    Example:
        >>> page = app(token="a secret of some length", hosts=["app.example"])
        >>> page.close()

    """
    if manager is not None and not hasattr(manager, "_live_records"):
        raise InvalidOptionError(f"manager must be a BackgroundTaskManager, or None; got {describe(manager)}")
    check_flag("allow_cancel", allow_cancel)
    if isinstance(show_context, str) or not all(isinstance(key, str) for key in show_context):
        raise InvalidOptionError(
            f"show_context must be a list of keys, such as ['order_id']; got {describe(show_context)}"
        )
    keys = tuple(show_context)

    def find_source(scope: Scope) -> Source:
        return ManagerSource(_manager_of(scope) if manager is None else manager, keys)

    return SourcePage(find_source, Access(auth, token, hosts), allow_cancel)


def _manager_of(scope: Scope) -> Any:
    """Return the manager of the application that serves a request."""
    for state in (scope.get("state"), getattr(scope.get("app"), "state", None)):
        found = state.get("task_manager") if isinstance(state, Mapping) else getattr(state, "task_manager", None)
        if found is not None:
            return found
    raise NoManagerError(
        "this application has no task manager: make it with a lifespan of bgtasks.integrations, or pass the manager "
        "to bgtasks.watch.app"
    )
