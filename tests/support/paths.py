"""The paths of the repository's parts."""

from __future__ import annotations

from pathlib import Path

import bgtasks

SUPPORT = Path(__file__).resolve().parent
TESTS = SUPPORT.parent
ROOT = TESTS.parent
EXAMPLES = ROOT / "examples"
# The tested package, which may be an installed one.
PACKAGE = Path(bgtasks.__file__).resolve().parent
