"""Renews ``python.inv``: which page of Python's documentation has what this documentation refers to.

::

    python docs/_inventories/update.py [OBJECTS.INV]

The argument is a file or an address, https://docs.python.org/3/objects.inv by default. Of the names in it those of the
modules below are kept. The build reads the result and nothing from the network, so it does the same everywhere.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from urllib.request import urlopen

SOURCE = "https://docs.python.org/3/objects.inv"
RESULT = Path(__file__).with_name("python.inv")
HEADER_LINES = 4
MODULES = {
    "asyncio",
    "collections",
    "concurrent",
    "contextlib",
    "contextvars",
    "dataclasses",
    "datetime",
    "logging",
    "os",
    "pathlib",
    "pickle",
    "signal",
    "sqlite3",
    "threading",
    "time",
    "types",
    "typing",
}


def is_kept(line: str) -> bool:
    """Say whether a line of an inventory names something of these modules, or a builtin."""
    name, role, *_ = line.split(maxsplit=2)
    module, dot, _ = name.partition(".")
    return role.startswith("py:") and (module in MODULES or (not dot and role != "py:module"))


def main() -> None:
    """Read an inventory and write the part of it that is kept."""
    source = sys.argv[1] if len(sys.argv) > 1 else SOURCE
    if "://" in source:
        with urlopen(source, timeout=30) as response:
            content = response.read()
    else:
        content = Path(source).read_bytes()
    *header, body = content.split(b"\n", HEADER_LINES)
    lines = [line for line in zlib.decompress(body).decode().splitlines() if is_kept(line)]
    kept = zlib.compress("".join(f"{line}\n" for line in sorted(lines)).encode(), 9)
    RESULT.write_bytes(b"".join(line + b"\n" for line in header) + kept)
    print(f"{len(lines)} names in {RESULT}, {RESULT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
