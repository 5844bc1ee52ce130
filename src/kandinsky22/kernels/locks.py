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

CHECK_SECONDS = 1.0  # between two looks whether threads wait for each other

_numbers = itertools.count()


class MutualWaitError(RuntimeError):
    """Threads wait for each other. One of them fails, so that the others go on."""


class _Waits:
    """Registry of the locks that threads wait for without a timeout, by thread."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.mutex = threading.Lock()
        self.locks: dict[int, ObjectLock] = {}


_waits = _Waits()


class ObjectLock:
    """Reentrant lock of one object, as an attribute of it.

    A copy or a pickle of the object gets a lock of its own. In a forked process the lock is free, because the thread
    that held it does not exist there.

    Attributes:
        number: Counts all locks. Threads that need several take them in this order, so that none waits for another.
    """

    def __init__(self) -> None:
        self._lock, self.number = threading.RLock(), next(_numbers)
        self._owner: int | None = None  # the thread that holds the lock, `_depth` times
        self._depth = 0
        _locks.add(self)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Acquire the lock.

        Args:
            blocking: Whether to wait while another thread holds the lock.
            timeout: Longest wait in seconds; -1 for no limit.

        Returns:
            Whether the lock was acquired.

        Raises:
            MutualWaitError: Without a time limit, if the thread that holds the lock waits for this one.
        """
        if not self._lock.acquire(blocking=False):
            if not blocking or timeout >= 0:
                if not self._lock.acquire(blocking, timeout):
                    return False
            else:
                self._wait()
        self._owner, self._depth = threading.get_ident(), self._depth + 1
        return True

    def release(self) -> None:
        """Release the lock, which this thread holds."""
        if self._owner == threading.get_ident():
            self._depth -= 1
            if not self._depth:
                self._owner = None  # before another thread can acquire the lock
        self._lock.release()

    def _wait(self) -> None:
        """Acquire the lock, and look from time to time whether its owner waits for this thread, maybe through others.

        Raises:
            MutualWaitError: If it does.
        """
        thread = threading.get_ident()
        with _waits.mutex:
            _waits.locks[thread] = self
        try:
            while not self._lock.acquire(timeout=CHECK_SECONDS):
                with _waits.mutex:
                    if self._is_waiting_for(thread):
                        del _waits.locks[thread]  # so that only one of the threads fails
                        raise MutualWaitError("threads wait for each other's locks")
        finally:
            with _waits.mutex:
                _waits.locks.pop(thread, None)

    def _is_waiting_for(self, thread: int) -> bool:
        """Return whether the owner of this lock waits for a lock of a thread, or for an owner that does."""
        lock: ObjectLock | None = self
        seen: set[int] = set()
        while lock is not None and (owner := lock._owner) is not None and owner not in seen:
            if owner == thread:
                return True
            seen.add(owner)
            lock = _waits.locks.get(owner)
        return False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

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
    _waits.reset()
    for lock in list(_locks):
        lock._lock, lock._owner, lock._depth = threading.RLock(), None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_in_child)
