"""Publishes every definition of a Python installation as an event, with a background task for each.

::

    python examples/publish_definitions.py                  # each def and class of the Python that runs it
    python examples/publish_definitions.py access.log       # each line of a file; - for standard input

A task is done when its event is committed in the sink, an SQLite file. At the end the sink is read back and compared
with what was published. Exit status: 0 if every event arrived, 1 if not, 2 for bad arguments, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import importlib
import importlib.util
import logging
import math
import platform
import sys
import sysconfig
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import BrokenExecutor
from io import FileIO
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from definitions import Definitions, Event
from lines import Lines
from sqlite_sink import Contents, SinkError, SqliteSink, checksum_of, read_back

from bgtasks import IMPLEMENTATION, BackgroundTaskManager, ManagerStats

# So many tasks are started before the loop gets its turn: a few milliseconds.
TASKS_AT_ONCE: Final = 500
# A task may end at its timeout at the latest, and needs a moment to hear of it.
DRAIN_MARGIN: Final = 1.0
LOG_RECORDS_SHOWN: Final = 10
GAPS_SHOWN: Final = 10


class Options(argparse.Namespace):
    """The arguments of the program."""

    file: str | None
    sink: Path | None
    limit: int
    timeout: float
    in_flight: int
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
        """Show a log record, one of the first few: a broken sink fails every task in flight."""
        self._records += 1
        if self._records > LOG_RECORDS_SHOWN:
            return
        error = record.exc_info[1] if record.exc_info else None
        # A SinkError says it all in its text, the same for thousands of tasks; anything else is a bug to be traced.
        text = record.getMessage() if isinstance(error, SinkError) else self.format(record)
        self.wipe()
        print(f"{record.levelname.lower()}: {text}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Leave standard error in order, with the number of log records that were not shown."""
        self.wipe()
        if self._records > LOG_RECORDS_SHOWN:
            print(f"{self._records - LOG_RECORDS_SHOWN:,} more log records", file=sys.stderr)


class Publisher:
    """Publishes events, numbered from 1 in their order, until one of them does not arrive."""

    def __init__(self, manager: BackgroundTaskManager, sink: SqliteSink, options: Options) -> None:
        self._manager = manager
        self._sink = sink
        self._options = options
        self.started = 0
        self.confirmed = 0
        self.checksum = 0
        self.source_seconds = 0.0
        self.room_seconds = 0.0
        self.has_failed = False

    async def publish_all(self, source: Source) -> None:
        """Start a task for each event of a source, as fast as the cap on tasks in flight allows.

        Raises:
            OSError: the source cannot be read any further.
            BrokenExecutor: a process that reads for the source died.

        """
        async with contextlib.aclosing(source.read()) as batches:
            while (events := await self._next(batches)) is not None:
                for start in range(0, len(events), TASKS_AT_ONCE):
                    await self._start(events[start : start + TASKS_AT_ONCE])
                    await asyncio.sleep(0)
                    if self.has_failed or self.started == self._options.limit:
                        return

    async def _next(self, batches: AsyncGenerator[list[Event], None]) -> list[Event] | None:
        asked = time.perf_counter()
        try:
            return await anext(batches, None)
        finally:
            self.source_seconds += time.perf_counter() - asked

    async def _start(self, events: list[Event]) -> None:
        """Start the tasks of some events, each as soon as there is room for it."""
        manager = self._manager
        timeout = self._options.timeout
        for event in events[: self._options.limit - self.started]:
            number = self.started + 1
            name = _task_name(event.kind)
            context = {"event": number, "name": event.name}
            task = self._publish(number, event)
            if manager.get_task_count() < self._options.in_flight:
                manager.fire(task, name=name, timeout=timeout, context=context)
            else:
                asked = time.perf_counter()
                await manager.spawn(task, name=name, timeout=timeout, context=context)
                self.room_seconds += time.perf_counter() - asked
            self.started = number

    async def _publish(self, number: int, event: Event) -> None:
        try:
            await self._sink.append((number, *event, time.time()))
        except BaseException:
            # A timeout comes as a cancellation.
            self.has_failed = True
            raise
        self.confirmed += 1
        self.checksum += checksum_of(number, event.payload)


@functools.cache
def _task_name(kind: str) -> str:
    return f"publish_{kind}"


class Outcome(NamedTuple):
    """How a publication went; ``halt`` says what ended it before its source did, "" if nothing."""

    publisher: Publisher
    stats: ManagerStats
    seconds: float
    loop: str
    halt: str
    was_interrupted: bool


