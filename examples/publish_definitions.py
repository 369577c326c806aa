"""Publishes every definition of a Python installation as an event.

::

    python examples/publish_definitions.py                  # each def and class of the Python that runs it
    python examples/publish_definitions.py access.log       # each line of a file; - for standard input
    python examples/publish_definitions.py --redis redis://localhost:6379

The events go into a file of JSON lines or, with ``--redis``, into a stream. At the end the sink is read back and
compared with what was published. Exit status: 0 if every event arrived, 1 if not, 2 for bad arguments, 130 after
Ctrl-C and 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import importlib.util
import logging
import math
import platform
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from io import FileIO
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from definitions import Definitions, Event
from lines import Lines
from sinks import Announcement, Contents, Destination, JsonlFile, RedisStream, checksum_of

import bgtasks
from bgtasks import BackgroundTaskManager
from bgtasks.errors import BgtasksError, WorkerDiedError
from bgtasks.events import IMPLEMENTATION, Publisher, PublisherStats

# How many events are published before the loop runs other callbacks, in a millisecond or two.
EVENTS_AT_ONCE: Final = 500
# Seconds for what is left to write when a sink recovers at the last moment.
DRAIN_MARGIN: Final = 5.0
# Seconds for all of it after a signal: container runtimes kill after 30.
SHUTDOWN_DEADLINE: Final = 25.0
LOG_RECORDS_SHOWN: Final = 10
GAPS_SHOWN: Final = 10


class Options(argparse.Namespace):
    """The arguments of the program."""

    file: str | None
    sink: Path | None
    redis: str | None
    key: str | None
    limit: int
    retry_for: float
    queue: int
    loop: str


class Source(Protocol):
    """Where events come from; its text says what they are."""

    def read(self) -> AsyncGenerator[list[Event], None]:
        """Yield the events, some at a time."""


class Screen(logging.Handler):
    """Shows progress and log records on standard error; on a terminal the progress stays in one line."""

    def __init__(self) -> None:
        super().__init__()
        self._is_terminal = sys.stderr.isatty()
        self.interval = 0.2 if self._is_terminal else 2.0
        self._width = 0
        self._records = 0

    def show_progress(self, text: str) -> None:
        """Show how far the program is, in place of what was shown before if that is possible."""
        if self._is_terminal:
            print(f"\r{text:<{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def wipe(self) -> None:
        """Take the progress off the terminal."""
        if self._width:
            print(f"\r{'':<{self._width}}\r", end="", file=sys.stderr, flush=True)
            self._width = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Show a log record, one of the first few."""
        self._records += 1
        if self._records > LOG_RECORDS_SHOWN:
            return
        self.wipe()
        print(f"{record.levelname.lower()}: {self.format(record)}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Remove the progress, and show the number of log records that were not shown."""
        self.wipe()
        if self._records > LOG_RECORDS_SHOWN:
            print(f"{self._records - LOG_RECORDS_SHOWN:,} more log records", file=sys.stderr)


class Run:
    """Publishes the events of a source, numbered from 1 in their order, until one of them is given up."""

    def __init__(self, publisher: Publisher, limit: int) -> None:
        self._publisher = publisher
        self._limit = limit
        self.published = 0
        self.checksum = 0
        self.source_seconds = 0.0

    async def publish_all(self, source: Source) -> None:
        """Publish as fast as the source has events and the queue has capacity.

        Raises:
            OSError: the source cannot be read any further.
            WorkerDiedError: a process that reads for the source died.

        """
        async with contextlib.aclosing(source.read()) as batches:
            while (events := await self._next(batches)) is not None:
                for start in range(0, len(events), EVENTS_AT_ONCE):
                    is_open = await self._publish(events[start : start + EVENTS_AT_ONCE])
                    await asyncio.sleep(0)
                    if not is_open or self.published == self._limit or self._publisher.stats()["dropped"]:
                        return

    async def _next(self, batches: AsyncGenerator[list[Event], None]) -> list[Event] | None:
        asked = time.perf_counter()
        try:
            return await anext(batches, None)
        finally:
            self.source_seconds += time.perf_counter() - asked

    async def _publish(self, events: list[Event]) -> bool:
        """Publish some events; return False once the publisher is closed, as it is after a signal."""
        for event in events[: self._limit - self.published]:
            number = self.published + 1
            # It waits while the queue is full.
            if not await self._publisher.publish(Announcement.of(number, event)):
                return False
            self.published = number
            self.checksum += checksum_of(number, event.payload)
        return True


class Outcome(NamedTuple):
    """How a publication went; ``halt`` says what ended it before its source did, "" if nothing."""

    run: Run
    stats: PublisherStats
    seconds: float
    loop: str
    halt: str


class Publication:
    """Publishes the events of a source until the source ends, an event is lost or a signal comes."""

    def __init__(self, source: Source, destination: Destination, options: Options, screen: Screen) -> None:
        self._source = source
        self._destination = destination
        self._options = options
        self._screen = screen
        # What was published, also if a signal ended it; None before the sink was open.
        self.outcome: Outcome | None = None

    async def main(self, manager: BackgroundTaskManager) -> None:
        """Publish.

        Raises:
            OSError, BgtasksError: the sink cannot be opened.

        """
        publisher = Publisher(
            self._destination.make_sink(),
            max_events=self._options.queue,
            overflow="block",
            retry_for=self._options.retry_for,
            name="publisher",
            # It shows the publisher's task, and its shutdown flushes and closes the publisher.
            manager=manager,
            connect=True,
        )
        await publisher.start()
        run = Run(publisher, self._options.limit)
        halt = ""
        begun = time.perf_counter()
        progress = manager.create_task(_show_progress(publisher, self._screen), name="progress", service=True)
        try:
            await run.publish_all(self._source)
        except (OSError, WorkerDiedError) as error:
            halt = f"the source cannot be read to its end: {error}"
        finally:
            # After a signal that is done already: the manager was shut down first.
            await manager.shutdown()
            progress.cancel()
            stats = publisher.stats()
            if stats["dropped"] and not halt:
                halt = f"an event did not arrive: {stats['last_error']}"
            loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
            self.outcome = Outcome(run, stats, time.perf_counter() - begun, loop, halt)


async def _show_progress(publisher: Publisher, screen: Screen) -> None:
    """Show again and again how far a publisher is, until cancelled."""
    delivered = 0
    shown_at = time.perf_counter()
    while True:
        await asyncio.sleep(screen.interval)
        now = time.perf_counter()
        stats = publisher.stats()
        rate = (stats["delivered"] - delivered) / (now - shown_at)
        delivered, shown_at = stats["delivered"], now
        screen.show_progress(f"{delivered:,} published  {rate:,.0f} events/s  {stats['queue_events']:,} in the queue")


def report(outcome: Outcome, source: Source, destination: Destination, contents: Contents) -> bool:
    """Print how a publication went; return whether every event arrived."""
    run, stats, seconds = outcome.run, outcome.stats, outcome.seconds
    lost = sum(last - first + 1 for first, last in contents.gaps)
    found = run.published - lost
    python = f"{platform.python_implementation()} {platform.python_version()}"
    print(f"source     {run.published:,} {source}")
    print(f"into       {destination}")
    print(f"ran on     {outcome.loop}, {python}, {IMPLEMENTATION} event queue")
    print(f"published  {stats['delivered']:,} in {seconds:.2f} s: {stats['delivered'] / seconds:,.0f} events/s")
    print(f"waited     {run.source_seconds:.2f} s for the source")
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in stats["dropped"].items())
    print(
        f"events     {stats['accepted']:,} accepted, {dropped or 'none'} dropped, {stats['retried']:,} batches retried"
    )
    print(f"checksum   {run.checksum:x} published, {contents.checksum:x} read back")
    if outcome.halt:
        print(f"stopped    {outcome.halt}")
    if lost:
        print(f"missing    {_ranges(contents.gaps)}")
    if contents.unexpected:
        print(f"unknown    {contents.unexpected:,} events that were never published")
    print(f"sink: {found:,} of {run.published:,} events found, {_count(lost)} lost, {_count(contents.repeated)} twice")
    is_sink_right = not (lost or contents.repeated or contents.unexpected) and run.checksum == contents.checksum
    return is_sink_right and not stats["dropped"] and not outcome.halt


