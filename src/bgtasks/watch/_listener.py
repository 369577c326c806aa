"""The socket of a watched process: one thread that answers one request after another.

It answers while a loop is blocked. The folder lets only the user in; the uid of each peer is checked, too.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import logging
import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Final

from bgtasks._fork import at_fork
from bgtasks._locks import Lock
from bgtasks.errors import WatchError, text_of
from bgtasks.watch._answers import VERSION, answer, encoded
from bgtasks.watch._folder import socket_of

__all__ = ["listen", "stop"]

logger: Final = logging.getLogger("bgtasks.watch")

# Seconds that a peer may take for its request, and for reading the answer.
PATIENCE: Final = 2.0
LONGEST_REQUEST: Final = 65536
# Errors of accept() that pass: no descriptor or no memory is left, or the viewer has gone.
PASSING: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED, errno.EINTR)
# Seconds until the next try after a viewer could not be let in.
PAUSE: Final = 0.2


class _Listener:
    def __init__(self) -> None:
        self.path: Path = socket_of(os.getpid())
        # Under another name until it listens: a socket that refuses viewers is one of a process that was killed.
        early = self.path.with_suffix(".new")
        early.unlink(missing_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.bind(str(early))
            early.chmod(0o600)
            self.socket.listen(8)
            early.replace(self.path)
        except OSError as error:
            self.socket.close()
            raise WatchError(f"cannot listen on {self.path}: {error}; set XDG_RUNTIME_DIR to a short path") from error
        self._is_closed = False
        self.thread = threading.Thread(target=self._serve, name="bgtasks-watch", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Stop listening and remove the socket."""
        self._is_closed = True
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            # Wakes the thread, which close() alone would not.
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join(PATIENCE)

    def _serve(self) -> None:
        is_reported = False
        while not self._is_closed:
            try:
                connection, _ = self.socket.accept()
            except OSError as error:
                if self._is_closed:
                    return
                if error.errno not in PASSING:
                    # The program closed the descriptor, and its number may soon be that of another socket: not to be
                    # closed here.
                    self.socket.detach()
                    logger.warning("This process cannot be looked at any more: %s", error)
                    return
                if not is_reported:
                    logger.warning("Viewers have to wait until they can be let in: %s", error)
                is_reported = True
                time.sleep(PAUSE)
                continue
            is_reported = False
            # A peer that is gone, or too slow, does not end the thread.
            with connection, contextlib.suppress(OSError):
                self._serve_one(connection)

    def _serve_one(self, connection: socket.socket) -> None:
        if not _is_own(connection):
            return
        connection.settimeout(PATIENCE)
        with connection.makefile("rb") as lines:
            line = lines.readline(LONGEST_REQUEST)
        if line:
            connection.sendall(_answer(line))


def _is_own(connection: socket.socket) -> bool:
    if not hasattr(socket, "SO_PEERCRED"):
        # The folder alone keeps others out.
        return True
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return bool(uid == os.getuid())


def _answer(line: bytes) -> bytes:
    try:
        request = json.loads(line)
        if not isinstance(request, dict):
            raise WatchError("a request is a JSON object in one line")
        return encoded(answer(request))
    except (WatchError, ValueError, TypeError) as error:
        return _refusal(str(error))
    except Exception as error:
        logger.exception("The request of a viewer failed")
        return _refusal(f"the watched process failed: {text_of(error)}")


def _refusal(text: str) -> bytes:
    return encoded({"version": VERSION, "error": text})


_listener: _Listener | None = None
_lock = Lock()


def listen() -> None:
    """Have this process answer viewers, until it ends; its forks listen on sockets of their own.

    Raises:
        WatchError: there is no safe place for the socket.

    """
    global _listener
    if sys.platform == "win32":
        raise WatchError("watch=True needs Unix sockets with the uid of their peers, which Windows does not have")
    with _lock:
        if _listener is None:
            _listener = _Listener()


def stop() -> None:
    """Stop answering viewers; do nothing if the process does not."""
    global _listener
    with _lock:
        if _listener is not None:
            _listener.close()
            _listener = None


def _begin_anew() -> None:
    """Listen on a socket of its own in the child of a fork; that of the parent stays open there."""
    global _listener, _lock
    _lock = Lock()
    if _listener is not None:
        _listener.socket.close()
        _listener = None
        try:
            listen()
        except (WatchError, OSError):
            logger.exception("The child of a fork cannot be watched")


at_fork(in_child=_begin_anew)
atexit.register(stop)
