"""The integration with dishka, in a real container."""

import asyncio
from collections.abc import AsyncIterable

import pytest
from requirements import need
from work import forever

from bgtasks import BackgroundTaskManager, InvalidOptionError, ManagerClosedError

need("dishka")

from dishka import Provider, Scope, make_async_container, provide  # noqa: E402

from bgtasks.integrations.dishka import TaskManagerProvider  # noqa: E402


class Pool:
    """A resource that tasks use."""

    open = True


class Session:
    """A resource that lives as long as a request."""

    open = True


class Resources(Provider):
    """Provides a pool for the application and a session for a request."""

    @provide(scope=Scope.APP)
    async def pool(self) -> AsyncIterable[Pool]:
        """Give the pool."""
        pool = Pool()
        yield pool
        pool.open = False

    @provide(scope=Scope.REQUEST)
    async def session(self) -> AsyncIterable[Session]:
        """Give the session."""
        session = Session()
        yield session
        session.open = False


async def test_work_outlives_its_request_scope_and_ends_before_the_pool():
    """A task opens its own scope, runs on after that of the request, and ends before the pool closes."""
    container = make_async_container(Resources(), TaskManagerProvider())
    gate, seen = asyncio.Event(), []

    async def work(pool):
        await gate.wait()
        async with container() as scope:
            session = await scope.get(Session)
            seen.append((pool.open, session.open))
        seen.append((pool.open, session.open))

    async with container() as request:
        session = await request.get(Session)
        pool = await request.get(Pool)
        manager = await request.get(BackgroundTaskManager)
        manager.create_task(work(pool), name="work")
    assert (session.open, manager.get_task_count()) == (False, 1)
    asyncio.get_running_loop().call_soon(gate.set)
    await container.close()
    assert seen == [(True, True), (True, False)]
    assert not pool.open
    coro = forever()
    with pytest.raises(ManagerClosedError):
        manager.create_task(coro)


async def test_a_container_has_one_manager_and_options_reach_it(caplog):
    """Every scope gets the same manager; the log names tasks that did not finish in its time."""
    container = make_async_container(TaskManagerProvider(drain_timeout=0.0, max_pending_tasks=3))
    manager = await container.get(BackgroundTaskManager)
    async with container() as request:
        assert await request.get(BackgroundTaskManager) is manager
    assert manager._max_pending_tasks == 3
    manager.create_task(forever(), name="work")
    await container.close()
    assert "Shutdown cancelled 1 of 1 background task: work (1)" in caplog.text


def test_refuses_options_outside_their_values():
    """The error comes when the provider is made."""
    with pytest.raises(InvalidOptionError, match="drain_timeout"):
        TaskManagerProvider(drain_timeout=-1)
