"""Forks of the process: what has to be made anew in the child.

A lock that another thread of the parent holds at the fork stays locked in the child for ever, because that thread does
not exist there. Sockets, files and threads belong to the parent.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Protocol

__all__ = ["Forked", "at_fork", "follow_forks"]


class Forked(Protocol):
    """An object that begins anew in the child of a fork."""

    def after_fork(self) -> None:
        """Let go of what belongs to the parent; called in the child, where this is the only thread."""


# By id(): an object that compares by value has no hash. Nothing is kept alive here.
_followers: weakref.WeakValueDictionary[int, Forked] = weakref.WeakValueDictionary()


def follow_forks(follower: Forked) -> None:
    """Call ``follower.after_fork()`` in the child of every fork, for as long as something else refers to it."""
    _followers[id(follower)] = follower


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


def _after_fork_in_child() -> None:
    for follower in list(_followers.values()):
        follower.after_fork()


at_fork(in_child=_after_fork_in_child)
