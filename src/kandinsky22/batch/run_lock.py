"""The lock of a run's output folder: one run at a time, and its worker processes."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kandinsky22.errors import InputError

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
LOCK_NAME, WORKERS_NAME = ".run.lock", ".workers.lock"
WORKER_SECONDS = 30.0  # longest time that the workers of a killed run take to end


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder. It ends with the process, however that ends.

    Workers of a killed run are awaited. Where the file system has no locks, nothing is refused.

    Args:
        folder: The output folder.

    Yields:
        Nothing.

    Raises:
        InputError: If another run holds the lock; the message names its process.
    """
    if fcntl is None:
        yield
        return
    path = folder / LOCK_NAME
    descriptor = _locked(path)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        _await_workers(folder)
        try:
            yield
        finally:
            (folder / WORKERS_NAME).unlink(missing_ok=True)  # the run has ended its workers, after errors too
    finally:
        # The name goes while the lock is held: whoever opened the old file notices that it has no name any more.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path) -> int:
    """Return the descriptor of the locked file."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            content = os.pread(descriptor, 1000, 0)
            os.close(descriptor)
            raise InputError(f"{path.parent} is in use by another run{_description(content)}; wait for it") from None
        except OSError:  # some network file systems
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # another run has removed the name meanwhile


def _description(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return f", process {int(holder['pid'])} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return ""


def hold_worker_lock(folder: Path) -> int | None:
    """Mark this process as a worker of the folder's run until it ends.

    Args:
        folder: The output folder.

    Returns:
        The descriptor of the lock, which stays open; None where there are no locks.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder / WORKERS_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _await_workers(folder: Path) -> None:
    """Wait until all workers of an earlier run have ended: they must not write into the folder any more."""
    deadline = time.monotonic() + WORKER_SECONDS
    try:
        descriptor = os.open(folder / WORKERS_NAME, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(f"{folder} is in use by workers of a run that was killed; end them") from None
                time.sleep(0.05)
            except OSError:
                return
    finally:
        os.close(descriptor)
