"""The last screen of the main job: what ran, how fast, what came of it, and whether all is right."""

from __future__ import annotations

import math
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping
from typing import Final

from job import Job, Source
from sinks import Contents, Destination

import bgtasks
from bgtasks import ManagerStats, NameStats
from bgtasks.events import PublisherStats

__all__ = ["Outcome", "report"]

ENDS: Final = ("completed", "failed", "timed_out", "cancelled")
GAPS_SHOWN: Final = 10
NAMES_SHOWN: Final = 4


class Outcome:
    """How the program went; ``halt`` says what ended it before its source did, "" if nothing."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self.tasks: ManagerStats | None = None
        self.events: PublisherStats | None = None
        self.begun = time.perf_counter()
        self.loop = ""
        self.halt = ""


def report(outcome: Outcome, job: Job, source: Source, destination: Destination, contents: Contents) -> bool:
    """Print how the program went; return whether all tasks ended as they had to and every event arrived."""
    assert outcome.tasks is not None, "it is there when a job is"
    assert outcome.events is not None, "it is there when a job is"
    python = f"{platform.python_implementation()} {platform.python_version()}"
    print(f"source   {job.published:,} {source}")
    print(f"ran on   {outcome.loop}, {python}, {bgtasks.IMPLEMENTATION} registry, {os.cpu_count()} cores")
    tasks_are_right = _report_tasks(job, outcome.tasks)
    events_are_right = _report_events(job, outcome.events, destination, contents)
    _report_time(job, time.perf_counter() - outcome.begun)
    print("next     docs/tutorial.md: a program of your own; docs/events.md: events into Redis, NATS, Kafka and others")
    if outcome.halt:
        print(f"stopped  {outcome.halt}")
    if contents.gaps:
        print(f"missing  {_ranges(contents.gaps)}")
    if contents.unexpected:
        print(f"unknown  {contents.unexpected:,} events that were never published")
    return tasks_are_right and events_are_right and not outcome.halt


def _report_tasks(job: Job, stats: ManagerStats) -> bool:
    # The publisher's own task is among those of the manager.
    names = {name: of_name for name, of_name in stats["names"].items() if name in job.kinds}
    ended = Counter({end: sum(of_name[end] for of_name in names.values()) for end in ENDS})
    count = job.counts["create_task"] + job.counts["fire"]
    peer = job.peer
    print(
        f"tasks    {count:,} with name, timeout and context: {job.rate('create_task'):,.0f}/s by create_task, "
        f"{job.rate('fire'):,.0f}/s by fire"
    )
    print(
        f"ended    {ended['completed']:,} completed, {ended['failed']:,} failed, {ended['timed_out']:,} timed out, "
        f"{ended['cancelled']:,} cancelled; the service refused {peer.refused:,} and ignored {peer.silent:,}"
    )
    print(f"p50/p99  {_percentiles(names)}")
    ratio = job.seconds_of_tasks() / (job.seconds["bare"] or math.inf)
    print(
        f"bare     {job.rate('bare'):,.0f}/s: the same as bare asyncio tasks, in turn with those of bgtasks, "
        f"which took {ratio:.2f} times as long"
    )
    completed = ended.total() - peer.refused - peer.silent
    return ended == Counter(completed=completed, failed=peer.refused, timed_out=peer.silent)


def _report_events(job: Job, stats: PublisherStats, destination: Destination, contents: Contents) -> bool:
    dropped = ", ".join(f"{number:,} {reason}" for reason, number in stats["dropped"].items())
    print(
        f"events   {stats['delivered']:,} into {destination}: {job.rate('events'):,.0f}/s, "
        f"{dropped or 'none'} dropped, {stats['retried']:,} batches retried"
    )
    lost = sum(last - first + 1 for first, last in contents.gaps)
    are_checksums_equal = job.checksum == contents.checksum
    print(
        f"sink: {job.published - lost:,} of {job.published:,} events found, {_count(lost)} lost, "
        f"{_count(contents.repeated)} twice, checksums {'equal' if are_checksums_equal else 'DIFFER'}"
    )
    return are_checksums_equal and not (lost or contents.repeated or contents.unexpected or stats["dropped"])


def _report_time(job: Job, seconds: float) -> None:
    spent = {
        "reading": job.seconds["source"],
        "tasks": job.seconds_of_tasks(),
        "bare tasks": job.seconds["bare"],
        "events": job.seconds["events"],
    }
    parts = ", ".join(f"{part:.1f} s {what}" for what, part in spent.items())
    print(f"took     {seconds:.1f} s with the check of the sink: {parts}")


def _percentiles(names: Mapping[str, NameStats]) -> str:
    """Return the 50th and 99th percentile of how long tasks took, for the names that most of them have."""
    most = sorted(names.items(), key=lambda item: -item[1]["completed"])[:NAMES_SHOWN]
    return ", ".join(
        f"{name} {_milliseconds(stats['p50_seconds'])}/{_milliseconds(stats['p99_seconds'])} ms" for name, stats in most
    )


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.3g}"


def _count(number: int) -> str:
    return f"{number:,}" if number else "none"


def _ranges(gaps: list[tuple[int, int]]) -> str:
    shown = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in gaps[:GAPS_SHOWN])
    return f"{shown} and {len(gaps) - GAPS_SHOWN:,} more gaps" if len(gaps) > GAPS_SHOWN else shown
