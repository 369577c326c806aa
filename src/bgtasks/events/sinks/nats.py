"""A sink for NATS: subjects of core NATS, or JetStream, which acknowledges each message and detects duplicates."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

from bgtasks._checks import check_seconds
from bgtasks.errors import InvalidOptionError, missing_extra
from bgtasks.events.errors import Reject
from bgtasks.events.sink import Sink
from bgtasks.events.sinks._envelope import CONTENT_TYPE, fill_envelopes
from bgtasks.events.sinks._inherited import keep_inherited
from bgtasks.events.sinks._nats_link import NatsLink

__all__ = ["NatsSink"]

logger: Final = logging.getLogger("bgtasks.events")

# Bytes of the longest message that are reserved for headers.
HEADER_ROOM: Final = 256
SCHEMES: Final = ("nats", "tls", "ws", "wss")


class NatsSink(Sink):
    """Writes to a subject of NATS.

    With JetStream, every message has the header ``Nats-Msg-Id``, made from the id of its batch, and a batch counts as
    delivered when the server has acknowledged all of its messages. Messages of an earlier try are acknowledged without
    being stored again, within the stream's ``duplicate_window`` (by default two minutes). The stream must exist. With
    core NATS, a batch counts as delivered when the server has processed it: later subscribers never see it, and a try
    whose answer was lost reaches subscribers twice.

    An acknowledgement per message takes most of the time. An envelope carries a batch in one message, as JSON lines, at
    more than five times the speed; its readers must split it.

    Args:
        servers: one URL or several: ``nats://[[user:]password@]host[:port]``, ``tls://`` for TLS. With ``tls://`` or
            ``connect_options={"tls": ...}``, a server that offers no TLS gets neither password nor events.
        subject: the subject of the messages.
        jetstream: have the stream that takes the subject acknowledge each message.
        envelope: send a batch as one message, or as few as the maximum length of messages allows.
        timeout: seconds for a connection, and for the answers to a batch; after that a new connection is made.
        connect_options: further keywords for ``nats.connect``, ``user_credentials`` or ``tls`` for example.

    Raises:
        InvalidOptionError: an option is outside its values.
        MissingExtraError: nats-py is not installed.

    Example:
        >>> publisher = Publisher(NatsSink("nats://localhost:4222", subject="orders.paid"))

    """

    # One connection, which collects the answers to one batch at a time.
    max_inflight: ClassVar[int | None] = 1

    def __init__(
        self,
        servers: str | Sequence[str] = "nats://localhost:4222",
        *,
        subject: str = "bgtasks.events",
        jetstream: bool = True,
        envelope: bool = False,
        timeout: float = 5.0,
        connect_options: Mapping[str, object] | None = None,
    ) -> None:
        try:
            import nats.errors  # noqa: F401  part of nats-py, unlike the namespace above it
        except ModuleNotFoundError as error:
            raise missing_extra("nats", "nats-py", "publish into NATS") from error
        self._servers = [servers] if isinstance(servers, str) else list(servers)
        if not self._servers:
            raise InvalidOptionError("servers must name at least one server")
        for server in self._servers:
            scheme, separator, _ = server.partition("://")
            if separator and scheme not in SCHEMES:
                raise InvalidOptionError(
                    f"the URL of a NATS server begins with {', '.join(f'{each}://' for each in SCHEMES)}; got {scheme}://"
                )
        check_seconds("timeout", timeout, positive=True)
        self._subject = subject
        self._jetstream = jetstream
        self.is_durable: bool = jetstream
        self._envelope = envelope
        self._headers = {"Content-Type": CONTENT_TYPE} if envelope else None
        self._timeout = timeout
        self._connect_options = dict(connect_options or {})
        self._link: NatsLink | None = None
        self._longest = 0

    async def open(self) -> None:
        """Connect, and ask for the limits of the stream."""
        keep_inherited(self._link)
        self._link = None
        link = NatsLink(self._timeout)
        try:
            await link.connect(self._servers, self._connect_options)
            self._longest = link.longest_message - HEADER_ROOM
            if self._jetstream:
                await self._ask_stream(link)
        except BaseException:
            await link.close()
            raise
        self._link = link

    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Publish a batch and wait until the server has it."""
        link = self._link
        assert link is not None
        messages, unfit = self._messages(batch, batch_id)
        refused: list[int] = []
        if self._jetstream and messages:
            refused = await link.publish_acknowledged(self._subject, messages, self._headers)
        elif messages:
            await link.publish(self._subject, [body for _, body in messages], self._headers)
        reason = f"NATS, or the stream that takes {self._subject!r}, allows no message of this size"
        if refused and self._envelope:
            # It is unknown which line made a message too long; halves may fit.
            raise Reject(reason=reason)
        if unfit or refused:
            raise Reject([*unfit, *(self._index(messages[number][0]) for number in refused)], reason)

    async def close(self) -> None:
        """Disconnect."""
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    def _messages(self, batch: Sequence[bytes], batch_id: str) -> tuple[list[tuple[str, bytes]], list[int]]:
        """Return the messages of a batch with their ids, and the indexes of the events that fit in none."""
        longest = self._longest
        if self._envelope:
            # "e": distinguishes envelopes from single events that were sent before envelopes were switched on.
            envelopes, unfit = fill_envelopes(batch, longest)
            return [(f"{batch_id}:e{number}", body) for number, body in envelopes], unfit
        messages = [(f"{batch_id}:{index}", event) for index, event in enumerate(batch)]
        if max(map(len, batch)) <= longest:
            return messages, []
        unfit = [index for index, event in enumerate(batch) if len(event) > longest]
        return [message for message in messages if len(message[1]) <= longest], unfit

    @staticmethod
    def _index(message_id: str) -> int:
        return int(message_id.rpartition(":")[2])

    async def _ask_stream(self, link: NatsLink) -> None:
        """Fit envelopes to the stream; warn if it forgets ids before the last try of a batch."""
        config = await link.stream_config(self._subject)
        if config is None:
            return
        if self._envelope and (config.max_msg_size or 0) > 0:
            self._longest = min(self._longest, config.max_msg_size - HEADER_ROOM)
        window = config.duplicate_window or 0
        if window < self.retry_window:
            logger.warning(
                "NATS sink %r: the stream %r forgets ids after %g seconds, but tries of one batch may be %g seconds "
                "apart, so events may be stored twice; raise the stream's duplicate_window",
                *(self._subject, config.name, window, self.retry_window),
            )
