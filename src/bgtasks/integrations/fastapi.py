"""A task manager for a FastAPI application, passed to the path operations that ask for it.

::

    app = FastAPI(lifespan=lifespan(my_lifespan))

    @app.post("/orders")
    async def order(tasks: TaskManagerDep):
        tasks.create_task(send_mail(), name="send_mail")

The lifespan is Starlette's: see ``bgtasks.integrations.starlette``.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from bgtasks.integrations._extra import extra
from bgtasks.manager import BackgroundTaskManager

with extra("fastapi", "FastAPI"):
    from fastapi import Depends

from bgtasks.integrations.starlette import (
    BackgroundTasks,
    background_tasks,
    install,
    lifespan,
    task_manager,
    uninstall,
)

__all__ = [
    "BackgroundTasks",
    "BackgroundTasksDep",
    "TaskManagerDep",
    "install",
    "lifespan",
    "task_manager",
    "uninstall",
]

TaskManagerDep: TypeAlias = Annotated[BackgroundTaskManager, Depends(task_manager)]
BackgroundTasksDep: TypeAlias = Annotated[BackgroundTasks, Depends(background_tasks)]
