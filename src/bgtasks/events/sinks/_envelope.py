"""Envelopes: the events of a batch as JSON lines in few messages, for brokers whose cost is per message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

__all__ = ["CONTENT_TYPE", "Envelope", "fill_envelopes"]

CONTENT_TYPE: Final = "application/x-ndjson"


class Envelope(NamedTuple):
    """One message: its number in the batch, and the events as lines, each with its line break."""

    number: int
    body: bytes


def fill_envelopes(batch: Sequence[bytes], limit: int) -> tuple[list[Envelope], list[int]]:
    """Return the envelopes of a batch, and the indexes of the events that fit in none.

    The same batch and limit give the same envelopes each time, so their numbers can be part of message ids.

    Args:
        batch: encoded events.
        limit: the maximum length of an envelope, in bytes.

    """
    body = b"\n".join(batch) + b"\n"
    if len(body) <= limit and body.count(b"\n") == len(batch):
        return [Envelope(0, body)], []
    unfit = [index for index, event in enumerate(batch) if len(event) >= limit or b"\n" in event]
    skipped = set(unfit)
    bodies: list[bytes] = []
    lines: list[bytes] = []
    left = limit
    for index, event in enumerate(batch):
        if index in skipped:
            continue
        if len(event) + 1 > left:
            bodies.append(b"\n".join(lines) + b"\n")
            lines, left = [], limit
        lines.append(event)
        left -= len(event) + 1
    if lines:
        bodies.append(b"\n".join(lines) + b"\n")
    return [Envelope(number, body) for number, body in enumerate(bodies)], unfit
