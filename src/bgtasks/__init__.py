"""Runs the work an asyncio program starts and does not wait for, and loses none of it."""

from bgtasks.errors import (
    BgtasksError,
    ExecutorClosedError,
    InvalidContextError,
    InvalidFunctionError,
    InvalidOptionError,
    InvalidTimeoutError,
    ManagerClosedError,
    ManagerNotBoundError,
    MissingExtraError,
    NoRunningLoopError,
    NotACoroutineError,
    NotPicklableError,
    TaskRejectedError,
    WorkerDiedError,
)
from bgtasks.executor import AsyncBackgroundExecutor, BackgroundExecutor
from bgtasks.info import FinishedTask, ManagerStats, NameStats, Outcome, ShutdownStats, TaskInfo
from bgtasks.manager import BackgroundTaskManager
from bgtasks.registry import IMPLEMENTATION

__all__ = [
    "IMPLEMENTATION",
    "AsyncBackgroundExecutor",
    "BackgroundExecutor",
    "BackgroundTaskManager",
    "BgtasksError",
    "ExecutorClosedError",
    "FinishedTask",
    "InvalidContextError",
    "InvalidFunctionError",
    "InvalidOptionError",
    "InvalidTimeoutError",
    "ManagerClosedError",
    "ManagerNotBoundError",
    "ManagerStats",
    "MissingExtraError",
    "NameStats",
    "NoRunningLoopError",
    "NotACoroutineError",
    "NotPicklableError",
    "Outcome",
    "ShutdownStats",
    "TaskInfo",
    "TaskRejectedError",
    "WorkerDiedError",
]
__version__ = "0.1.0"
