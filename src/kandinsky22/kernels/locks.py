"""Locks that survive what plain locks do not: copies, pickles, and a fork while another thread holds them."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any

_numbers = itertools.count()


class ObjectLock:
    """Reentrant lock of one object, as an attribute of it.

    A copy or a pickle of the object gets a lock of its own. In a forked process the lock is free, because the thread
    that held it does not exist there.

    Attributes:
        number: Counts all locks. Threads that need several take them in this order, so that none waits for another.
    """

    def __init__(self) -> None:
        self._lock, self.number = threading.RLock(), next(_numbers)
        _locks.add(self)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Acquire the lock.

        Args:
            blocking: Whether to wait while another thread holds the lock.
            timeout: Longest wait in seconds; -1 for no limit.

        Returns:
            Whether the lock was acquired.
        """
        return self._lock.acquire(blocking, timeout)

    def release(self) -> None:
        """Release the lock, which this thread holds."""
        self._lock.release()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectLock, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> ObjectLock:
        return ObjectLock()

    def __copy__(self) -> ObjectLock:
        return ObjectLock()


_locks: weakref.WeakSet[ObjectLock] = weakref.WeakSet()

GLOBAL_RNG = ObjectLock()
"""Held while torch's global generator is saved and restored, and while a call draws from it.

Otherwise a call would draw numbers again that another thread drew between saving and restoring.
"""


@contextlib.contextmanager
def global_rng_restored() -> Iterator[None]:
    """Return a context manager after which torch's global generator of the CPU is in the state that it had before."""
    import torch  # the locks alone serve the command before it needs torch

    with GLOBAL_RNG, torch.random.fork_rng(devices=()):
        yield


def _free_in_child() -> None:
    for lock in list(_locks):
        lock._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_in_child)
