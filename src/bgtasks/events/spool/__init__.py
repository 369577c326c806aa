"""Store and forward: batches wait on the disk for a sink that is down, and survive their process.

``Publisher(sink, spool="PATH")`` makes a spool with the default options; make a ``Spool`` to choose others.
"""

from bgtasks.events.errors import SpoolError, SpoolFullError, SpoolLockedError
from bgtasks.events.info import SpoolOverflow, SpoolStats, SpoolSync
from bgtasks.events.spool._spool import Spool

__all__ = ["Spool", "SpoolError", "SpoolFullError", "SpoolLockedError", "SpoolOverflow", "SpoolStats", "SpoolSync"]
