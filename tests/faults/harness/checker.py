"""The checker: compares what the ledgers say with what the sink has.

``python -m harness.checker FOLDER TARGET ADDRESS`` prints a verdict as JSON.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from harness.ledger import ids_of, read_ledgers

__all__ = ["Verdict", "check"]

# The reasons for which a spool drops events that it did not return. Nobody can list what a damaged file held.
IN_SPOOL = ("corrupt", "expired", "spool_full")


class Verdict(NamedTuple):
    """The result of a row.

    Args:
        accepted: the events that had to arrive, or to be counted.
        lost: those that did not arrive and were not dropped as counted: an event that the spool returned has to be
            listed in the dead letters, for any other the number that the spool counted is enough.
        counted: the events that the publishers counted as dropped.
        refused: the events that were not accepted.
        doubled: the arrivals of events that had arrived before.
        reordered: the events that arrived after a later one of their producer.
        recovered: seconds from the end of the fault to the next delivery, None if there is no fault that ends.
        wrong: the publishers whose counters do not add up, and "spool" or "dead letters" if more is counted than did
            not arrive, or is listed.

    """

    accepted: int
    lost: int
    counted: int
    refused: int
    doubled: int
    reordered: int
    recovered: float | None
    wrong: list[str]


class _Expected:
    """What one producer wrote down."""

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        self.durable: set[int] = set()
        self.refused = 0
        self.stats: dict[str, Any] | None = None

    def read(self, line: dict[str, Any]) -> None:
        if "offered" in line:
            first, end = line["offered"]
            self.refused += len(line["refused"])
            self.numbers |= set(range(first, end)) - set(line["refused"])
            if line["durable"]:
                # Commits come in order: what was accepted before is on the disk as well.
                self.durable = set(self.numbers)
        elif "closed" in line:
            self.stats = line["stats"]

    def due(self) -> set[int]:
        """Return the events that have to arrive: of a killed producer those that were on its disk."""
        return self.durable if self.stats is None else self.numbers


def check(lines: Iterable[dict[str, Any]], arrived: Iterable[tuple[str, int]]) -> Verdict:
    """Compare.

    Args:
        lines: the lines of the ledgers, in the order of their times. ``returned`` and ``listed`` have producer and
            number of the events of a batch of the spool, and of the events in the dead letters.
        arrived: producer and number of each event, in the order of the sink.

    """
    lines = list(lines)
    producers: defaultdict[str, _Expected] = defaultdict(_Expected)
    for line in lines:
        if "producer" in line:
            producers[line["producer"]].read(line)
    counts = Counter(arrived := list(arrived))
    missing = {(name, n) for name, one in producers.items() for n in one.due() if (name, n) not in counts}
    returned, listed = (
        {(name, number) for line in lines for name, number in line.get(key, ())} for key in ("returned", "listed")
    )
    all_stats = {name: one.stats for name, one in producers.items() if one.stats is not None}
    # A publisher that ended with events in its spool left them to the next one, which delivers or counts them.
    counted = sum(sum(stats["dropped"].values()) for stats in all_stats.values())
    counted_in_spool = sum(stats["dropped"].get(reason, 0) for stats in all_stats.values() for reason in IN_SPOOL)
    missing_in_spool = len(missing - returned - listed)
    wrong = [name for name, stats in all_stats.items() if not _adds_up(stats)]
    if counted_in_spool > missing_in_spool:
        wrong.append("spool")
    if counted - counted_in_spool != len(listed):
        wrong.append("dead letters")
    return Verdict(
        accepted=sum(len(one.due()) for one in producers.values()),
        lost=len(missing & returned - listed) + max(missing_in_spool - counted_in_spool, 0),
        counted=counted,
        refused=sum(one.refused for one in producers.values()),
        doubled=sum(count - 1 for count in counts.values()),
        reordered=_reordered(arrived),
        recovered=_time_to_recover(lines),
        wrong=wrong,
    )


def _reordered(arrived: list[tuple[str, int]]) -> int:
    highest: dict[str, int] = {}
    seen: set[tuple[str, int]] = set()
    late = 0
    for event in arrived:
        if event in seen:
            continue
        seen.add(event)
        name, number = event
        late += number < highest.get(name, -1)
        highest[name] = max(number, highest.get(name, -1))
    return late


def _time_to_recover(lines: list[dict[str, Any]]) -> float | None:
    ends = [line["at"] for line in lines if line.get("is_over")]
    if not ends:
        return None
    return next((line["at"] - ends[-1] for line in lines if "delivered" in line and line["at"] >= ends[-1]), None)


def _adds_up(stats: dict[str, Any]) -> bool:
    parts = stats["delivered"] + sum(stats["dropped"].values()) + stats["queue_events"] + stats["spooled"]
    return bool(stats["accepted"] == parts)


def main(folder: Path, target: str, address: str) -> None:
    """Read the ledgers, the dead letters and the sink, and print the verdict."""
    from harness.targets import TARGETS

    letters = [json.loads(line) for file in folder.glob("*.dead") for line in file.read_bytes().splitlines()]
    listed = {"listed": ids_of(letter["event"].encode() for letter in letters)}
    verdict = check([*read_ledgers(folder), listed], ids_of(TARGETS[target].read(address)))
    print(json.dumps(verdict._asdict()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
