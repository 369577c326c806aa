"""Where the events go, a file of JSON lines or a stream in Redis, and what is found there afterwards."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
from source_lines import Event, encode

from bgtasks.errors import BgtasksError
from bgtasks.events import Sink, SinkError
from bgtasks.events.sinks.jsonl import JsonlSink
from bgtasks.events.sinks.redis import RedisSink

__all__ = ["Announcement", "Contents", "Destination", "JsonlFile", "RedisStream", "UsedSinkError", "checksum_of"]

READ_AT_ONCE = 10_000


class UsedSinkError(BgtasksError):
    """The destination holds events already, so it cannot be compared with what is published."""


class Announcement(msgspec.Struct, gc=False):
    """What is published: a line, with its number and the time."""

    number: int
    kind: str
    name: str
    record: msgspec.Raw
    published_at: float

    @classmethod
    def of(cls, number: int, event: Event) -> Announcement:
        """Return the announcement of an event, whose payload is JSON already."""
        return cls(number, event.kind, event.name, msgspec.Raw(event.payload), time.time())


class Contents(NamedTuple):
    """What a destination holds.

    ``gaps`` are the runs of numbers that are missing, the first and the last of each; ``repeated`` and ``unexpected``
    count the events whose number came before or was never given out.
    """

    gaps: list[tuple[int, int]]
    repeated: int
    unexpected: int
    checksum: int


def checksum_of(number: int, payload: bytes) -> int:
    """Return the share of one event in a checksum, which is the sum over all events, in any order."""
    return zlib.crc32(payload, number)


def compare(events: Iterable[bytes], expected: int) -> Contents:
    """Compare events with those from 1 to ``expected``, each once."""
    numbers = []
    checksum = 0
    decode = msgspec.json.Decoder(Announcement).decode
    for event in events:
        try:
            announcement = decode(event)
            number, payload = announcement.number, bytes(announcement.record)
        except msgspec.DecodeError:
            # A line that is no UTF-8 became lone surrogates, which only the standard library reads.
            fields = json.loads(event)
            number, payload = fields["number"], encode(fields["record"]).encode()
        numbers.append(number)
        checksum += checksum_of(number, payload)
    gaps = []
    repeated = unexpected = last = 0
    for number in sorted(numbers):
        if not 0 < number <= expected:
            unexpected += 1
        elif number == last:
            repeated += 1
        else:
            if number > last + 1:
                gaps.append((last + 1, number - 1))
            last = number
    if last < expected:
        gaps.append((last + 1, expected))
    return Contents(gaps, repeated, unexpected, checksum)


class Destination(Protocol):
    """Where events go and are read back; ``str()`` of it says where that is."""

    def make_sink(self) -> Sink:
        """Return a sink for a publisher."""

    def refuse_used(self) -> None:
        """Raise an error if it holds events already."""

    def read_back(self, expected: int) -> Contents:
        """Read all events back, which should be those from 1 to ``expected``, each once."""


class JsonlFile:
    """A file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return f"{self._path}, JSON lines"

    def make_sink(self) -> Sink:
        """Return a sink for a publisher."""
        return JsonlSink(self._path)

    def refuse_used(self) -> None:
        """Raise an error if the file is not empty.

        Raises:
            UsedSinkError: it is not.

        """
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_size:
                raise UsedSinkError(f"{self._path}: it holds something already; give the path of a new file")

    def read_back(self, expected: int) -> Contents:
        """Read all events back.

        Raises:
            SinkError: a line is no event.
            OSError: the file cannot be read.

        """
        with self._path.open("rb") as file, _named(self):
            return compare(file, expected)


class RedisStream:
    """A stream in Redis. Without a key it gets one of its own, and is deleted once it was read."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url
        self._is_temporary = key is None
        self._key = key or f"bgtasks:main-job:{uuid.uuid4().hex}"

    def __str__(self) -> str:
        return f"the stream {self._key} in Redis"

    def make_sink(self) -> Sink:
        """Return a sink for a publisher, which keeps all entries.

        Raises:
            MissingExtraError: redis-py is not installed.
            InvalidOptionError: the URL is none of Redis.

        """
        return RedisSink(self._url, key=self._key, maxlen=None)

    def refuse_used(self) -> None:
        """Raise an error if the stream exists.

        Raises:
            UsedSinkError: it does.
            SinkError: Redis cannot be asked.

        """
        # For its errors: they name a missing extra and a bad URL.
        self.make_sink()
        with self._client() as client:
            if not self._is_temporary and client.exists(self._key):
                raise UsedSinkError(f"{self}: it holds events already; give another --key")

    def read_back(self, expected: int) -> Contents:
        """Read all events back.

        Raises:
            SinkError: Redis cannot be read, or an entry is no event.

        """
        with self._client() as client, _named(self):
            contents = compare(self._events(client), expected)
            if self._is_temporary:
                client.delete(self._key)
            return contents

    def _events(self, client: Any) -> Iterator[bytes]:
        first = "-"
        while entries := client.xrange(self._key, first, count=READ_AT_ONCE):
            for _, fields in entries:
                yield fields[b"data"]
            last, _ = entries[-1]
            first = f"({last.decode()}"

    @contextlib.contextmanager
    def _client(self) -> Iterator[Any]:
        import redis

        try:
            with redis.Redis.from_url(self._url, socket_connect_timeout=5, socket_timeout=30) as client:
                yield client
        except redis.RedisError as error:
            raise SinkError(f"{self}: {error}") from error


@contextlib.contextmanager
def _named(destination: Destination) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise SinkError(f"{destination}: {error!r}") from error
