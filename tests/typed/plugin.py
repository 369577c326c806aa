"""What a type checker is to accept and to refuse of a test with the fixture of the pytest plugin; never run."""

from __future__ import annotations

import asyncio
from typing import assert_type

import pytest

from bgtasks import BackgroundTaskManager


async def work() -> int:
    """Return a number."""
    return 5


@pytest.mark.bgtasks_leaks("warn")
@pytest.mark.bgtasks_failures(2, name="work")
async def with_the_fixture(task_manager: BackgroundTaskManager) -> None:
    """The fixture gives a manager."""
    assert_type(task_manager.create_task(work()), asyncio.Task[int])
    task_manager.create_task(work)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
