"""Measures what watching costs: nothing while nobody looks, and little while somebody does.

Medians are printed beside the goals (``must``). Run it with nothing else on the machine::

    python benchmarks/watching.py                    # everything
    python benchmarks/watching.py scrape frame       # some parts: cost, viewer, pause, scrape, frame, memory
    python benchmarks/watching.py cost --before DIR  # against the sources in DIR, instead of those before watching

``cost`` has the rows of create_task and fire against those of the sources before watching, which it takes out of git
and builds. ``viewer`` is the throughput beside 10,000 waiting tasks while somebody looks once a second. ``pause`` is
how long a look stops a loop with 200,000 tasks. Each part runs in a process of its own. It ends with status 1 if a goal
was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

from asgi import TOKEN, Client
from prometheus_client import CollectorRegistry, generate_latest

import bgtasks.watch
from bgtasks import BackgroundTaskManager
from bgtasks.watch import Page
from bgtasks.watch._page_frames import Query, make_frame
from bgtasks.watch._page_source import ManagerSource
from bgtasks.watch._viewer import ask_all
from bgtasks.watch.prometheus import Collector, render

ROOT = Path(__file__).resolve().parent.parent
# The first commit that measured waits added this file.
FIRST_FILE = "src/bgtasks/_origin.py"
# What bgtasks top asks, in a process of its own. It waits for seconds of work of the watched process, which are shorter
# than those of the clock if the machine has other work.
VIEWER = """
import sys, time
from bgtasks.watch._viewer import ask_all
pid, pause = int(sys.argv[1]), float(sys.argv[2])
def used():
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) * 1e-9
while True:
    begun = used()
    ask_all(pid, "tasks", limit=200)
    ask_all(pid, "names")
    while used() < begun + pause:
        time.sleep(0.01)
