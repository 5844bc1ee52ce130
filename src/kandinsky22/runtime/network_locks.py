"""Locks of networks that threads share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kandinsky22.errors import DeadlockError
from kandinsky22.kernels.locks import MutualWaitError, ObjectLock


@contextlib.contextmanager
def holding(lock: ObjectLock) -> Iterator[None]:
    """Return a context manager inside of which this thread holds a lock of networks.

    Args:
        lock: The lock.

    Raises:
        DeadlockError: If the thread that holds the lock waits for this one.
    """
    try:
        lock.acquire()
    except MutualWaitError as error:
        raise DeadlockError(
            "two threads wait for each other: each uses offloaded networks and, within that call, as in a callback, "
            "those of the other thread; use them after the call, or in one thread"
        ) from error
    try:
        yield
    finally:
        lock.release()
