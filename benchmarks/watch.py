"""What watching costs: how long a viewer stops a loop, and the throughput with a viewer at 1 Hz.

    python benchmarks/watch.py

The first figure is the number of tasks per second beside 10,000 waiting tasks, with and without a viewer. The second is
the longest pause of a loop with 200,000 tasks in flight while another process asks for them; the same loop without a
viewer stands beside it. The third is the processor time of a scrape of 1,000 names, by ``Collector.render`` and by a
registry.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, generate_latest

from bgtasks import BackgroundTaskManager
from bgtasks.watch.prometheus import Collector

VIEWER = """
import sys, time
from bgtasks.watch._viewer import ask_all
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    ask_all(int(sys.argv[1]), "tasks", limit=200)
    time.sleep(float(sys.argv[3]))
"""


def start_viewer(seconds: float, pause: float) -> subprocess.Popen[bytes]:
    """Start a process that looks at this one."""
    return subprocess.Popen([sys.executable, "-c", VIEWER, str(os.getpid()), str(seconds), str(pause)])


async def longest_pause(seconds: float) -> tuple[float, float]:
    """Return the median and the maximum of the lateness of a timer of a millisecond, in milliseconds."""
    late = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        before = time.monotonic()
        await asyncio.sleep(0.001)
        late.append((time.monotonic() - before - 0.001) * 1e3)
    return statistics.median(late), max(late)


async def throughput(manager: BackgroundTaskManager, seconds: float) -> float:
    """Return the number of short tasks per second."""
    count = 0
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        for _ in range(1000):
            manager.create_task(asyncio.sleep(0), name="short")
        count += 1000
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    return count / (time.monotonic() - begun)


async def scrapes() -> tuple[float, float]:
    """Return the milliseconds of a scrape of 1,000 names: rendered, and through a registry."""
    async with BackgroundTaskManager() as manager:
        for times in range(30):
            for name in range(1000):
                manager.create_task(asyncio.sleep(name * times % 37 / 37_000), name=f"name-{name}")
            await manager.wait_for_all()
        collector, registry = Collector(manager), CollectorRegistry()
        registry.register(collector)
        return median_time(collector.render), median_time(lambda: generate_latest(registry))


def median_time(function: Callable[[], object]) -> float:
    """Return the median of the processor time of a call in milliseconds."""
    times = []
    for _ in range(9):
        before = time.thread_time()
        function()
        times.append((time.thread_time() - before) * 1e3)
    return statistics.median(times)


async def main() -> None:
    """Print all figures."""
    rendered, registered = await scrapes()
    print(f"scrape of 1,000 names: rendered {rendered:.1f} ms, through a registry {registered:.0f} ms")
    forever = asyncio.Event()
    async with BackgroundTaskManager(watch=True, default_shutdown_timeout=60) as manager:
        for _ in range(10_000):
            manager.create_task(forever.wait(), name="waits")
        await asyncio.sleep(0.5)
        ratios = []
        for _ in range(5):
            without = await throughput(manager, 2)
            viewer = start_viewer(5, 1)
            # Until it has started: its start takes a processor, too.
            await asyncio.sleep(2)
            ratios.append(await throughput(manager, 2) / without)
            await asyncio.to_thread(viewer.wait)
        print(f"throughput with a viewer at 1 Hz over 10,000 tasks: {statistics.median(ratios):.3f} of without")
        for _ in range(190_000):
            manager.create_task(forever.wait(), name="waits")
        await asyncio.sleep(1)
        for text, seen in (("without", False), ("with", True), ("without", False), ("with", True)):
            viewer = start_viewer(4, 0.2) if seen else None
            median, longest = await longest_pause(4)
            if viewer is not None:
                await asyncio.to_thread(viewer.wait)
            print(f"200,000 tasks, {text} a viewer: a timer is late by {median:.2f} ms, at most {longest:.2f} ms")
        forever.set()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder
        asyncio.run(main())
