"""What a damaged file still holds: its pages and those of its log are searched for rows whose checksums are right.

SQLite reads a table from its root, by a header and a schema, so one bad page can hide all rows. Here every page that
looks like a leaf of a table is read by itself, as https://www.sqlite.org/fileformat2.html describes it.
"""

from __future__ import annotations

import contextlib
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, NamedTuple, Self

from bgtasks.events.spool._file import PAGE_SIZE, log_of
from bgtasks.events.spool._row import DamagedRowError, Row, checked, decode

__all__ = ["Wreck", "is_log_damaged"]

LEAF: Final = 0x0D
# The most bytes of a row that are in its leaf, and the least if it has overflow pages.
MOST_LOCAL: Final = PAGE_SIZE - 35
LEAST_LOCAL: Final = (PAGE_SIZE - 12) * 32 // 255 - 23
LOG_HEADER: Final = struct.Struct(">8I")
FRAME_HEADER: Final = struct.Struct(">6I")
# The lengths of integers by their serial types.
INTEGERS: Final = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}


class _Frame(NamedTuple):
    """A page in the log: its number, the offset of its content, whether its checksum is right, and it ends a commit."""

    page: int
    offset: int
    is_intact: bool
    is_commit: bool


def _add_up(words: array[int], first: int, second: int) -> tuple[int, int]:
    """Continue the checksum of a log."""
    pairs = iter(words)
    for one, two in zip(pairs, pairs, strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + two + first) & 0xFFFFFFFF
    return first, second


def _words(data: bytes, is_big: bool) -> array[int]:
    words = array("I", data)
    if is_big != (struct.pack("=I", 1) == struct.pack(">I", 1)):
        words.byteswap()
    return words


def _frames(log: BinaryIO) -> Iterator[_Frame]:
    """Yield the frames of a log's current generation, damaged or not."""
    header = log.read(LOG_HEADER.size)
    if len(header) < LOG_HEADER.size:
        return
    magic, _, _, _, *salts, first, second = LOG_HEADER.unpack(header)
    # The last bit says in which byte order the checksums were added up.
    is_big = bool(magic & 1)
    if magic & ~1 != 0x377F0682 or _add_up(_words(header[:24], is_big), 0, 0) != (first, second):
        # Then the first frame tells the generation; SQLite reads none.
        salts = []
        first = second = 0
    while len(head := log.read(FRAME_HEADER.size)) == FRAME_HEADER.size:
        page, commit, salt, other_salt, *sums = FRAME_HEADER.unpack(head)
        offset = log.tell()
        content = log.read(PAGE_SIZE)
        if len(content) < PAGE_SIZE:
            return
        salts = salts or [salt, other_salt]
        first, second = _add_up(_words(head[:8] + content, is_big), first, second)
        is_intact = [first, second] == sums and salts == [salt, other_salt]
        if salts == [salt, other_salt]:
            yield _Frame(page, offset, is_intact, bool(commit))
        # A damaged frame must not make all others look damaged.
        first, second = sums


def is_log_damaged(path: Path) -> bool:
    """Return whether a commit in a file's log cannot be read by SQLite, which ignores all behind the first bad frame.

    Call it while the file is locked.
    """
    has_bad = False
    try:
        with log_of(path).open("rb") as log:
            for frame in _frames(log):
                has_bad = has_bad or not frame.is_intact
                if has_bad and frame.is_commit:
                    return True
    except FileNotFoundError:
        pass
    return False


