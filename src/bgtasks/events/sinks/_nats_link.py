"""One connection to NATS, without reconnection: if it breaks, the flusher sends the batch again."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

from bgtasks.errors import text_of
from bgtasks.events.errors import SinkError

__all__ = ["NatsLink"]

MESSAGE_TOO_LONG: Final = 10054  # JetStream's error code: longer than the stream allows
# Seconds.
CLOSES_WITHIN: Final = 0.5


class Message(Protocol):
    """A message that nats-py passes to a subscriber."""

    subject: str
    data: bytes
    headers: dict[str, str] | None


class NatsLink:
    """A connection, and the answers to the batch published last.

    Args:
        timeout: seconds to wait for a connection, and for the answers to a batch.

    """

    def __init__(self, timeout: float) -> None:
        self._client: Any = _client_class()()
        self._timeout = timeout
        self._wait: asyncio.Timeout | None = None
        self._last_error: Exception | None = None
        self._inbox = ""
        self._missing = 0
        self._all_answered: asyncio.Future[None] | None = None
        self._failures: list[str] = []
        self._too_long: list[int] = []

    @property
    def longest_message(self) -> int:
        """The maximum length of a message, headers included, in bytes."""
        return int(self._client.max_payload)

    async def connect(self, servers: Sequence[str], options: Mapping[str, object]) -> None:
        """Connect to the first server that answers.

        Raises:
            SinkError: no server answers; the message says why.

        """
        settings = {
            "allow_reconnect": False,
            "max_reconnect_attempts": 1,
            "reconnect_time_wait": 0,
            "name": "bgtasks",
            **options,
            "error_cb": self._note_error,
            "closed_cb": self._stop_waiting,
        }
        async with self._answers_in_time(f"connecting to {_places(servers)}"):
            await self._client.connect(list(servers), **settings)

    async def close(self) -> None:
        """Close the connection, without waiting for a server that no longer reads."""
        client = self._client
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CLOSES_WITHIN):
                await client.close()

    async def stream_config(self, subject: str) -> Any:
        """Return the configuration of the stream that listens on a subject; None if this user may not ask for it.

        Raises:
            SinkError: no stream listens on the subject.

        """
        from nats.js.errors import NotFoundError

        context = self._client.jetstream(timeout=self._timeout / 2)
        try:
            name = await context.find_stream_name_by_subject(subject)
            return (await context.stream_info(name)).config
        except NotFoundError as error:
            raise SinkError(f"NATS: no stream takes the subject {subject!r}; create one that does") from error
        except Exception:
            if self._client.is_closed:
                raise
            return None

    async def publish(self, subject: str, bodies: Iterable[bytes], headers: dict[str, str] | None) -> None:
        """Publish messages and wait until the server has processed them.

        Raises:
            SinkError: the connection broke, no answer came in time, or the server does not allow it.

        """
        publish = self._client.publish
        self._last_error = None
        async with self._answers_in_time("publishing"):
            for body in bodies:
                await publish(subject, body, headers=headers)
            await self._client.flush(self._timeout)
        if self._last_error is not None:
            # The user may not publish to the subject; the connection is not affected.
            raise SinkError(f"NATS: {text_of(self._last_error)}") from self._last_error

    async def publish_acknowledged(
        self, subject: str, messages: Sequence[tuple[str, bytes]], headers: dict[str, str] | None
    ) -> list[int]:
        """Publish messages, each with its id, and wait until JetStream has acknowledged each.

        Returns:
            The numbers of the messages that are longer than the stream allows.

        Raises:
            SinkError: the connection broke, no answer came in time, or some messages were not stored.

        """
        self._missing = len(messages)
        self._failures, self._too_long = [], []
        publish = self._client.publish
        async with self._answers_in_time("waiting for JetStream's acknowledgements"):
            inbox = self._inbox or await self._subscribe()
            self._all_answered = asyncio.get_running_loop().create_future()
            for number, (message_id, body) in enumerate(messages):
                await publish(subject, body, f"{inbox}.{number}", {"Nats-Msg-Id": message_id, **(headers or {})})
            await self._all_answered
        if self._failures:
            text = self._failures[0]
            raise SinkError(
                f"NATS: {len(self._failures)} of {len(messages)} messages were not stored, the first: {text}"
            )
        return self._too_long

    async def _subscribe(self) -> str:
        inbox: str = self._client.new_inbox()
        await self._client.subscribe(f"{inbox}.*", cb=self._take_answer)
        self._inbox = inbox
        return inbox

    async def _take_answer(self, message: Message) -> None:
        # No other part of an acknowledgement has these characters: a name is followed by a comma or a brace.
        if b'"error":' in message.data or not message.data:
            self._take_failure(message)
        self._missing -= 1
        if not self._missing and self._all_answered is not None and not self._all_answered.done():
            self._all_answered.set_result(None)

    def _take_failure(self, message: Message) -> None:
        if not message.data:
            status = (message.headers or {}).get("Status", "an empty answer")
            text = "no stream takes this subject" if status == "503" else status
            self._failures.append(text)
            return
        error = json.loads(message.data)["error"]
        if error.get("err_code") == MESSAGE_TOO_LONG:
            self._too_long.append(int(message.subject.rpartition(".")[2]))
        else:
            self._failures.append(f"{error.get('description')} (code {error.get('err_code')})")

    @contextlib.asynccontextmanager
    async def _answers_in_time(self, doing: str) -> AsyncIterator[None]:
        """End a block when its time is up or the connection closes, and raise every failure as a ``SinkError``."""
        from nats.errors import Error

        try:
            async with asyncio.timeout(self._timeout) as wait:
                self._wait = wait
                yield
        except (Error, OSError, TimeoutError, ValueError) as error:
            cause = self._last_error or error
            if not isinstance(cause, TimeoutError):
                text = text_of(cause)
            elif self._client.is_closed:
                text = "the connection was closed"
            else:
                text = f"no answer within {self._timeout:g} seconds"
            raise SinkError(f"NATS, {doing}: {text}") from error
        finally:
            self._wait = None

    async def _note_error(self, error: Exception) -> None:
        self._last_error = error

    async def _stop_waiting(self) -> None:
        if self._wait is not None and not self._wait.expired():
            self._wait.reschedule(asyncio.get_running_loop().time())


@functools.cache
def _client_class() -> Any:
    """Return the class of nats-py's client, with a check before ``CONNECT``: it would send passwords in plain text."""
    from nats.aio.client import Client
    from nats.errors import Error

    # Any: nats-py may be missing.
    class SecureClient(Client):  # type: ignore[misc, unused-ignore]
        async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
            # Called with the server's greeting, from which nats-py alone learns whether to start TLS.
            server = self._current_server
            wants_tls = (server is not None and server.uri.scheme == "tls") or self.options.get("tls") is not None
            if wants_tls and initial_connection and not self.options["tls_handshake_first"]:
                if not (info.get("tls_required") or info.get("tls_available")):
                    raise Error("the server offers no TLS; nothing was sent to it. Use nats:// for plain text")
                info["tls_required"] = True
            await super()._process_info(info, initial_connection)

    return SecureClient


def _places(servers: Sequence[str]) -> str:
    """Return addresses without their credentials."""
    return ", ".join(server.rpartition("@")[2].rpartition("//")[2] for server in servers)
