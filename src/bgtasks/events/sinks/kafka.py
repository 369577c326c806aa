"""A sink for Kafka: librdkafka's idempotent producer, in a thread."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from bgtasks._checks import check_seconds
from bgtasks.errors import InvalidOptionError, missing_extra
from bgtasks.events._thread import WorkerThread
from bgtasks.events.errors import Reject, Retry, SinkError
from bgtasks.events.sink import Sink
from bgtasks.events.sinks._inherited import keep_inherited

__all__ = ["KafkaSink"]

# Seconds that the thread waits in librdkafka before it checks whether its result is still wanted.
SLICE: Final = 0.1


class KafkaSink(Sink):
    """Writes to a topic of Kafka, one message per event.

    A batch counts as delivered when all in-sync replicas have it (``acks=all``). librdkafka numbers its messages, so
    its own retries store no message twice; it retries for ``message.timeout.ms``, by default five minutes. A try that
    takes longer than ``timeout`` counts as failed, and the next try waits for the same messages instead of sending new
    ones. Only after ``message.timeout.ms``, and after a restart of the process, are messages sent anew: then an event
    may be stored twice. Events of one publisher keep their order within a partition.

    Args:
        servers: ``host:port``, several separated by commas.
        topic: the topic of the messages.
        key: the key of every message, which determines its partition; None spreads messages over the partitions.
        timeout: seconds without an answer after which a try counts as failed.
        config: further settings of librdkafka, such as ``security.protocol`` or ``compression.type``.

    Raises:
        InvalidOptionError: librdkafka does not know a setting, or refuses its value.
        MissingExtraError: confluent-kafka is not installed.

    Example:
        >>> publisher = Publisher(KafkaSink("localhost:9092", topic="orders", config={"compression.type": "lz4"}))

    """

    # The thread sends one batch after another, and knows the unsent messages of the last one.
    max_inflight: ClassVar[int | None] = 1

    def __init__(
        self,
        servers: str = "localhost:9092",
        *,
        topic: str = "bgtasks.events",
        key: str | bytes | None = None,
        timeout: float = 10.0,
        config: Mapping[str, object] | None = None,
    ) -> None:
        try:
            import confluent_kafka
        except ModuleNotFoundError as error:
            raise missing_extra("kafka", "confluent-kafka", "publish into Kafka") from error
        settings: dict[str, object] = {
            "bootstrap.servers": servers,
            "client.id": "bgtasks",
            "enable.idempotence": True,
            "acks": "all",
            "linger.ms": 0,  # a batch is complete when it comes
            "reconnect.backoff.max.ms": 1000,  # not 10 s: an outage ends when the broker is back
            "log_level": 2,  # the publisher logs errors; librdkafka would write them to stderr as well
            **(config or {}),
        }
        try:
            confluent_kafka.Producer(settings)
        except (confluent_kafka.KafkaException, TypeError, ValueError) as error:
            raise InvalidOptionError(f"config: {_text(error)}") from error
        check_seconds("timeout", timeout, positive=True)
        self._settings = settings
        self._topic = topic
        self._key = key
        self._timeout = timeout
        self._producer_thread = WorkerThread("Kafka sink")
        self._sending: _Sending | None = None
        self._pid = 0

    async def open(self) -> None:
        """Make a producer, and have it find the topic."""
        if self._sending is not None and self._pid != os.getpid():
            keep_inherited(self._sending)
            self._sending = None
        await self.close()
        self._pid = os.getpid()
        self._sending = _Sending(self._settings, self._topic, self._key)
        try:
            await self._producer_thread.run(self._sending.find_topic, self._timeout)
        except BaseException:
            await self.close()
            raise

    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Write a batch; return when Kafka has stored it."""
        sending = self._sending
        assert sending is not None
        sending.is_wanted = True
        try:
            await self._producer_thread.run(sending.send, batch, batch_id, self._timeout)
        finally:
            sending.is_wanted = False

    async def close(self) -> None:
        """Close the producer, and discard its undelivered messages."""
        sending, self._sending = self._sending, None
        if sending is not None:
            await self._producer_thread.run(sending.close)
        self._producer_thread.stop()


def _text(error: Exception) -> str:
    """Return the bare message of a librdkafka exception."""
    cause = error.args[0] if error.args else error
    return str(cause.str()) if hasattr(cause, "str") else str(cause)


