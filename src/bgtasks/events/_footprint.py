"""Estimates how much memory an event takes, before it is encoded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from gc import get_referents
from operator import attrgetter
from random import Random
from sys import getrefcount, getsizeof
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, Final

__all__ = ["footprint", "footprints"]

# An object with as many references is shared with the program: a constant, a setting. Looking at it makes five.
SHARED: Final = 8
# How many parts of a container are looked at, by its depth in the event; those of a larger one are extrapolated.
SAMPLES: Final[tuple[int, ...]] = (32, 8, 4, 2, 2)
# About what an event and each of its fields take beside a text, and the length from which a text is measured.
FLAT: Final = 200
FIELD: Final = 50
SHORT: Final = 100
# An event with more fields is measured with their names.
FEW: Final = 16
# Classes whose parts are known; then they are forgotten.
MOST_CLASSES: Final = 256
# The bytes of an empty text.
EMPTY: Final = getsizeof("")

_LEAVES: Final = frozenset(
    (str, bytes, int, float, bool, type(None), type, ModuleType, FunctionType, BuiltinFunctionType)
)
# The parts of a large container are taken at random, so as not to meet each tenth one, or none of them.
_random = Random(1)
_NUMBERS: Final = frozenset((int, float, bool, type(None)))
# Classes of msgspec.Struct are in both.
_structs: set[type] = set()
_parts_of: dict[type, Callable[[Any], Sequence[Any]]] = {}


def footprints(events: list[Any]) -> int:
    """Return about how many bytes of memory these events take by themselves."""
    total = 0
    for event in events:
        kind = type(event)
        if kind is dict:
            total += _flat_footprint(event, event.values())
        elif kind in _structs:
            total += _flat_footprint(event, _parts_of[kind](event))
        else:
            total += footprint(event)
    return total


def _flat_footprint(event: Any, parts: Collection[Any]) -> int:
    # Most events are flat and short: this takes a fifth of the time.
    if len(parts) > FEW:
        return footprint(event)
    total = FLAT + FIELD * len(parts)
    for part in parts:
        kind = type(part)
        if kind is str:
            length = len(part)
            if length < SHORT:
                total += length
            elif getrefcount(part) < SHARED:
                total += getsizeof(part)
        elif kind not in _NUMBERS:
            return footprint(event)
    return total


def footprint(event: Any) -> int:
    """Return about how many bytes of memory an event takes by itself; 0 if it cannot be told."""
    try:
        return getsizeof(event) if type(event) in _LEAVES else _size(event) + _parts_footprint(event, 0)
    except Exception:
        # A foreign class may raise anything in __sizeof__ or in a property.
        return 0


def _parts_footprint(whole: Any, depth: int) -> int:
    kind = type(whole)
    parts = [*whole.values(), *whole] if kind is dict else (_parts_of.get(kind) or _learn(kind))(whole)
    count = len(parts)
    if count > SAMPLES[depth]:
        parts = _random.choices(parts, k=SAMPLES[depth])
    total = 0
    for part in parts:
        if getrefcount(part) < SHARED:
            if type(part) is str and part.isascii():
                total += len(part) + EMPTY
            elif type(part) in _LEAVES:
                total += getsizeof(part)
            else:
                total += _size(part)
                if depth + 1 < len(SAMPLES):
                    total += _parts_footprint(part, depth + 1)
    return total if len(parts) == count else total * count // len(parts)


def _size(whole: Any) -> int:
    kind = type(whole)
    if kind.__name__ == "Raw" and kind.__module__ == "msgspec":
        # Its type says that items follow the object, but they do not: getsizeof would take an address for their number.
        return kind.__basicsize__ + memoryview(whole).nbytes
    return getsizeof(whole)


def _learn(kind: type) -> Callable[[Any], Sequence[Any]]:
    if len(_parts_of) >= MOST_CLASSES:
        _structs.clear()
        _parts_of.clear()
    fields: tuple[str, ...] = getattr(kind, "__struct_fields__", ())
    # The garbage collector does not look into a msgspec.Struct with gc=False.
    parts: Callable[[Any], Sequence[Any]] = get_referents
    if len(fields) == 1:
        parts = partial(_only_field, attrgetter(fields[0]))
    elif fields:
        parts = attrgetter(*fields)
    _parts_of[kind] = parts
    if fields:
        _structs.add(kind)
    return parts


def _only_field(get: Callable[[Any], Any], whole: Any) -> Sequence[Any]:
    return (get(whole),)
