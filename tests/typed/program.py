"""What a type checker is to accept and to refuse of ``run`` and ``drain_on_signals``; never run."""

from __future__ import annotations

import asyncio
from typing import assert_type

from bgtasks import BackgroundTaskManager, drain_on_signals, run


async def main(manager: BackgroundTaskManager) -> int:
    """Return a status."""
    return manager.get_task_count()


async def without_manager() -> None:
    """Take no manager."""


def not_async(manager: BackgroundTaskManager) -> int:
    """Return no coroutine."""
    return manager.get_task_count()


def programs() -> None:
    """A function, the loop's options, and those of the manager."""
    assert_type(run(main), int)
    run(main, debug=True, loop_factory=asyncio.new_event_loop, drain_timeout=10, history=5)
    run(main(BackgroundTaskManager()))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    run(without_manager)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    run(not_async)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    run(main, True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    run(main, drain=10)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    run(main, history="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    run(main, loop_factory=asyncio.get_running_loop())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def signals(manager: BackgroundTaskManager) -> None:
    """The block knows whether signals are held back."""
    async with drain_on_signals(manager) as active:
        assert_type(active, bool)
    drain_on_signals()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    drain_on_signals(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with drain_on_signals(manager):  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass
