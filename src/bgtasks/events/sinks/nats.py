"""Events into NATS: subjects of core NATS, or a JetStream that acknowledges each message and knows its id."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from bgtasks.errors import InvalidOptionError, missing_extra
from bgtasks.events.errors import Reject
from bgtasks.events.publisher import BasePublisher
from bgtasks.events.sinks._envelope import CONTENT_TYPE, fill_envelopes
from bgtasks.events.sinks._inherited import keep_inherited
from bgtasks.events.sinks._nats_link import NatsLink
from bgtasks.events.sinks._options import check_seconds, longest_retry

__all__ = ["NatsPublisher"]

logger = logging.getLogger("bgtasks.events")

# What the headers may take of the longest message that is allowed.
HEADER_ROOM: Final = 256


class NatsPublisher(BasePublisher):
    """Publishes into NATS.

    With JetStream every message has the header ``Nats-Msg-Id``, made from the id of its batch, and a batch counts as
    delivered when the server has acknowledged all of its messages. Those that it knows from an earlier try it
    acknowledges without storing them again, within the stream's ``duplicate_window`` (two minutes unless set). The
    stream has to exist. With core NATS a batch counts as delivered when the server has processed it: who does not
    listen then never sees it, and a try whose answer was lost reaches listeners twice.

    An acknowledgement a message costs most of the time. An envelope carries a batch in one message, as JSON lines, at
    more than five times the speed; its readers have to split it.

    Args:
        servers: one URL or several: ``nats://[[user:]password@]host[:port]``, ``tls://`` for TLS.
        subject: where messages go.
        jetstream: have the stream that takes the subject acknowledge each message.
        envelope: send a batch as one message, or as few as fit the longest that is allowed.
        timeout: seconds for a connection, and for the answers to a batch; then a new connection is made.
        connect_options: more keywords for ``nats.connect``, ``user_credentials`` or ``tls`` for example.
        **options: those of ``BasePublisher``.

    Raises:
        InvalidOptionError: an option is outside its values.
        MissingExtraError: nats-py is not installed.

    Example:
        >>> publisher = NatsPublisher("nats://localhost:4222", subject="orders.paid")
        >>> publisher.emit({"event": "order_paid", "order": 42})
        True
        >>> await publisher.close()

    """

    # One connection, which knows the answers to one batch.
    max_inflight = 1

    def __init__(
        self,
        servers: str | Sequence[str] = "nats://localhost:4222",
        *,
        subject: str = "bgtasks.events",
        jetstream: bool = True,
        envelope: bool = False,
        timeout: float = 5.0,
        connect_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        try:
            import nats.errors  # noqa: F401  part of nats-py, unlike the namespace above it
        except ModuleNotFoundError as error:
            raise missing_extra("nats", "nats-py", "publish into NATS") from error
        self._servers = [servers] if isinstance(servers, str) else list(servers)
        if not self._servers:
            raise InvalidOptionError("servers must name at least one server")
        check_seconds("timeout", timeout)
        super().__init__(**options)
        self._subject = subject
        self._jetstream = jetstream
        self._envelope = envelope
        self._headers = {"Content-Type": CONTENT_TYPE} if envelope else None
        self._timeout = timeout
        self._connect_options = dict(connect_options or {})
        self._longest_retry = longest_retry(options)
        self._link: NatsLink | None = None
        self._longest = 0

    async def open(self) -> None:
        """Connect, and ask the stream what it takes."""
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
            # Which of its lines made a message too long cannot be told; halves may fit.
            raise Reject(reason=reason)
        if unfit or refused:
            raise Reject([*unfit, *(self._index(messages[number][0]) for number in refused)], reason)

    async def release(self) -> None:
        """Disconnect."""
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    def _messages(self, batch: Sequence[bytes], batch_id: str) -> tuple[list[tuple[str, bytes]], list[int]]:
        """Return the messages of a batch with their ids, and the indexes of the events that fit in none."""
        longest = self._longest
        if self._envelope:
            # "e": an event of the same number, sent before envelopes were switched on, has another id.
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
        if window < self._longest_retry:
            logger.warning(
                "Publisher %r: the stream %r forgets ids after %g seconds, but tries of one batch may be %g seconds "
                "apart and then be stored twice; raise its duplicate_window",
                *(self.name, config.name, window, self._longest_retry),
            )
