"""Watching: what runs, what is slow, what blocks the loop. Nothing of it is imported unless it is asked for."""

from bgtasks.watch._listener import listen, stop
from bgtasks.watch._page import Page, app

__all__ = ["Page", "app", "listen", "stop"]
