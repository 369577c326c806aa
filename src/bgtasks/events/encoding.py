"""Turns events into bytes: msgspec for what it knows, a pydantic model by its own serializer, bytes as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from bgtasks.errors import describe, missing_extra, text_of
from bgtasks.events.errors import EncodeError

__all__ = ["Encoder", "JsonEncoder"]


class Encoded(NamedTuple):
    """A batch after encoding.

    ``payloads`` are in the order of the events. ``failed`` holds the events that cannot be encoded, each with its
    error. ``volume`` is the sum of the lengths of the payloads, in bytes.
    """

    payloads: list[Any]
    volume: int
    failed: list[tuple[object, EncodeError]]


class Encoder(Protocol):
    """What a publisher needs to turn events into payloads."""

    def encode(self, event: Any) -> bytes:
        """Return the payload of one event; raise ``EncodeError`` where there is none."""
        ...

    def encode_batch(self, events: Sequence[Any]) -> Encoded:
        """Return the payloads of all events that have one, and the others with their errors."""
        ...


class JsonEncoder:
    """Encodes events as JSON: ``msgspec.Struct``, dataclass, mapping, pydantic model; ``bytes`` are taken as they are.

    Raises:
        MissingExtraError: msgspec is not installed.

    """

    def __init__(self) -> None:
        try:
            import msgspec
        except ModuleNotFoundError as error:
            raise missing_extra("events", "msgspec", "publish events") from error
        self._encode_json = msgspec.json.Encoder(enc_hook=_encode_nested).encode
        self._by_type: dict[type, Callable[[Any], bytes]] = {bytes: _as_is, bytearray: bytes, memoryview: bytes}

    def encode(self, event: Any) -> bytes:
        """Return the JSON of one event.

        Raises:
            EncodeError: it has none; the text names the event's type.

        """
        kind = type(event)
        encode = self._by_type.get(kind) or self._learn(kind)
        try:
            return encode(event)
        except Exception as error:
            raise EncodeError(f"an event of type {_name_of(kind)} cannot be encoded: {text_of(error)}") from error

    def encode_batch(self, events: Sequence[Any]) -> Encoded:
        """Return the JSON of all events that have one, and the others with their errors."""
        by_type = self._by_type
        try:
            # The usual batch: types seen before, nothing wrong.
            payloads = [by_type[type(event)](event) for event in events]
        except Exception:
            return self._encode_each(events)
        return Encoded(payloads, sum(map(len, payloads)), [])

    def _encode_each(self, events: Sequence[Any]) -> Encoded:
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
    """Give msgspec something it knows for a value inside an event: the fields of a pydantic model."""
    if hasattr(type(value), "model_dump_json"):
        return value.model_dump(mode="json")
    raise EncodeError(f"it holds {_name_of(type(value))}, {describe(value)}, which has no JSON form")


def _name_of(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
