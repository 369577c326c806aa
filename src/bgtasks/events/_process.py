"""What becomes of publishers when the process forks or ends."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import weakref
from typing import Final, Protocol

from bgtasks.errors import text_of

__all__ = ["follow"]

logger = logging.getLogger("bgtasks.events")

# What emptying all queues may take at the interpreter's exit, in seconds.
EXIT_TIMEOUT: Final = 1.0


class Follower(Protocol):
    """What outlives neither a fork nor the process."""

    def after_fork(self) -> None:
        """Begin anew: events, sockets and threads belong to the parent."""

    def has_left(self) -> bool:
        """Say whether events would be lost now."""

    async def close(self, deadline: float) -> object:
        """Save what can be saved."""


_followers: weakref.WeakSet[Follower] = weakref.WeakSet()


def follow(follower: Follower) -> None:
    """Tell ``follower`` of a fork, and close it at exit if it has something left."""
    _followers.add(follower)


def _after_fork() -> None:
    for follower in list(_followers):
        follower.after_fork()


def _at_exit() -> None:
    left = [follower for follower in list(_followers) if follower.has_left()]
    if not left:
        return

    async def close_all() -> None:
        await asyncio.gather(*(follower.close(EXIT_TIMEOUT) for follower in left))

    try:
        asyncio.run(close_all())
    except Exception as error:
        logger.warning("Events were lost at exit: %s", text_of(error))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
