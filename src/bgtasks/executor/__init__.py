"""Executors: run functions in the background inside a ``with`` block, and end them in good order at its end.

``AsyncBackgroundExecutor`` runs coroutine functions as tasks of the running loop, ``BackgroundExecutor`` runs plain
functions in threads, processes or interpreters. Both keep their books in a manager.
"""

from bgtasks.executor._async import AsyncBackgroundExecutor
from bgtasks.executor._threads import BackgroundExecutor

__all__ = ["AsyncBackgroundExecutor", "BackgroundExecutor"]
