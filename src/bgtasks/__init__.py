"""Runs the work an asyncio program starts and does not wait for, and loses none of it."""

from bgtasks.errors import (
    BgtasksError,
    InvalidContextError,
    InvalidOptionError,
    InvalidTimeoutError,
    ManagerClosedError,
    NoRunningLoopError,
    NotACoroutineError,
    TaskRejectedError,
)
from bgtasks.info import FinishedTask, ManagerStats, NameStats, Outcome, ShutdownStats, TaskInfo
from bgtasks.manager import BackgroundTaskManager
from bgtasks.registry import IMPLEMENTATION

__all__ = [
    "IMPLEMENTATION",
    "BackgroundTaskManager",
    "BgtasksError",
    "FinishedTask",
    "InvalidContextError",
    "InvalidOptionError",
    "InvalidTimeoutError",
    "ManagerClosedError",
    "ManagerStats",
    "NameStats",
    "NoRunningLoopError",
    "NotACoroutineError",
    "Outcome",
    "ShutdownStats",
    "TaskInfo",
    "TaskRejectedError",
]
__version__ = "0.1.0"
