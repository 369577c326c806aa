"""Events whose outcome a coroutine waits for, in ``publish(event, durable=True)``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["DurableEvent", "Receipt", "as_bytes", "set_outcomes"]


class Receipt:
    """The outcome of one event: None until it is known, then as in ``EventQueue.account``, or ``"lost"``."""

    __slots__ = ("_on_progress", "outcome")

    def __init__(self, on_progress: Callable[[], None]) -> None:
        self._on_progress = on_progress
        self.outcome: str | None = None

    def set_lost(self) -> None:
        """Note that the event is gone, and wake the coroutine that waits; from any thread."""
        if self.outcome is None:
            self.outcome = "lost"
            self._on_progress()


class DurableEvent(bytes):
    """An encoded event with its receipt, on its way from ``publish`` to the outcome; sinks get plain bytes.

    If it is destroyed without an outcome, it was dropped: by a queue with ``drop_oldest``, for example.
    """

    # None if there was no memory for it.
    receipt: Receipt | None = None

    @classmethod
    def of(cls, payload: bytes, receipt: Receipt) -> DurableEvent:
        """Return the event; the caller must not keep it."""
        event = cls(payload)
        event.receipt = receipt
        return event

    def __del__(self) -> None:
        """Note that the event is gone."""
        if self.receipt is not None:
            self.receipt.set_lost()


def set_outcomes(payloads: Sequence[Any], outcome: str) -> None:
    """Note the outcome of those payloads that are waited for; the first outcome of an event stays."""
    for payload in payloads:
        if type(payload) is DurableEvent and payload.receipt is not None and payload.receipt.outcome is None:
            payload.receipt.outcome = outcome


def as_bytes(payloads: Sequence[Any]) -> list[Any]:
    """Return payloads with plain bytes in place of the events that are waited for."""
    return [bytes(payload) if type(payload) is DurableEvent else payload for payload in payloads]
