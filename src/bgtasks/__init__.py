"""Runs the work an asyncio program starts and does not wait for, and loses none of it."""

from bgtasks.errors import (
    BgtasksError,
    ExecutorClosedError,
    InvalidContextError,
    InvalidFunctionError,
    InvalidOptionError,
    InvalidProgramError,
    InvalidTimeoutError,
    ManagerClosedError,
    ManagerNotBoundError,
    MissingExtraError,
    NoManagerError,
    NoRunningLoopError,
    NotACoroutineError,
    NotPicklableError,
    RunningLoopError,
    TaskRejectedError,
    WorkerDiedError,
)
from bgtasks.executor import AsyncBackgroundExecutor, BackgroundExecutor
from bgtasks.info import FinishedTask, ManagerStats, NameStats, Outcome, ShutdownStats, TaskInfo
from bgtasks.manager import BackgroundTaskManager
from bgtasks.program import drain_on_signals, run
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
    "InvalidProgramError",
    "InvalidTimeoutError",
    "ManagerClosedError",
    "ManagerNotBoundError",
    "ManagerStats",
    "MissingExtraError",
    "NameStats",
    "NoManagerError",
    "NoRunningLoopError",
    "NotACoroutineError",
    "NotPicklableError",
    "Outcome",
    "RunningLoopError",
    "ShutdownStats",
    "TaskInfo",
    "TaskRejectedError",
    "WorkerDiedError",
    "drain_on_signals",
    "run",
]
__version__ = "0.1.0"
