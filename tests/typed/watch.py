"""Uses of bgtasks.watch."""

from __future__ import annotations

from typing import assert_type

import bgtasks
from bgtasks import WatchError
from bgtasks.watch import listen, stop


def watching() -> None:
    """A process that answers viewers."""
    try:
        assert_type(listen(), None)  # type: ignore[func-returns-value]
    except WatchError as error:
        caught: RuntimeError = error
        print(caught)
    assert_type(stop(), None)  # type: ignore[func-returns-value]
    bgtasks.BackgroundTaskManager(watch=True)
    bgtasks.BackgroundTaskManager(watch="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
