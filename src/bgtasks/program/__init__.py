"""Programs: run one with a manager, and have signals wait for its background tasks."""

from bgtasks.program._run import run
from bgtasks.program._signals import drain_on_signals

__all__ = ["drain_on_signals", "run"]
