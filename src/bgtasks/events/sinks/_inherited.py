"""Clients from before a fork: the child must neither use nor close them."""

from __future__ import annotations

import ctypes

__all__ = ["keep_inherited"]


def keep_inherited(client: object) -> None:
    """Keep a client that the parent of a fork made, or that belongs to a closed loop, from ever being collected.

    Collecting it would close its sockets: a TLS connection would then end the parent's session, a transport would leave
    the epoll set of its loop, which a forked process shares with its parent, and librdkafka would wait for threads that
    do not exist in the child. A list would be emptied at the interpreter's exit, so the reference is leaked.
    """
    if client is not None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(client))
