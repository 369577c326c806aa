"""Executors: run functions in the background of a ``with`` block, and shut them down cleanly at its end.

``AsyncBackgroundExecutor`` runs coroutine functions as tasks of the running loop, ``BackgroundExecutor`` runs plain
functions in threads, processes or interpreters. Both keep their records in a manager.
"""

from bgtasks.executor._async import AsyncBackgroundExecutor
from bgtasks.executor._call import BackgroundFuture
from bgtasks.executor._kinds import ExecutorKind
from bgtasks.executor._submit import AsyncSubmit, Submit
from bgtasks.executor._threads import BackgroundExecutor

__all__ = ["AsyncBackgroundExecutor", "AsyncSubmit", "BackgroundExecutor", "BackgroundFuture", "ExecutorKind", "Submit"]
