"""Watching: what runs, what is slow, what blocks the loop. Nothing of it is imported unless it is asked for."""

from bgtasks.watch._listener import listen, stop

__all__ = ["listen", "stop"]
