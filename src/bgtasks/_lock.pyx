# cython: language_level=3, binding=True, freethreading_compatible=True
"""The compiled ``Lock`` of ``_locks.py``."""

import threading


cdef class Lock:
    """A re-entrant lock to use in ``with``, as ``threading.RLock``, whose end needs no memory."""

    # Methods of one lock. They neither need memory nor let a signal be handled on the way back to here.
    cdef object _acquire
    cdef object _release

    def __cinit__(self):
        lock = threading.RLock()
        self._acquire = lock.acquire
        self._release = lock.release

    def __enter__(self):
        """Acquire the lock."""
        self._acquire()

    def __exit__(self, kind, error, traceback):
        """Release the lock."""
        self._release()

    def acquire(self, blocking=True, timeout=-1):
        """Acquire the lock within ``timeout`` seconds, -1 for no end, and return whether that was done."""
        return self._acquire(blocking, timeout)

    def release(self):
        """Release the lock."""
        self._release()
