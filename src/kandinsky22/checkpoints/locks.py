"""Locks between processes that save into one folder, which end with the process that holds them.

A lock is held on an open folder or file (`flock`). Where the system or the file system has no such locks, files of
another process count as abandoned when they are old.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

from kandinsky22.errors import CheckpointError

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
LOCK_TIMEOUT = 120.0  # seconds to wait for another process that is replacing files, which takes it milliseconds
ABANDONED_AFTER = 24 * 3600.0  # seconds without a change, where there are no locks
POLL_INTERVAL = 0.01  # seconds
READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def lock_file(descriptor: int) -> bool | None:
    """Lock an open file or folder without waiting.

    Args:
        descriptor: The open file.

    Returns:
        Whether it is locked now; None if there are no locks here.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return None
    return True


def unlock(descriptor: int) -> None:
    """Unlock and close an open file or folder.

    Args:
        descriptor: The open file.
    """
    with contextlib.suppress(OSError):
        if fcntl is not None:  # explicitly, because a forked child may share the open file
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    with contextlib.suppress(OSError):
        os.close(descriptor)


def open_folder(folder: str | os.PathLike[str]) -> int | None:
    """Open a folder, to be locked.

    Args:
        folder: The folder.

    Returns:
        The descriptor, or None on systems that do not open folders.
    """
    return None if fcntl is None else os.open(folder, READ | getattr(os, "O_DIRECTORY", 0))


@contextlib.contextmanager
def abandoned(path: str | os.PathLike[str]) -> Iterator[bool]:
    """Yield whether the process that created a temporary file or folder has ended, which stays locked in the block.

    Args:
        path: The file or folder, which its process has locked.
    """
    descriptor = None
    try:
        locked = None
        if fcntl is not None:
            descriptor = os.open(path, READ | getattr(os, "O_NOFOLLOW", 0))
            locked = lock_file(descriptor)
        result = time.time() - os.stat(path).st_mtime > ABANDONED_AFTER if locked is None else locked
    except OSError:
        result = False
    try:
        yield result
    finally:
        if descriptor is not None:
            unlock(descriptor)


@contextlib.contextmanager
def locked_folders(folders: Iterable[str | os.PathLike[str]]) -> Iterator[bool]:
    """Yield whether there are locks here, holding those of folders in the block and waiting for other processes.

    Args:
        folders: The folders, in an order that all processes share: a parent before its subfolders.

    Raises:
        CheckpointError: If another process holds one of the locks for longer than `LOCK_TIMEOUT` seconds.
        OSError: If a folder cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        inodes: set[tuple[int, int]] = set()  # one folder may have two names, and would wait for itself
        are_locked = True
        for folder in folders:
            descriptor = open_folder(folder)
            if descriptor is None:
                are_locked = False
                continue
            stack.callback(unlock, descriptor)
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) not in inodes:
                inodes.add((status.st_dev, status.st_ino))
                are_locked &= _wait_for_lock(descriptor, folder)
        yield are_locked


def _wait_for_lock(descriptor: int, folder: str | os.PathLike[str]) -> bool:
    deadline = time.monotonic() + LOCK_TIMEOUT
    while (locked := lock_file(descriptor)) is False:
        if time.monotonic() > deadline:
            raise CheckpointError(f"{os.fspath(folder)} is locked by another process that saves into it; try again")
        time.sleep(POLL_INTERVAL)
    return bool(locked)