class Wreck:
    """The readable rows of a damaged file.

    ``begin`` and ``end`` are the numbers of events that had been appended before the first row and up to the last one,
    as far as the columns before the bodies tell; both are 0 if none is readable.

    Args:
        path: the file. While it is locked by this process, the lock is lost when this is closed.

    """

    def __init__(self, path: Path) -> None:
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(path.open("rb"))
            self._pages = self._file.seek(0, 2) // PAGE_SIZE
            self._log: BinaryIO | None = None
            with contextlib.suppress(FileNotFoundError):
                self._log = stack.enter_context(log_of(path).open("rb"))
            frames = [] if self._log is None else list(_frames(self._log))
            # The content of the pages in two views: by all frames, and by those that are intact.
            self._views = [{frame.page: frame.offset for frame in frames}]
            if not all(frame.is_intact for frame in frames):
                self._views.append({frame.page: frame.offset for frame in frames if frame.is_intact})
            self._search()
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the files."""
        self._stack.close()

    def rows(self) -> Iterator[Row]:
        """Yield the rows that are intact and were not deleted, by their numbers."""
        # Read again, one by one: they may be too many for the memory.
        for sequence in sorted(self._found):
            row = self._row(*self._found[sequence])
            if row is not None and _is_intact(row):
                yield row

    def _search(self) -> None:
        """Find the rows, and where the first one begins and the last one ends."""
        found: dict[int, tuple[dict[int, int], int, int]] = {}
        extents: dict[int, tuple[int, int]] = {}
        floor = 0
        for view in self._views:
            for page, at in self._all_cells(view):
                row = self._row(view, page, at)
                if row is None:
                    continue
                is_intact = _is_intact(row)
                if is_intact and row.sequence not in found:
                    found[row.sequence] = (view, page, at)
                    floor = max(floor, row.floor)
                # In an older view, a row without its body may have been deleted since.
                if is_intact or view is self._views[0]:
                    extents[row.sequence] = (row.position, row.position + row.events)
        self._found = {sequence: place for sequence, place in found.items() if sequence >= floor}
        live = [extent for sequence, extent in extents.items() if sequence >= floor]
        self.begin = min((begin for begin, _ in live), default=0)
        self.end = max((end for _, end in live), default=0)

    def _page(self, view: dict[int, int], number: int) -> bytes:
        """Return the content of a page, an empty one if it cannot be read."""
        try:
            if self._log is not None and number in view:
                self._log.seek(view[number])
                return self._log.read(PAGE_SIZE)
            if 1 <= number <= self._pages:
                self._file.seek((number - 1) * PAGE_SIZE)
                return self._file.read(PAGE_SIZE)
        except OSError:
            # A sector that cannot be read.
            pass
        return b""

    def _free_pages(self, view: dict[int, int]) -> set[int]:
        """Return the pages that the file says are free: they may hold rows that were deleted."""
        free: set[int] = set()
        trunk = int.from_bytes(self._page(view, 1)[32:36], "big")
        while trunk not in free and len(content := self._page(view, trunk)) == PAGE_SIZE:
            following, count = struct.unpack_from(">2I", content)
            count = min(count, PAGE_SIZE // 4 - 2)
            free.add(trunk)
            free.update(struct.unpack_from(f">{count}I", content, 8))
            trunk = following
        return free

    def _all_cells(self, view: dict[int, int]) -> Iterator[tuple[int, int]]:
        """Yield page and offset of every row in a page that is not free."""
        free = self._free_pages(view)
        for page in range(1, max(self._pages, max(view, default=0)) + 1):
            if page not in free:
                for at in self._cells(view, page):
                    yield page, at

    def _cells(self, view: dict[int, int], page: int) -> Iterator[int]:
        """Yield the offsets of the rows in a page that looks like a leaf."""
        content = self._page(view, page)
        start = 100 if page == 1 else 0
        if len(content) == PAGE_SIZE and content[start] == LEAF:
            count = min(int.from_bytes(content[start + 3 : start + 5], "big"), (PAGE_SIZE - start - 8) // 2)
            yield from struct.unpack_from(f">{count}H", content, start + 8)

    def _row(self, view: dict[int, int], page: int, at: int) -> Row | None:
        """Return the row at an offset of a page, whose body may be damaged; None if more is, or it is no row."""
        try:
            content = self._page(view, page)
            length, at = _varint(content, at)
            sequence, at = _varint(content, at)
            payload = self._payload(view, content, at, length)
            return checked([sequence, *_values(payload)[1:]])
        except (IndexError, ValueError, struct.error, DamagedRowError):
            return None

    def _payload(self, view: dict[int, int], content: bytes, at: int, length: int) -> bytes:
        """Return the content of a row, that in its overflow pages included up to the first that is missing."""
        if not 0 <= length <= PAGE_SIZE * (self._pages + len(view)):
            raise ValueError("the length is wrong")
        if length <= MOST_LOCAL:
            return content[at : at + length]
        local = LEAST_LOCAL + (length - LEAST_LOCAL) % (PAGE_SIZE - 4)
        if local > MOST_LOCAL:
            local = LEAST_LOCAL
        parts = [content[at : at + local]]
        following = int.from_bytes(content[at + local : at + local + 4], "big")
        left = length - local
        while left > 0:
            content = self._page(view, following)
            if len(content) < PAGE_SIZE:
                break
            parts.append(content[4 : 4 + left])
            left -= PAGE_SIZE - 4
            following = int.from_bytes(content[:4], "big")
        return b"".join(parts)


def _is_intact(row: Row) -> bool:
    """Return whether the body of a row is right, too."""
    try:
        decode(row)
    except DamagedRowError:
        return False
    return True


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of SQLite's variable length, and the offset behind it."""
    value = 0
    for index in range(9):
        byte = data[at + index]
        if index == 8:
            value = value << 8 | byte
        elif byte & 0x80:
            value = value << 7 | byte & 0x7F
            continue
        else:
            value = value << 7 | byte
        break
    return value - (1 << 64) if value >> 63 else value, at + index + 1


def _values(payload: bytes) -> list[Any]:
    """Return the columns of a row."""
    end, at = _varint(payload, 0)
    types = []
    while at < end:
        kind, at = _varint(payload, at)
        types.append(kind)
    values: list[Any] = []
    for kind in types:
        value, at = _value(payload, kind, at)
        values.append(value)
    return values


def _value(payload: bytes, kind: int, at: int) -> tuple[Any, int]:
    """Return the column of a serial type at an offset, and the offset behind it."""
    if kind in INTEGERS:
        end = at + INTEGERS[kind]
        return int.from_bytes(payload[at:end], "big", signed=True), end
    if kind == 7:
        return struct.unpack_from(">d", payload, at)[0], at + 8
    if kind in (8, 9):
        return kind - 8, at
    if kind >= 12:
        end = at + (kind - 12) // 2
        return payload[at:end], end
    return None, at
