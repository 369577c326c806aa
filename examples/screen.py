"""What a person sees while the main job runs: its progress, and log records."""

from __future__ import annotations

import logging
import sys
from typing import Final

__all__ = ["Screen"]

LOG_RECORDS_SHOWN: Final = 10


class Screen(logging.Handler):
    """Shows progress and log records on standard error; on a terminal the progress stays in one line.

    Records about single tasks are not shown: the job has some tasks fail and time out, and its report counts them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_terminal = sys.stderr.isatty()
        self.interval = 0.2 if self._is_terminal else 2.0
        self._width = 0
        self._records = 0

    def show_progress(self, text: str) -> None:
        """Show how far the program is, in place of what was shown before if that is possible."""
        if self._is_terminal:
            print(f"\r{text:<{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def wipe(self) -> None:
        """Take the progress off the terminal."""
        if self._width:
            print(f"\r{'':<{self._width}}\r", end="", file=sys.stderr, flush=True)
            self._width = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass records on that are not about one task."""
        return not getattr(record, "task_context", None)

    def emit(self, record: logging.LogRecord) -> None:
        """Show a log record, one of the first few."""
        self._records += 1
        if self._records > LOG_RECORDS_SHOWN:
            return
        self.wipe()
        print(f"{record.levelname.lower()}: {self.format(record)}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Remove the progress, and show the number of log records that were not shown."""
        self.wipe()
        if self._records > LOG_RECORDS_SHOWN:
            print(f"{self._records - LOG_RECORDS_SHOWN:,} more log records", file=sys.stderr)
