"""What a type checker is to accept and to refuse of managers that are injected; never run."""

from __future__ import annotations

from typing import assert_type

from injectq import InjectQ

from bgtasks import BackgroundTaskManager
from bgtasks.events import BasePublisher
from bgtasks.injection import Inject, bind, inject, lookup


@inject
async def order(goods: str, task_manager: BackgroundTaskManager) -> int:
    """Take a manager that callers leave out."""
    return len(goods) + task_manager.get_task_count()


@inject(container=InjectQ())
def count(task_manager: BackgroundTaskManager) -> int:
    """Take a manager of one container."""
    return task_manager.get_task_count()


def gift(goods: str, task_manager: BackgroundTaskManager = Inject[BackgroundTaskManager]) -> int:
    """Have a default value that stands for a manager."""
    return len(goods) + task_manager.get_task_count()


def wrong(goods: str = Inject[BackgroundTaskManager]) -> None:  # type: ignore[assignment]  # pyright: ignore[reportArgumentType]
    """Have a default value that stands for something else."""


async def calls() -> None:
    """Arguments may be left out; the result keeps its type."""
    assert_type(await order("tea"), int)
    assert_type(count(), int)
    assert_type(gift("tea"), int)
    gift()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    inject(5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    inject(container=5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


async def containers(container: InjectQ, manager: BackgroundTaskManager) -> None:
    """A manager is bound, and looked up by its class."""
    assert_type(bind(), BackgroundTaskManager)
    assert_type(bind(container, manager), BackgroundTaskManager)
    async with bind() as entered:
        assert_type(entered, BackgroundTaskManager)
    assert_type(lookup(BackgroundTaskManager, optional=False), BackgroundTaskManager)
    assert_type(lookup(BackgroundTaskManager, optional=True), BackgroundTaskManager | None)
    bind(manager)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    lookup(BackgroundTaskManager, True)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    lookup("manager", optional=True)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]


def publish(publisher: BasePublisher) -> BasePublisher:
    """Ask for a publisher by its base class."""
    return publisher
