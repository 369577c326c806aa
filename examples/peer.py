"""A service that tasks ask, and what came of the tasks that asked it."""

from __future__ import annotations

import asyncio
from typing import Final

__all__ = ["Peer", "RefusedError"]

# Which of all calls fail, and which never come back. Not at a multiple, so that none is both.
REFUSES_ONE_IN: Final = 1_000
SILENT_ONE_IN: Final = 5_000


class RefusedError(Exception):
    """The service does not want this one."""


class Peer:
    """Takes the place of a service on the network: it answers a turn of the loop later, or refuses, or is silent."""

    def __init__(self) -> None:
        # Calls that ended by themselves, and those of them that failed; calls without an answer.
        self.ended = 0
        self.refused = 0
        self.silent = 0

    async def ask(self, number: int, name: str) -> None:
        """Ask about an event; ``number`` decides what comes of it, and with 0 it always works.

        Raises:
            RefusedError: for one number in a thousand.

        """
        if number % SILENT_ONE_IN == SILENT_ONE_IN - 1:
            self.silent += 1
            self.ended += 1
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        self.ended += 1
        if number % REFUSES_ONE_IN == REFUSES_ONE_IN // 2:
            self.refused += 1
            raise RefusedError(name)

    async def wait_until_ended(self, count: int) -> None:
        """Wait until ``count`` calls have been answered, refused or left without an answer."""
        # An asyncio.Event would cost each call something, and their cost is measured.
        while self.ended < count:  # noqa: ASYNC110
            await asyncio.sleep(0)