def _count(number: int) -> str:
    return f"{number:,}" if number else "none"


def _ranges(gaps: list[tuple[int, int]]) -> str:
    shown = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in gaps[:GAPS_SHOWN])
    return f"{shown} and {len(gaps) - GAPS_SHOWN:,} more gaps" if len(gaps) > GAPS_SHOWN else shown


def _loop_factory(choice: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """Return what makes the loop: uvloop's where it is installed, unless asyncio's is asked for."""
    if choice == "uvloop" or (choice == "auto" and importlib.util.find_spec("uvloop") is not None):
        factory: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module("uvloop").new_event_loop
        return factory
    return asyncio.new_event_loop


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        number = kind(text)
        if not 0 < number < math.inf:
            raise ValueError
        return number

    convert.__name__ = "positive number"
    return convert


def _source(file: str | None, stack: contextlib.ExitStack) -> Source:
    if file is None:
        return Definitions(Path(sysconfig.get_path("stdlib")))
    return Lines(stack.enter_context(FileIO(0, closefd=False) if file == "-" else FileIO(file)))


def _destination(options: Options, stack: contextlib.ExitStack) -> Destination:
    if options.redis is not None:
        return RedisStream(options.redis, options.key)
    return JsonlFile(options.sink or Path(stack.enter_context(tempfile.TemporaryDirectory()), "events.jsonl"))


def _options() -> Options:
    parser = argparse.ArgumentParser(description="Publish each definition of a Python installation as an event.")
    parser.add_argument("file", nargs="?", help="publish the lines of this file instead, - for standard input")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--sink", type=Path, metavar="PATH", help="the file of JSON lines (default: a temporary one)")
    where.add_argument("--redis", metavar="URL", help="publish into a stream of this Redis instead of a file")
    parser.add_argument("--key", help="the stream's name (default: one that is deleted in the end)")
    parser.add_argument("--limit", type=_positive(int), default=sys.maxsize, metavar="N", help="stop after N events")
    parser.add_argument(
        "--retry-for",
        type=_positive(float),
        default=30.0,
        metavar="SECONDS",
        help="how long to try a sink that fails (default: 30)",
    )
    parser.add_argument(
        "--queue", type=_positive(int), default=50_000, metavar="N", help="events in memory at most (default: 50000)"
    )
    parser.add_argument("--loop", choices=("auto", "uvloop", "asyncio"), default="auto", help="(default: auto)")
    return parser.parse_args(namespace=Options())


def main() -> int:
    """Run the program and return its exit status."""
    options = _options()
    screen = Screen()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[screen])
    with contextlib.ExitStack() as stack:
        try:
            source = _source(options.file, stack)
            destination = _destination(options, stack)
            destination.refuse_used()
            publication = Publication(source, destination, options, screen)
            status, halt = _run(publication, options)
        except (OSError, ImportError, BgtasksError) as error:
            print(f"publish_definitions: {error}", file=sys.stderr)
            return 2
        finally:
            screen.finish()
        outcome = publication.outcome
        if outcome is None:
            return status
        try:
            contents = destination.read_back(outcome.run.published)
        except (OSError, BgtasksError) as error:
            print(f"publish_definitions: the sink cannot be read back: {error}", file=sys.stderr)
            return 1
        outcome = outcome._replace(halt=outcome.halt or halt)
        all_arrived = report(outcome, source, destination, contents)
    return status or (0 if all_arrived else 1)


def _run(publication: Publication, options: Options) -> tuple[int, str]:
    """Run it; return the exit status of the signal that ended it and the name of that, 0 and "" if none did."""
    try:
        bgtasks.run(
            publication.main,
            loop_factory=_loop_factory(options.loop),
            shutdown_deadline=SHUTDOWN_DEADLINE,
            default_shutdown_timeout=options.retry_for + DRAIN_MARGIN,
        )
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, "Ctrl-C"
    except SystemExit:
        return 128 + signal.SIGTERM, "SIGTERM"
    return 0, ""


if __name__ == "__main__":
    sys.exit(main())