"""

# Of processor time, for each throughput.
SECONDS = 3.0

missed: list[str] = []


def say(what: str, value: float, unit: str, must: float | None = None, at_least: bool = False) -> None:
    """Print a figure and its goal."""
    line = f"{what:<72} {value:>9,.3f} {unit}"
    if must is not None:
        good = value >= must if at_least else value <= must
        line += f"   must {'>=' if at_least else '<='} {must:g}   {'MET' if good else 'MISSED'}"
        if not good:
            missed.append(what)
    print(line, flush=True)


@contextmanager
def looking(pause: float) -> Iterator[None]:
    """Have another process look at this one."""
    viewer = subprocess.Popen([sys.executable, "-c", VIEWER, str(os.getpid()), str(pause)])
    try:
        yield
    finally:
        viewer.kill()
        viewer.wait()


async def fill(manager: BackgroundTaskManager, count: int) -> None:
    """Have a number of tasks wait."""
    forever = asyncio.Event()
    for number in range(count):
        manager.create_task(forever.wait(), name=f"import_customer_orders_{number % 40}", timeout=7200)
        if number % 1000 == 0:
            await asyncio.sleep(0)
    await asyncio.sleep(0.1)


# -- nobody looks ------------------------------------------------------------------------------------------------------


def find_before() -> str:
    """Return the revision before the first commit of watching."""
    command = ["git", "log", "--diff-filter=A", "--format=%H", "--", FIRST_FILE]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not found:
        sys.exit("there is no history of git: pass --before DIR, a folder with the sources of before, built in place")
    return f"{found[-1]}^"


def build_before(folder: Path) -> Path:
    """Build the sources before watching; return the folder to import them from."""
    sources, target = folder / "sources", folder / "built"
    sources.mkdir()
    archive = subprocess.run(["git", "archive", find_before()], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "--extract", "--directory", str(sources)], input=archive, check=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(sources)]
    subprocess.run(command, env={**os.environ, "BGTASKS_BUILD": "require"}, check=True)
    return target


def rows_of(folder: Path) -> dict[str, float]:
    """Return the rows of the sources in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "BGTASKS_IMPLEMENTATION": "cython"}
    command = [sys.executable, str(ROOT / "benchmarks" / "task_rows.py"), "21"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return rows


def measure_cost(before: Path | None, rounds: int) -> None:
    """Print the rows of create_task and fire, against those of before."""
    with tempfile.TemporaryDirectory() as folder:
        old = build_before(Path(folder)) if before is None else before / "src"
        new = Path(bgtasks.__file__).parent.parent
        found: dict[Path, list[dict[str, float]]] = {old: [], new: []}
        for number in range(rounds):
            for each in (old, new) if number % 2 else (new, old):
                found[each].append(rows_of(each))
    for row in sorted(found[old][0]):
        speeds = {each: statistics.median(rows[row] for rows in found[each]) for each in found}
        say(f"{row}, against before", speeds[new] / speeds[old], "times as fast", 0.985, at_least=True)


# -- somebody looks ----------------------------------------------------------------------------------------------------


async def short() -> None:
    """Suspend once."""
    await asyncio.sleep(0)


async def throughput(manager: BackgroundTaskManager, seconds: float) -> float:
    """Return the number of short tasks in a second of this process's processor time, all threads together."""
    count = 0
    begun = time.process_time()
    while time.process_time() - begun < seconds:
        for number in range(200):
            manager.create_task(short(), name=f"short_{number % 20}")
        count += 200
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    return count / (time.process_time() - begun)


async def throughput_with_page(manager: BackgroundTaskManager, page: Page) -> tuple[float, int]:
    """Return the throughput while somebody looks at the page, and how many frames there were."""
    frames = 0

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        async def count(message: Any) -> None:
            nonlocal frames
            frames += message["type"] == "http.response.body"
            await send(message)

        await page(scope, receive, count)

    stream = asyncio.ensure_future(Client(counted, authorization=f"Bearer {TOKEN}").get("/stream"))
    # Its options and the first frame.
    while frames < 2:
        await asyncio.sleep(0.01)
    found = await throughput(manager, SECONDS)
    stream.cancel()
    await asyncio.wait([stream])
    return found, max(frames - 2, 1)


async def compare_throughput(rounds: int) -> None:
    """Print the throughput with a viewer in the terminal, and with one of the page."""
    async with BackgroundTaskManager(watch=True) as watched:
        await fill(watched, 10_000)
        page = bgtasks.watch.app(watched, token=TOKEN)
        await throughput(watched, 1)
        ratios: dict[str, list[float]] = {"bgtasks top": [], "the page": []}
        for _ in range(rounds):
            first = await throughput(watched, SECONDS)
            with looking(1):
                # Until it has started: its start takes a processor, too.
                await asyncio.sleep(1)
                top = await throughput(watched, SECONDS)
            second = await throughput(watched, SECONDS)
            with_page, frames = await throughput_with_page(watched, page)
            third = await throughput(watched, SECONDS)
            ratios["bgtasks top"].append(top * 2 / (first + second))
            # On a machine with other work, there is more than a frame in a second of processor time.
            slower = (second + third) / 2 / with_page - 1
            ratios["the page"].append(1 / (1 + slower * SECONDS / frames))
        page.close()
        for viewer, each in ratios.items():
            what = f"throughput with {viewer} at 1 Hz over 10,000 tasks"
            say(what, statistics.median(each), "of without", 0.95, at_least=True)
        await watched.cancel_all()


async def longest_pause(seconds: float) -> float:
    """Return the greatest lateness of a timer of a millisecond, in milliseconds."""
    longest = 0.0
    end = time.monotonic() + seconds
    while (before := time.monotonic()) < end:
        await asyncio.sleep(0.001)
        longest = max(longest, time.monotonic() - before - 0.001)
    return longest * 1e3


async def measure_pause(rounds: int) -> None:
    """Print how long a loop with 200,000 tasks is stopped while another process looks at it all the time."""
    async with BackgroundTaskManager(watch=True, default_shutdown_timeout=60) as manager:
        await fill(manager, 200_000)
        pauses: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            pauses[False].append(await longest_pause(1))
            with looking(0):
                await asyncio.sleep(1)
                pauses[True].append(await longest_pause(1))
        alone, looked_at = statistics.median(pauses[False]), statistics.median(pauses[True])
        say("longest pause of a loop with 200,000 tasks in a second, nobody looks", alone, "ms")
        say("the same while bgtasks top looks all the time", looked_at, "ms")
        say("so a look stops the loop for", max(looked_at - alone, 0), "ms", 5)
        await manager.cancel_all()


# -- sizes -------------------------------------------------------------------------------------------------------------


def median_time(function: Callable[[], object], rounds: int) -> float:
    """Return the median of the processor time of a call in milliseconds."""
    times = []
    for _ in range(rounds):
        before = time.thread_time()
        function()
        times.append((time.thread_time() - before) * 1e3)
    return statistics.median(times)


async def run_names(manager: BackgroundTaskManager) -> None:
    """Have 1,000 names, each with 30 tasks of different durations."""
    for times in range(30):
        for name in range(1000):
            manager.create_task(asyncio.sleep(name * times % 37 / 37_000), name=f"name-{name}")
        await manager.wait_for_all()


async def measure_scrape(rounds: int) -> None:
    """Print the time of a scrape of 1,000 names, as the docs advise it, by a page of metrics."""
    async with BackgroundTaskManager() as manager:
        await run_names(manager)
        collector, registry = Collector(manager), CollectorRegistry()
        registry.register(collector)
        rendered = median_time(lambda: render(collector, registry=None), rounds * 3)
        say("scrape of 1,000 names, metrics_app and render", rendered, "ms", 20)
        say("scrape of 1,000 names, a registry", median_time(lambda: generate_latest(registry), rounds), "ms")


async def measure_frame(rounds: int) -> None:
    """Print the size of a frame of the page with many names, and the time that it takes."""
    async with BackgroundTaskManager() as manager:
        await run_names(manager)
        for number in range(10_000):
            name = f"import the orders of the customer {number} out of the archive of the year before last"
            manager.create_task(asyncio.sleep(3600), name=name, timeout=7200, context={"customer": number})
        await asyncio.sleep(0)
        source = ManagerSource(manager, ("customer",))
        frame = make_frame(source, Query())
        say("frame of the page, 10,000 tasks, 1,000 names", len(frame) / 1000, "kB", 50)
        say("time for a frame", median_time(lambda: make_frame(source, Query()), rounds), "ms")
        await manager.cancel_all()


def resident() -> float:
    """Return the size of this process in memory, in megabytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


async def measure_memory(rounds: int) -> None:
    """Print what an hour of watching, by all ways at 1 Hz, adds to the memory of the process."""
    async with BackgroundTaskManager() as manager:
        await fill(manager, 1000)
        collector = Collector(manager)
        before = resident()
        sizes = []
        bgtasks.watch.listen()
        manager.watch_loop()
        source = ManagerSource(manager, ())
        for number in range(3600):
            manager.create_task(short(), name=f"short_{number % 50}")
            make_frame(source, Query())
            if number % 15 == 0:
                render(collector, registry=None)
                await asyncio.to_thread(ask_all, os.getpid(), "tasks", limit=200)
            await asyncio.sleep(0)
            sizes.append(resident())
        say("memory of watching, after 3,600 frames", sizes[-1] - before, "MB", 5)
        # The allocator has what it needs by then.
        say("growth of the memory from the 600th frame to the last", max(sizes[600:]) - sizes[600], "MB", 1)
        await manager.cancel_all()


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "cost": lambda given: measure_cost(given.before, 3 * given.rounds),
    "viewer": lambda given: asyncio.run(compare_throughput(given.rounds)),
    "pause": lambda given: asyncio.run(measure_pause(given.rounds)),
    "scrape": lambda given: asyncio.run(measure_scrape(given.rounds)),
    "frame": lambda given: asyncio.run(measure_frame(given.rounds)),
    "memory": lambda given: asyncio.run(measure_memory(given.rounds)),
}


def run_each(parts: Sequence[str], given: argparse.Namespace) -> int:
    """Run each part in a process of its own; return the exit status."""
    options = ["--rounds", str(given.rounds), *(["--before", str(given.before)] if given.before else [])]
    begun = time.monotonic()
    status = max([subprocess.call([sys.executable, __file__, part, *options]) for part in parts])
    print(f"took {time.monotonic() - begun:.0f} s")
    return status


def main() -> int:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}; all by default")
    parser.add_argument("--before", type=Path, help="a folder with the sources of before, built in place")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of each part (8)")
    given = parser.parse_args()
    unknown = set(given.parts) - PARTS.keys()
    if unknown:
        parser.error(f"unknown part: {', '.join(sorted(unknown))}")
    # A frame per turn of the loop, instead of one per second in a thread, blocks it.
    logging.getLogger("bgtasks.watch").setLevel(logging.ERROR)
    parts = given.parts or list(PARTS)
    if len(parts) == 1:
        with tempfile.TemporaryDirectory() as folder:
            # Sockets of its own: a viewer would also look at other programs.
            os.environ["XDG_RUNTIME_DIR"] = folder
            PARTS[parts[0]](given)
            bgtasks.watch.stop()
        return 1 if missed else 0
    print(f"CPython {platform.python_version()}, {bgtasks.IMPLEMENTATION} registry", flush=True)
    return run_each(parts, given)


if __name__ == "__main__":
    sys.exit(main())