class _Sending:
    """A producer and its current batch. All methods run in the thread; ``is_wanted`` is for other threads."""

    def __init__(self, settings: Mapping[str, object], topic: str, key: str | bytes | None) -> None:
        from confluent_kafka import KafkaError, KafkaException, Producer

        # A report for each message that was stored would cost as much as sending it.
        self._producer: Any = Producer({**settings, "delivery.report.only.error": True, "error_cb": self._note_error})
        self._exception = KafkaException
        self._hopeless = {
            *(KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_MSG, KafkaError.INVALID_RECORD),
            *(KafkaError.RECORD_LIST_TOO_LARGE, KafkaError.INVALID_MSG_SIZE),
        }
        self._topic = topic
        self._key = {} if key is None else {"key": key}
        self._name = f"Kafka at {settings['bootstrap.servers']}"
        self._batch_id = ""
        self._unsent: list[int] = []
        self._bad: list[int] = []
        self._reported: list[tuple[bytes, Any]] = []
        self._last_error = ""
        self.is_wanted = False

    def find_topic(self, timeout: float) -> None:
        """Ask a broker for the topic.

        Raises:
            SinkError: no broker answers, or the topic is refused.

        """
        try:
            topic = self._producer.list_topics(self._topic, timeout=timeout).topics[self._topic]
        except self._exception as error:
            self._producer.poll(0)  # runs the error callback, which has the details
            raise SinkError(f"{self._name}: {self._last_error or error.args[0].str()}") from error
        if topic.error is not None and not topic.error.retriable():
            raise SinkError(f"{self._name}, topic {self._topic!r}: {topic.error.str()}")

    def send(self, batch: Sequence[bytes], batch_id: str, timeout: float) -> None:
        """Send the unsent messages of a batch, and wait until all are stored.

        Raises:
            Reject: Kafka will never accept some events; all others are stored.
            Retry: some messages are not stored yet; the producer goes on with those it has.
            SinkError: the producer can no longer be used.

        """
        if batch_id != self._batch_id:
            self._begin(batch, batch_id)
        deadline = time.monotonic() + timeout
        self._produce(batch)
        while left := self._producer.flush(SLICE):
            if not self.is_wanted or time.monotonic() >= deadline:
                raise Retry(reason=f"{self._name}: no answer for {left} messages yet; {self._last_error}")
        self._sort_reported(batch)
        if self._unsent:
            raise Retry(reason=f"{self._name}: {len(self._unsent)} messages were not stored; {self._last_error}")
        self._batch_id = ""
        if self._bad:
            raise Reject(self._bad, self._last_error)

    def close(self) -> None:
        """Discard undelivered messages, and end the producer's threads."""
        self._producer.purge()
        self._producer.flush(SLICE)
        self._producer = None

    def _begin(self, batch: Sequence[bytes], batch_id: str) -> None:
        if self._batch_id:  # given up by the flusher
            self._producer.purge()
            self._producer.flush(SLICE)
        self._batch_id = batch_id
        self._unsent, self._bad, self._reported = list(range(len(batch))), [], []

    def _produce(self, batch: Sequence[bytes]) -> None:
        if not self._unsent:
            return
        messages: list[dict[str, Any]] = [{"value": batch[index], **self._key} for index in self._unsent]
        try:
            queued = self._producer.produce_batch(self._topic, messages, on_delivery=self._note_report)
        except self._exception as error:
            raise SinkError(f"{self._name}: {error.args[0].str()}") from error
        unsent, self._unsent = self._unsent, []
        if queued == len(messages):
            return
        for index, message in zip(unsent, messages, strict=True):
            if "_error" in message:
                self._sort(index, message["_error"])

    def _sort_reported(self, batch: Sequence[bytes]) -> None:
        """Find the events that were reported; equal events are interchangeable."""
        if not self._reported:
            return
        reported, self._reported = self._reported, []
        indexes: dict[bytes, list[int]] = {}
        for index in reversed(range(len(batch))):
            indexes.setdefault(batch[index], []).append(index)
        for value, error in reported:
            self._sort(indexes[value].pop(), error)
        self._unsent.sort()

    def _sort(self, index: int, error: Any) -> None:
        self._last_error = error.str()
        (self._bad if error.code() in self._hopeless else self._unsent).append(index)

    def _note_report(self, error: Any, message: Any) -> None:
        self._reported.append((message.value(), error))

    def _note_error(self, error: Any) -> None:
        self._last_error = error.str()
