"""Forks of the process: objects that the child has to renew.

A lock that another thread of the parent holds at the fork stays locked in the child forever, because that thread does
not exist there. Sockets, files and threads belong to the parent.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from typing import Any, Final, TypeVar

from bgtasks._locks import Lock
from bgtasks._weak_calls import WeakCalls

__all__ = ["ForkLock", "at_fork", "follow_forks"]

_T = TypeVar("_T")

# Seconds that a fork waits for all locks together. A lock that is held for longer is held in a call that hangs.
LONGEST_WAIT: Final = 0.25

_followers: WeakCalls[Callable[[Any], object]] = WeakCalls()


def follow_forks(owner: _T, after_fork: Callable[[_T], object]) -> None:
    """Call ``after_fork(owner)`` in the child of every fork, for as long as something else refers to ``owner``.

    The call is made in the child's only thread.
    """
    _followers.add(owner, after_fork)


def at_fork(
    *,
    before: Callable[[], object] | None = None,
    in_parent: Callable[[], object] | None = None,
    in_child: Callable[[], object] | None = None,
) -> None:
    """Call functions before and after every fork of this process; do nothing on systems that do not fork."""
    if hasattr(os, "register_at_fork"):
        functions = {"before": before, "after_in_parent": in_parent, "after_in_child": in_child}
        os.register_at_fork(**{when: function for when, function in functions.items() if function is not None})


class ForkLock:
    """Has a ``lock`` that a fork waits for, so that no child inherits a change that is half done.

    The fork waits a quarter of a second. If a thread hangs with the lock, in a call of a dead disk, the child inherits
    what that thread uses; its owner must not touch that in ``after_fork``.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        with _locks_guard:
            _locks.add(self)

    def renew(self) -> None:
        """Make a new lock, in the child of a fork."""
        self.lock = Lock()


_locks: weakref.WeakSet[ForkLock] = weakref.WeakSet()
_locks_guard = Lock()
# The locks that the current fork holds.
_held: list[ForkLock] = []


def _before_fork() -> None:
    _locks_guard.acquire()
    end = time.monotonic() + LONGEST_WAIT
    _held.extend(lock for lock in list(_locks) if lock.lock.acquire(timeout=max(end - time.monotonic(), 0.0)))


def _after_fork_in_parent() -> None:
    for lock in _held:
        lock.lock.release()
    _held.clear()
    _locks_guard.release()


def _after_fork_in_child() -> None:
    global _locks_guard
    _locks_guard = Lock()
    for lock in list(_locks):
        lock.renew()
    _held.clear()
    for owner, after_fork in _followers.living():
        after_fork(owner)


at_fork(before=_before_fork, in_parent=_after_fork_in_parent, in_child=_after_fork_in_child)
