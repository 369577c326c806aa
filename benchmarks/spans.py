"""What a task costs without traces, with OpenTelemetry's API alone, and with the SDK: microseconds, best of seven.

python benchmarks/spans.py
"""

from __future__ import annotations

import asyncio
import time

from opentelemetry.sdk.trace import TracerProvider

from bgtasks import BackgroundTaskManager
from bgtasks.watch.opentelemetry import trace

TASKS = 2000


async def work():
    """Return at once."""


async def measure(kind):
    """Return the microseconds of a task."""
    manager = BackgroundTaskManager()
    if kind == "SDK":
        trace(manager, tracer=TracerProvider(shutdown_on_exit=False).get_tracer("benchmark"))
    elif kind == "API":
        trace(manager)
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        for _ in range(TASKS):
            manager.create_task(work(), name="work")
        await manager.wait_for_all()
        times.append(time.perf_counter() - begun)
    await manager.shutdown()
    return min(times) / TASKS * 1e6


if __name__ == "__main__":
    for kind in ("none", "API", "SDK"):
        print(f"{kind:5} {asyncio.run(measure(kind)):6.2f} us")
