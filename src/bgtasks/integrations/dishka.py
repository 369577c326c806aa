"""A task manager from a dishka container.

::

    container = make_async_container(MyProvider(), TaskManagerProvider())
"""

from __future__ import annotations

from collections.abc import AsyncIterable
from typing import Unpack

from bgtasks._options import ManagerOptions
from bgtasks.integrations._extra import extra
from bgtasks.manager import BackgroundTaskManager
from bgtasks.program._draining import check_program_options, running

with extra("dishka", "dishka"):
    from dishka import BaseScope, Provider, Scope, provide

__all__ = ["TaskManagerProvider"]


class TaskManagerProvider(Provider):
    """Provides one ``BackgroundTaskManager`` for the scope APP, and shuts it down when the container is closed.

    dishka closes its objects in the reverse order of their creation: request the manager after the objects that its
    tasks use. At the end the manager refuses new work, drains, cancels, and names unfinished tasks in the log.

    Args:
        shutdown_deadline: seconds from the signal that ends the server to the end of the shutdown, the requests' time
            included; both timeouts are shortened in proportion. None for their sum.
        options: those of ``BackgroundTaskManager``; by default ``drain_timeout`` is 20 and
            ``default_shutdown_timeout`` 5.

    Raises:
        InvalidOptionError: an option has an invalid value.

    """

    scope: BaseScope | None = Scope.APP

    def __init__(self, *, shutdown_deadline: float | None = None, **options: Unpack[ManagerOptions]) -> None:
        super().__init__()
        check_program_options(options, shutdown_deadline)
        self._options = options
        self._deadline = shutdown_deadline

    @provide
    async def task_manager(self) -> AsyncIterable[BackgroundTaskManager]:
        """Provide the manager."""
        async with running(self._options, self._deadline) as ending:
            yield ending.manager
