"""A task manager from a dishka container.

::

    container = make_async_container(MyProvider(), TaskManagerProvider())
"""

from __future__ import annotations

from collections.abc import AsyncIterable
from typing import Unpack

from bgtasks._options import ManagerOptions, check_options
from bgtasks.integrations._extra import extra
from bgtasks.manager import BackgroundTaskManager
from bgtasks.program._draining import running

with extra("dishka", "dishka"):
    from dishka import Provider, Scope, provide

__all__ = ["TaskManagerProvider"]


class TaskManagerProvider(Provider):
    """Provides one ``BackgroundTaskManager`` for the scope APP, and ends it when the container is closed.

    dishka closes what it made in the reverse order: ask the container for the manager after what its tasks use. At the
    end the manager refuses new work, drains, cancels, and names in the log what did not finish.

    Args:
        options: those of ``BackgroundTaskManager``; by default ``drain_timeout`` is 20 and
            ``default_shutdown_timeout`` 5.

    Raises:
        InvalidOptionError: an option is outside its values.

    """

    scope = Scope.APP

    def __init__(self, **options: Unpack[ManagerOptions]) -> None:
        super().__init__()
        check_options(options)
        self._options = options

    @provide
    async def task_manager(self) -> AsyncIterable[BackgroundTaskManager]:
        """Give the manager."""
        async with running(self._options) as manager:
            yield manager