async def publish(source: Source, path: Path, options: Options, screen: Screen) -> Outcome:
    """Publish the events of a source into a sink until the source ends, an event is lost or Ctrl-C comes.

    Raises:
        SinkError: the sink cannot be opened.

    """
    sink = SqliteSink(path)
    manager = BackgroundTaskManager(max_pending_tasks=options.in_flight, drain_timeout=options.timeout + DRAIN_MARGIN)
    publisher = Publisher(manager, sink, options)
    halt = ""
    was_interrupted = False
    begun = time.perf_counter()
    progress = asyncio.create_task(_show_progress(publisher, manager, screen))
    try:
        await publisher.publish_all(source)
        await manager.shutdown()
    except asyncio.CancelledError:
        # The first Ctrl-C cancels this coroutine, a second one stops the loop.
        was_interrupted = True
        halt = "Ctrl-C"
    except (OSError, BrokenExecutor) as error:
        halt = f"the source cannot be read to its end: {error}"
    finally:
        await manager.shutdown()
        progress.cancel()
        await sink.close()
    if publisher.has_failed and not halt:
        halt = "an event did not arrive"
    seconds = time.perf_counter() - begun
    loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    return Outcome(publisher, manager.stats(), seconds, loop, halt, was_interrupted)


async def _show_progress(publisher: Publisher, manager: BackgroundTaskManager, screen: Screen) -> None:
    """Show again and again how far a publisher is, until cancelled."""
    confirmed = 0
    shown_at = time.perf_counter()
    while True:
        await asyncio.sleep(screen.interval)
        now = time.perf_counter()
        rate = (publisher.confirmed - confirmed) / (now - shown_at)
        confirmed, shown_at = publisher.confirmed, now
        screen.show_progress(f"{confirmed:,} published  {rate:,.0f} tasks/s  {manager.get_task_count():,} in flight")


def report(outcome: Outcome, source: Source, contents: Contents) -> bool:
    """Print how a publication went; return whether every event arrived."""
    publisher, stats, seconds = outcome.publisher, outcome.stats, outcome.seconds
    lost = sum(last - first + 1 for first, last in contents.gaps)
    found = publisher.started - lost
    misfortunes = {
        "failed": stats["failed"],
        "timed out": stats["timed_out"],
        "cancelled": stats["cancelled"],
        "dropped": stats["dropped"],
        "never ended": stats["in_flight"],
    }
    python = f"{platform.python_implementation()} {platform.python_version()}"
    print(f"source     {publisher.started:,} {source}")
    print(f"ran on     {outcome.loop}, {python}, {IMPLEMENTATION} registry")
    print(f"published  {publisher.confirmed:,} in {seconds:.2f} s: {publisher.confirmed / seconds:,.0f} tasks/s")
    print(f"waited     {publisher.source_seconds:.2f} s for the source, {publisher.room_seconds:.2f} s for room")
    print(f"tasks      {', '.join(f'{count:,} {what}' for what, count in misfortunes.items())}")
    for name, of_name in sorted(stats["names"].items()):
        p50, p99 = _milliseconds(of_name["p50_seconds"]), _milliseconds(of_name["p99_seconds"])
        print(f"latency    {name:<24} {of_name['started']:>11,} tasks, p50 {p50:>9}, p99 {p99:>9}")
    print(f"checksum   {publisher.checksum:x} published, {contents.checksum:x} read back")
    if outcome.halt:
        print(f"stopped    {outcome.halt}")
    if lost:
        print(f"missing    {_ranges(contents.gaps)}")
    if found > publisher.confirmed:
        print(
            f"unheard    {found - publisher.confirmed:,} events arrived, but their tasks ended before they heard of it"
        )
    if contents.unexpected:
        print(f"unknown    {contents.unexpected:,} events that were never published")
    print(
        f"sink: {found:,} of {publisher.started:,} events found, {_count(lost)} lost, {_count(contents.repeated)} twice"
    )
    is_sink_right = not (lost or contents.repeated or contents.unexpected) and publisher.checksum == contents.checksum
    return is_sink_right and not any(misfortunes.values()) and not outcome.halt


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:,.2f} ms"


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


def _options() -> Options:
    parser = argparse.ArgumentParser(description="Publish each definition of a Python installation as an event.")
    parser.add_argument("file", nargs="?", help="publish the lines of this file instead, - for standard input")
    parser.add_argument("--sink", type=Path, metavar="PATH", help="the SQLite file (default: a temporary one)")
    parser.add_argument("--limit", type=_positive(int), default=sys.maxsize, metavar="N", help="stop after N events")
    parser.add_argument(
        "--timeout", type=_positive(float), default=30.0, metavar="SECONDS", help="of each task (default: 30)"
    )
    parser.add_argument(
        "--in-flight", type=_positive(int), default=10_000, metavar="N", help="tasks at once at most (default: 10000)"
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
            path = options.sink or Path(stack.enter_context(tempfile.TemporaryDirectory()), "events.db")
            runner = stack.enter_context(asyncio.Runner(loop_factory=_loop_factory(options.loop)))
            outcome = runner.run(publish(source, path, options, screen))
        except (OSError, ImportError, SinkError) as error:
            print(f"publish_definitions: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
        finally:
            screen.finish()
        try:
            contents = read_back(path, outcome.publisher.started)
        except SinkError as error:
            print(f"publish_definitions: the sink cannot be read back: {error}", file=sys.stderr)
            return 1
        all_arrived = report(outcome, source, contents)
    return 130 if outcome.was_interrupted else 0 if all_arrived else 1


if __name__ == "__main__":
    sys.exit(main())
