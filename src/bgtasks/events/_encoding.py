"""Encodes events: by msgspec if it supports the type, pydantic models by their own serializer, bytes as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from bgtasks.errors import describe, missing_extra, text_of
from bgtasks.events._durable import DurableEvent
from bgtasks.events.errors import EncodeError

__all__ = ["Encoder", "JsonEncoder", "NoEncoder"]


class Encoded(NamedTuple):
    """A batch after encoding.

    ``payloads`` are in the order of the events. ``failed`` holds the events that cannot be encoded, each with its
    error. ``total_bytes`` is the sum of the lengths of the payloads.
    """

    payloads: list[Any]
    total_bytes: int
    failed: list[tuple[object, EncodeError]]


class Encoder(Protocol):
    """Turns events into payloads."""

    def encode(self, event: object) -> object:
        """Return the payload of one event; raise ``EncodeError`` if it has none."""
        ...

    def encode_batch(self, events: Sequence[object]) -> Encoded:
        """Return the payloads of events, and those that cannot be encoded with their errors."""
        ...


class NoEncoder:
    """Leaves events as they are, for a sink that takes them unencoded."""

    def encode(self, event: object) -> object:
        """Return the event."""
        return event

    def encode_batch(self, events: Sequence[object]) -> Encoded:
        """Return the events."""
        return Encoded(list(events), 0, [])


class JsonEncoder:
    """Encodes events as JSON: ``msgspec.Struct``, dataclass, mapping, pydantic model; ``bytes`` stay as they are.

    Raises:
        MissingExtraError: msgspec is not installed.

    """

    def __init__(self) -> None:
        try:
            import msgspec
        except ModuleNotFoundError as error:
            raise missing_extra("events", "msgspec", "publish events") from error
        self._encode_json = msgspec.json.Encoder(enc_hook=_encode_nested).encode
        self._by_type: dict[type, Callable[[Any], bytes]] = {
            bytes: _as_is,
            DurableEvent: _as_is,
            bytearray: bytes,
            memoryview: bytes,
        }

    def encode(self, event: object) -> bytes:
        """Return the JSON of one event.

        Raises:
            EncodeError: it cannot be encoded; the message names its type.

        """
        kind = type(event)
        encode = self._by_type.get(kind) or self._learn(kind)
        try:
            return encode(event)
        except Exception as error:
            # What it holds is the reason, in an error of this class already.
            reason = str(error) if isinstance(error, EncodeError) else text_of(error)
            raise EncodeError(f"an event of type {_name_of(kind)} cannot be encoded: {reason}") from error

    def encode_batch(self, events: Sequence[object]) -> Encoded:
        """Return the JSON of events, and those that cannot be encoded with their errors."""
        by_type = self._by_type
        try:
            # The usual batch: known types, no errors.
            payloads = [by_type[type(event)](event) for event in events]
        except Exception:
            return self._encode_each(events)
        return Encoded(payloads, sum(map(len, payloads)), [])

    def _encode_each(self, events: Sequence[object]) -> Encoded:
        payloads: list[bytes] = []
        failed: list[tuple[object, EncodeError]] = []
        for event in events:
            try:
                payloads.append(self.encode(event))
            except EncodeError as error:
                failed.append((event, error))
        return Encoded(payloads, sum(map(len, payloads)), failed)

    def _learn(self, kind: type) -> Callable[[Any], bytes]:
        self._by_type[kind] = encode = _encode_model if hasattr(kind, "model_dump_json") else self._encode_json
        return encode


def _as_is(event: bytes) -> bytes:
    return event


def _encode_model(model: Any) -> bytes:
    encoded: str = model.model_dump_json()
    return encoded.encode()


def _encode_nested(value: Any) -> Any:
    """Convert a value inside an event to one that msgspec supports: a pydantic model to its fields."""
    if hasattr(type(value), "model_dump_json"):
        return value.model_dump(mode="json")
    raise EncodeError(f"it holds {_name_of(type(value))}, {describe(value)}, which has no JSON form")


def _name_of(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
