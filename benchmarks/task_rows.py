"""Prints, as JSON, how fast create_task and fire of the imported bgtasks are against bare tasks.

``watching.py cost`` runs it on two states of the sources in turn, by ``PYTHONPATH``.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from compare import TIMEOUT, bare, creates, fires, loops, noop, race, tick

from bgtasks import IMPLEMENTATION, BackgroundTaskManager

BURST = 1000


def main(rounds: int) -> None:
    """Print the rows: the speed of the bare task is 1."""
    assert IMPLEMENTATION == "cython", "the compiled registry is measured"
    rows = {}
    for loop, run in loops().items():
        for work in (noop, tick):
            manager = BackgroundTaskManager()
            contenders: dict[str, Callable[..., Awaitable[float]]] = {
                "bare": bare,
                "create_task": creates(manager),
                f"create_task, name, timeout of {TIMEOUT:g} s, context": creates(manager, full=True),
                "fire, the same": fires(manager),
            }
            times: dict[str, list[float]] = {}

            async def measure(work: Any = work, contenders: Any = contenders, times: Any = times) -> None:
                times.update(await race(contenders, work, BURST, rounds))
                await asyncio.sleep(0)

            run(measure())
            medians = {name: statistics.median(each) for name, each in times.items()}
            for name in medians.keys() - {"bare"}:
                what = "suspends once" if work is tick else "trivial"
                rows[f"{name}; {loop}, {what}"] = medians["bare"] / medians[name]
    print(json.dumps(rows))


if __name__ == "__main__":
    main(int(sys.argv[1]))
