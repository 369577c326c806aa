"""What a type checker is to accept and to refuse of the web frameworks' integrations; never run."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import assert_type

from aiohttp import web
from dishka import make_async_container
from fastapi import FastAPI
from litestar import Litestar
from litestar.datastructures import State
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request

from bgtasks import BackgroundTaskManager
from bgtasks.integrations import aiohttp, dishka, fastapi, litestar, starlette
from bgtasks.integrations.aiohttp import TASK_MANAGER, cleanup_context
from bgtasks.integrations.dishka import TaskManagerProvider
from bgtasks.integrations.fastapi import BackgroundTasksDep, TaskManagerDep


@contextlib.asynccontextmanager
async def inner(app: Starlette) -> AsyncGenerator[dict[str, int], None]:
    """Be an application's own lifespan."""
    yield {"answer": len(app.routes)}


@contextlib.asynccontextmanager
async def of_fastapi(app: FastAPI) -> AsyncGenerator[None, None]:
    """Be one of FastAPI's."""
    print(app.title)
    yield


async def generator(app: Starlette) -> AsyncIterator[None]:
    """Be none, for want of the decorator."""
    print(app)
    yield


def of_starlette(connection: HTTPConnection, request: Request) -> None:
    """A lifespan, alone or around another one, with the manager's options."""
    Starlette(lifespan=starlette.lifespan())
    Starlette(lifespan=starlette.lifespan(inner, drain_timeout=5, history=10))
    assert_type(starlette.task_manager(connection), BackgroundTaskManager)
    assert_type(starlette.task_manager(request), BackgroundTaskManager)
    starlette.lifespan(inner, 5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    starlette.lifespan(drain=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    starlette.lifespan(history="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    starlette.lifespan(generator)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    starlette.task_manager("/")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


app = FastAPI(lifespan=fastapi.lifespan(of_fastapi, max_pending_tasks=None))


@app.post("/orders")
async def endpoint(tasks: TaskManagerDep) -> None:
    """Get the manager by its annotation."""
    assert_type(tasks, BackgroundTaskManager)


def of_fastapi_alone(request: Request) -> None:
    """What FastAPI's module has of Starlette's."""
    assert_type(fastapi.task_manager(request), BackgroundTaskManager)
    fastapi.lifespan(overflow="drop_oldest")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    tasks: TaskManagerDep = 5  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    print(tasks)


def of_aiohttp(application: web.Application, request: web.Request) -> None:
    """A cleanup context, and the manager by its key."""
    application.cleanup_ctx.append(cleanup_context(drain_timeout=5))
    assert_type(application[TASK_MANAGER], BackgroundTaskManager)
    assert_type(aiohttp.task_manager(request), BackgroundTaskManager)
    cleanup_context(5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    cleanup_context(drain=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    aiohttp.task_manager(application)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def of_litestar(state: State) -> None:
    """A lifespan and a dependency."""
    Litestar(lifespan=[litestar.lifespan(drain_timeout=5)])
    assert_type(litestar.task_manager(state), BackgroundTaskManager)
    litestar.lifespan(5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    litestar.lifespan(history="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    litestar.task_manager({})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def of_dishka() -> None:
    """A provider with the manager's options."""
    container = make_async_container(TaskManagerProvider(drain_timeout=5), dishka.TaskManagerProvider())
    assert_type(await container.get(BackgroundTaskManager), BackgroundTaskManager)
    TaskManagerProvider(5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    TaskManagerProvider(histroy=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    TaskManagerProvider(history="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def tasks_of_a_response(request: Request, dependency: BackgroundTasksDep) -> None:
    """Run background tasks of Starlette and FastAPI on a manager."""
    starlette.install(manager=BackgroundTaskManager(), wait=True)
    starlette.uninstall()
    fastapi.install()
    fastapi.uninstall()
    tasks = starlette.BackgroundTasks(starlette.task_manager(request))
    tasks.add_task(print, "hello")
    dependency.add_task(print, "hello")
    assert_type(starlette.background_tasks(request, tasks), starlette.BackgroundTasks)
    starlette.install(manager="manager")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
