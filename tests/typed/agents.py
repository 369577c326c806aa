"""What a type checker is to accept and to refuse of the agent frameworks' integrations; never run."""

from __future__ import annotations

import asyncio
from typing import Any, assert_type

from bgtasks import BackgroundFuture, BackgroundTaskManager
from bgtasks.events import BasePublisher, Publisher
from bgtasks.events.sinks.memory import MemorySink
from bgtasks.integrations import agentflow, langgraph
from bgtasks.integrations.agentflow import Framework
from bgtasks.integrations.langgraph import AsyncBackgroundExecutor, BackgroundExecutor


def area(width: int) -> float:
    """Return a float."""
    return float(width)


async def fetch(url: str) -> bytes:
    """Return bytes."""
    return url.encode()


def of_agentflow(publisher: BasePublisher, framework: Framework) -> None:
    """The frameworks have two names."""
    agentflow.install()
    agentflow.install("agentflow", "tenxgraph", drain_timeout=5)
    agentflow.install(framework)
    agentflow.uninstall("agentflow")
    assert_type(agentflow.publisher(publisher, framework), Any)
    agentflow.publisher(Publisher(MemorySink()))
    agentflow.install("langgraph")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    agentflow.install(drain_timeout="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    agentflow.uninstall("langgraph")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    agentflow.publisher(MemorySink())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    agentflow.publisher(publisher, "langgraph")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def of_langgraph(manager: BackgroundTaskManager) -> None:
    """LangGraph's executors are ours by default, or with a manager of the program."""
    langgraph.install()
    langgraph.install(manager=manager)
    langgraph.uninstall()
    langgraph.install(manager)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    langgraph.install(manager=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    langgraph.uninstall(5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def executors(manager: BackgroundTaskManager) -> None:
    """They are made with a config, and typed as those that they derive from."""
    with BackgroundExecutor({"max_concurrency": 0, "tags": []}, manager=manager) as submit:
        assert_type(submit(area, 1), BackgroundFuture[float])
        submit(area)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    assert_type(BackgroundExecutor({}).submit(area, 1, __name__="area"), BackgroundFuture[float])
    async with AsyncBackgroundExecutor({}) as submit_async:
        assert_type(submit_async(fetch, "a"), asyncio.Task[bytes])
        submit_async(area, 1)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    BackgroundExecutor()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    AsyncBackgroundExecutor({}, max_concurrency=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
