"""Watching: what runs, what is slow, what blocks the loop. Nothing of it is imported unless it is asked for."""

from bgtasks.watch._listener import listen, stop
from bgtasks.watch._page import Page, app
from bgtasks.watch._page_access import Auth

__all__ = ["Auth", "Page", "app", "listen", "stop"]
