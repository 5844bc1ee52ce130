"""The system's cache of files: read files into it, drop them from it, and see how much of them is in it. Linux only.

Dropping needs no privileges, but it leaves pages that are being written or that another process has mapped: look at
`cached_bytes` afterwards.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

CHUNK = 2**24


def read(files: Iterable[Path]) -> None:
    """Read files, which puts them into the cache as far as there is memory.

    Args:
        files: Paths of the files.
    """
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.read(CHUNK):
                pass


def can_drop() -> bool:
    """Return whether the system supports `drop`."""
    return hasattr(os, "posix_fadvise")


def drop(files: Iterable[Path]) -> None:
    """Drop files from the cache.

    Args:
        files: Paths of the files.
    """
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only pages that are written to the disk can be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def cached_bytes(files: Iterable[Path]) -> int | None:
    """Return how many bytes of files are in the cache.

    Args:
        files: Paths of the files.

    Returns:
        The number of bytes, in whole pages, or None on systems without mincore(2).
    """
    total = 0
    for file in files:
        pages = _cached_pages(file)
        if pages is None:
            return None
        total += pages * mmap.PAGESIZE
    return total


def _cached_pages(file: Path) -> int | None:
    size = file.stat().st_size
    if size == 0:
        return 0
    try:
        library = ctypes.CDLL(None, use_errno=True)
        library.mmap.restype = ctypes.c_void_p
        library.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
        library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        library.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    except (AttributeError, OSError, TypeError):
        return None
    descriptor = os.open(file, os.O_RDONLY)
    try:
        address = library.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address in (None, ctypes.c_void_p(-1).value):
        return None
    try:
        # One byte per page, whose lowest bit says whether the page is in memory.
        states = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        if library.mincore(address, size, states):
            return None
        return sum(byte & 1 for byte in states.raw)
    finally:
        library.munmap(address, size)
