"""Runs a background task for every line of Python's own source, and publishes it as an event.

::

    python examples/main_job.py                   # the first 400,000 lines of the Python that runs it
    python examples/main_job.py access.log        # each line of a file; - for standard input
    python examples/main_job.py --redis redis://localhost:6379

Each line gets a task with a name, a timeout and a context. Some of the tasks fail, and some hang until their timeout.
Each line is then published as an event, into a file of JSON lines or, with ``--redis``, into a stream. At the end the
sink is read back and compared with what was published. Exit status: 0 if all tasks ended as they had to and every event
arrived, 1 if not, 2 for bad arguments, 130 after Ctrl-C and 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import math
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Final

from job import TIMEOUT, Job, Source
from lines import Lines
from report import Outcome, report
from screen import Screen
from sinks import Destination, JsonlFile, RedisStream
from source_lines import SourceLines

import bgtasks
from bgtasks import BackgroundTaskManager
from bgtasks.errors import BgtasksError
from bgtasks.events import Publisher

LINES_OF_SOURCE: Final = 400_000
# Seconds for what is left to write when a sink recovers at the last moment.
DRAIN_MARGIN: Final = 5.0


class Options(argparse.Namespace):
    """The arguments of the program."""

    file: str | None
    sink: Path | None
    redis: str | None
    key: str | None
    limit: int | None
    retry_for: float
    queue: int
    loop: str


async def run(
    source: Source,
    destination: Destination,
    options: Options,
    screen: Screen,
    outcome: Outcome,
    manager: BackgroundTaskManager,
) -> None:
    """Work until the source ends, an event is lost or a signal comes; leave what came of it in ``outcome``.

    Raises:
        OSError, BgtasksError: the sink cannot be opened.

    """
    publisher = Publisher(
        destination.make_sink(),
        max_events=options.queue,
        overflow="block",
        retry_for=options.retry_for,
        name="publisher",
        # It shows the publisher's task, and its shutdown flushes and closes the publisher.
        manager=manager,
        connect=True,
    )
    job = Job(manager, publisher, options.limit or sys.maxsize)
    outcome.loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    progress = None
    try:
        await publisher.start()
        outcome.job = job
        progress = asyncio.create_task(_show_progress(job, publisher, screen))
        await job.run(source)
        # The tasks that hang.
        await manager.wait_for_all(return_exceptions=True)
    except OSError as error:
        if progress is None:
            raise
        outcome.halt = f"the source cannot be read to its end: {error}"
    finally:
        if progress is not None:
            progress.cancel()
        await publisher.close(options.retry_for + DRAIN_MARGIN)
        outcome.tasks, outcome.events = manager.stats(), publisher.stats()
        if outcome.events["dropped"]:
            outcome.halt = f"an event did not arrive: {outcome.events['last_error']}"


async def _show_progress(job: Job, publisher: Publisher, screen: Screen) -> None:
    """Show again and again how far a job is, until cancelled."""
    while True:
        await asyncio.sleep(screen.interval)
        stats = publisher.stats()
        tasks = job.counts["create_task"] + job.counts["fire"]
        screen.show_progress(
            f"{tasks:,} tasks, {job.rate('create_task', 'fire'):,.0f}/s  "
            f"{stats['delivered']:,} published, {job.rate('events'):,.0f}/s  {stats['queue_events']:,} in the queue"
        )


def _loop_factory(choice: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the loop; None leaves it to ``bgtasks.run``, which takes uvloop's where it is installed."""
    if choice == "uvloop":
        import uvloop

        factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
        return factory
    return asyncio.new_event_loop if choice == "asyncio" else None


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        number = kind(text)
        if not 0 < number < math.inf:
            raise ValueError
        return number

    convert.__name__ = "positive number"
    return convert


def _source(options: Options, stack: contextlib.ExitStack) -> Source:
    if options.file is None:
        options.limit = options.limit or LINES_OF_SOURCE
        return SourceLines(Path(sysconfig.get_path("stdlib")))
    return Lines(stack.enter_context(FileIO(0, closefd=False) if options.file == "-" else FileIO(options.file)))


def _destination(options: Options, stack: contextlib.ExitStack) -> Destination:
    if options.redis is not None:
        return RedisStream(options.redis, options.key)
    return JsonlFile(options.sink or Path(stack.enter_context(tempfile.TemporaryDirectory()), "events.jsonl"))


def _options() -> Options:
    parser = argparse.ArgumentParser(description="Run a task for each line of Python's source, and publish it.")
    parser.add_argument("file", nargs="?", help="take the lines of this file instead, - for standard input")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--sink", type=Path, metavar="PATH", help="the file of JSON lines (default: a temporary one)")
    where.add_argument("--redis", metavar="URL", help="publish into a stream of this Redis instead of a file")
    parser.add_argument("--key", help="the stream's name (default: one that is deleted in the end)")
    parser.add_argument(
        "--limit",
        type=_positive(int),
        metavar="N",
        help="stop after N lines (default: 400000, all of a file)",
    )
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


def _run_to_its_end(source: Source, destination: Destination, options: Options, screen: Screen) -> tuple[Outcome, int]:
    """Run the program; return its outcome, and the exit status of the signal that ended it or 0."""
    outcome = Outcome()
    status = 0
    try:
        bgtasks.run(
            functools.partial(run, source, destination, options, screen, outcome),
            loop_factory=_loop_factory(options.loop),
            drain_timeout=2 * TIMEOUT,
            default_shutdown_timeout=options.retry_for + DRAIN_MARGIN,
        )
    except KeyboardInterrupt:
        outcome.halt, status = "Ctrl-C", 130
    except SystemExit as end:
        outcome.halt, status = "SIGTERM", int(end.code or 0)
    return outcome, status


def main() -> int:
    """Run the program and return its exit status."""
    options = _options()
    screen = Screen()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[screen])
    with contextlib.ExitStack() as stack:
        try:
            source = _source(options, stack)
            destination = _destination(options, stack)
            destination.refuse_used()
            outcome, status = _run_to_its_end(source, destination, options, screen)
        except (OSError, ImportError, BgtasksError) as error:
            print(f"main_job: {error}", file=sys.stderr)
            return 2
        finally:
            screen.finish()
        if outcome.job is None:
            return status
        try:
            contents = destination.read_back(outcome.job.published)
        except (OSError, BgtasksError) as error:
            print(f"main_job: the sink cannot be read back: {error}", file=sys.stderr)
            return 1
        is_right = report(outcome, outcome.job, source, destination, contents)
    return status or (0 if is_right else 1)


if __name__ == "__main__":
    sys.exit(main())
