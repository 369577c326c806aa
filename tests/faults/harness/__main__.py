"""Runs the matrix and prints its table; the exit status is 1 if an event was lost, or counters do not add up.

scripts/test_faults calls it. Without arguments every fault meets every sink.
"""

from __future__ import annotations

import argparse
import platform
import random
import sys
import tempfile
import time
from pathlib import Path

from harness.matrix import FAULTS, SHORT, NotAllowedError, applies, row_of_table, run_row
from harness.targets import TARGETS

HEAD = """\
| fault | sink | accepted | lost | counted as dropped | refused | doubled | reordered | next delivery after |
|---|---|---|---|---|---|---|---|---|"""


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="scripts/test_faults", description=__doc__)
    parser.add_argument("--sinks", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--short", action="store_true", help="only the rows that every change is tested with")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="rows drawn by chance, until the time is over")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of what is drawn by chance")
    return parser.parse_args()


def rows(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return sink and fault of the rows."""
    chosen = SHORT if options.short else [(sink, fault) for fault in FAULTS for sink in TARGETS]
    return [(s, f) for s, f in chosen if s in options.sinks and f in options.faults and applies(s, f)]


def run_and_print(sink: str, fault: str, seed: int) -> bool:
    """Run a row and print it; return whether it is as promised."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            verdict = run_row(Path(folder), sink, fault, seed=seed)
        except NotAllowedError as skipped:
            print(f"| {fault} | {sink} | skipped: {skipped} |", flush=True)
            return True
    print(row_of_table(sink, fault, verdict), flush=True)
    return not verdict.lost and not verdict.wrong and not (verdict.doubled and TARGETS[sink].knows_ids)


def main() -> int:
    """Run the rows, and return the exit status."""
    options = parse()
    chance = random.Random(options.seed)
    print(f"Python {platform.python_version()}, seed {options.seed}\n\n{HEAD}", flush=True)
    failed = []
    deadline = None if options.soak is None else time.monotonic() + options.soak
    chosen = rows(options)
    while chosen:
        if deadline is None:
            sink, fault = chosen.pop(0)
        elif time.monotonic() > deadline:
            break
        else:
            sink, fault = chance.choice(chosen)
        seed = chance.randrange(1 << 30)
        if not run_and_print(sink, fault, seed):
            failed.append(f"{sink} {fault} (seed {seed})")
    for row in failed:
        print(f"FAILED: {row}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
