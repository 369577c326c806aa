"""Has commits reach the disk within half a second, beside the thread that makes them."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Final

from bgtasks._locks import Lock, Signal

try:
    import fcntl
except ImportError:
    FULL_SYNC = None
else:
    # On macOS fsync leaves the data in the cache of the drive.
    FULL_SYNC = getattr(fcntl, "F_FULLFSYNC", None)

__all__ = ["SYNC_SECONDS", "Syncer", "sync_directory"]

# The maximum number of seconds between a commit and the sync that covers it, beside the duration of the sync itself.
SYNC_SECONDS: Final = 0.5


class Syncer:
    """Syncs the logs of files in a thread, which starts at a commit and ends when there was none for a while.

    A commit neither waits for the disk nor is delayed by a sync under way: no lock is held meanwhile.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Begin without a thread, in the child of a fork too."""
        self._lock = Lock()
        self._stopping = Signal()
        # The files with commits that are not on the disk yet.
        self._logs: set[Path] = set()
        self._is_running = False
        self._error: OSError | None = None

    def mark(self, log: Path) -> None:
        """Sync a log within the interval, after a commit.

        Raises:
            OSError: an earlier sync failed. It is raised once.

        """
        if log in self._logs and self._is_running:
            return
        with self._lock:
            self._logs.add(log)
            if not self._is_running:
                self._stopping.clear()
                self._is_running = True
                try:
                    threading.Thread(target=self._work, name="spool sync", daemon=True).start()
                except RuntimeError:
                    # At the interpreter's exit no thread starts any more.
                    self._is_running = False
                    self._sync({log})

    def raise_failure(self) -> None:
        """Raise the error of a sync that failed, once.

        Raises:
            OSError: what was committed before may not be on the disk.

        """
        error, self._error = self._error, None
        if error is not None:
            raise error

    def stop(self) -> None:
        """End the thread without a wait for it."""
        self._stopping.set()

    def _work(self) -> None:
        try:
            while logs := self._next_logs():
                self._sync(logs)
        except BaseException:
            # The next commit starts another thread.
            self._is_running = False
            raise

    def _next_logs(self) -> set[Path]:
        """Return the logs to sync at the end of the interval; none if the thread is to end."""
        if self._stopping.wait(SYNC_SECONDS):
            # No further wait until the thread has ended.
            self._stopping.set()
        with self._lock:
            # Replaced before the sync: a commit during the sync needs the next one.
            logs, self._logs = self._logs, set()
            self._is_running = bool(logs)
        return logs

    def _sync(self, logs: set[Path]) -> None:
        for log in logs:
            try:
                # SQLite has locks on the file, which would end with a second descriptor, and none on its log.
                _sync(log, os.O_RDWR)
            except FileNotFoundError:
                # The file was drained or closed, which synced it.
                continue
            except OSError as error:
                self._error = error


def sync_directory(directory: Path) -> None:
    """Have the name of a new file reach the disk; do nothing on systems that cannot sync a directory."""
    with contextlib.suppress(OSError):
        _sync(directory, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        if FULL_SYNC is None:
            os.fsync(descriptor)
        else:
            fcntl.fcntl(descriptor, FULL_SYNC)
    finally:
        os.close(descriptor)
