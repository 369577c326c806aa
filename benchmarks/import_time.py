"""Compares what ``import bgtasks`` costs with what ``import asyncio, logging`` does, which it includes.

Each import runs in a fresh interpreter, in turns; what is printed is the median of the ratios. Run it with nothing else
on the machine::

    python benchmarks/import_time.py [--rounds 40]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

PROGRAM = "import time; begun = time.perf_counter(); import {}; print(time.perf_counter() - begun)"


def seconds(modules: str, cache: str) -> float:
    """Import the modules in a fresh interpreter and return how long that took there."""
    # With the bytecode cached, as an installed package has it, whatever this environment says.
    variables = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", PROGRAM.format(modules)]
    return float(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=variables).stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as cache:
        for modules in ("asyncio, logging", "bgtasks"):
            seconds(modules, cache)
        pairs = [(seconds("asyncio, logging", cache), seconds("bgtasks", cache)) for _ in range(rounds)]
    plain, ours = (statistics.median(column) * 1000 for column in zip(*pairs, strict=True))
    ratio = statistics.median(both[1] / both[0] for both in pairs)
    print(f"import asyncio, logging: {plain:.1f} ms; import bgtasks: {ours:.1f} ms")
    print(f"ratio, median of {rounds} rounds: {ratio:.2f}   (must: less than 1.3)")


if __name__ == "__main__":
    main()
