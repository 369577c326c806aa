"""A row of a spool's file: one batch, with checksums over every column."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Final, NamedTuple

__all__ = ["DamagedRowError", "Row", "checked", "decode", "make_row", "renumbered"]

# Sequence, floor, position, events, size, created, uptime, boot, checksum of the body.
HEAD: Final = struct.Struct("<qqqqqddqI")


class DamagedRowError(Exception):
    """A row differs from what was written."""


class Row(NamedTuple):
    """A batch as stored in a file.

    ``sequence`` numbers the rows of a file without gaps. ``floor`` was the first sequence in the file when the row was
    written, ``position`` the number of events that had been appended before: by them a damaged file shows what was
    deleted and what is lost. ``size`` counts the bytes of the events alone. ``created`` is a Unix time; ``uptime`` and
    ``boot`` are of ``_clock``. ``checksum`` is that of the body, ``head`` that of all other columns.
    """

    sequence: int
    floor: int
    position: int
    batch_id: str
    events: int
    size: int
    created: float
    uptime: float
    boot: int
    checksum: int
    head: int
    body: bytes


def make_row(
    batch: Sequence[bytes],
    batch_id: str,
    sequence: int,
    floor: int,
    position: int,
    created: float,
    uptime: float,
    boot: int,
) -> Row:
    """Return the row of a batch: its body is a table of the lengths of the events, 32-bit numbers, then the events."""
    events = len(batch)
    content = b"".join(batch)
    size = len(content)
    body = struct.pack(f"<{events}I", *map(len, batch)) + content
    checksum = zlib.crc32(body)
    packed = HEAD.pack(sequence, floor, position, events, size, created, uptime, boot, checksum)
    head = zlib.crc32(batch_id.encode(), zlib.crc32(packed))
    return Row(sequence, floor, position, batch_id, events, size, created, uptime, boot, checksum, head, body)


def renumbered(row: Row, sequence: int, position: int) -> Row:
    """Return a row as the next one of another file."""
    packed = HEAD.pack(sequence, 0, position, row.events, row.size, row.created, row.uptime, row.boot, row.checksum)
    head = zlib.crc32(row.batch_id.encode(), zlib.crc32(packed))
    return row._replace(sequence=sequence, floor=0, position=position, head=head)


def checked(values: Sequence[Any]) -> Row:
    """Return the row of columns that were read from a file; the body may be missing.

    Raises:
        DamagedRowError: a column other than the body is not what was written.

    """
    try:
        sequence, floor, position, batch_id, events, size, created, uptime, boot, checksum, head, body = values
        packed = HEAD.pack(sequence, floor, position, events, size, created, uptime, boot, checksum)
        name = batch_id.decode()
        found = zlib.crc32(batch_id, zlib.crc32(packed))
    except (struct.error, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DamagedRowError(str(error)) from error
    if found != head:
        raise DamagedRowError("its checksum is wrong")
    return Row(sequence, floor, position, name, events, size, created, uptime, boot, checksum, head, body)


def decode(row: Row) -> list[bytes]:
    """Return the events of a row.

    Raises:
        DamagedRowError: the body is not what was written.

    """
    body = row.body
    if not isinstance(body, bytes) or len(body) != 4 * row.events + row.size or zlib.crc32(body) != row.checksum:
        raise DamagedRowError("the checksum of its body is wrong")
    ends = accumulate(struct.unpack_from(f"<{row.events}I", body), initial=4 * row.events)
    return [body[start:end] for start, end in pairwise(ends)]
