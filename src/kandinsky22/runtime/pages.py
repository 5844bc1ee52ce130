"""Memory of the CPU, where the system decides too early or too late when it is given back."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from torch import Tensor

_DONTNEED, _HUGEPAGE = 4, 14  # MADV_... of Linux
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # M_... of its C library
HUGE = 2**21  # bytes of a huge page
MAPPED = 2**25  # bytes from which on the C library asks the system for memory, and returns it when it is not needed
# Bits of an entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst of the Linux kernel).
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1) << np.uint64(bit) for bit in (63, 62, 61))

keeping = True
"""False switches `kept` off."""
_keeping, _lock = 0, threading.Lock()  # how many are within


def forget(tensor: Tensor) -> bool:
    """Take a CPU tensor's pages out of this process's memory if they are unchanged pages of a file.

    The next look at the tensor brings them back from the file, or from the system's cache of it. Returns whether that
    was done: not for other memory, for pages that were written to, or on systems other than Linux.
    """
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return False
    size = mmap.PAGESIZE
    first, last = tensor.data_ptr() // size, -(-(tensor.data_ptr() + tensor.nbytes) // size)
    pages = _page_entries(first, last - first)
    there = pages & (_PRESENT | _SWAPPED) != 0
    if not there.any() or not ((pages[there] & _OF_FILE) != 0).all():
        return False
    return _advise()(ctypes.c_void_p(first * size), ctypes.c_size_t((last - first) * size), _DONTNEED) == 0


def forget_large(tensors: Iterable[Tensor]) -> None:
    """`forget` those of a megabyte and more."""
    for tensor in tensors:
        if tensor.nbytes >= 2**20:
            forget(tensor)


def empty(like: Tensor, *shape: int) -> Tensor:
    """A contiguous tensor of this shape, else like the other, that is quick to fill.

    Large ones consist of new pages, each of which costs more when it is first used than its numbers take to write; in
    huge pages, where Linux has them, one has 512 times as much to it.
    """
    made = like.new_empty(shape)
    if made.nbytes >= MAPPED and made.device.type == "cpu" and sys.platform.startswith("linux"):
        first, last = -(-made.data_ptr() // HUGE), (made.data_ptr() + made.nbytes) // HUGE
        _advise()(ctypes.c_void_p(first * HUGE), ctypes.c_size_t((last - first) * HUGE), _HUGEPAGE)
    return made


def trim() -> None:
    """Give memory that was freed back to the system; the C library of Linux keeps some for later."""
    if sys.platform.startswith("linux"):
        function = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if function is not None:
            function(0)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within, memory that is freed stays, for what is allocated next; at the end what is free is given back.

    The C library of Linux gives large tensors pages of their own and returns them with the tensor. In a network that
    means new pages, which the system clears first, for each layer's features. Nothing is done elsewhere, or where the
    environment says how memory is to be allocated.
    """
    global _keeping
    function = _settings() if keeping else None
    if function is None:
        yield
        return
    with _lock:
        _keeping += 1
        function(_MMAP_MAX, 0)
        function(_TRIM_THRESHOLD, sys.maxsize >> 32)
    try:
        yield
    finally:
        with _lock:
            _keeping -= 1
            if not _keeping:  # as the C library has them when it has seen large tensors come and go
                function(_MMAP_MAX, 2**16)
                function(_MMAP_THRESHOLD, MAPPED)
                function(_TRIM_THRESHOLD, 2 * MAPPED)
        if not _keeping:
            trim()


@functools.cache
def _settings() -> Callable[[int, int], int] | None:
    """The C library's function that sets how memory is allocated, if it is there and nobody else does that."""
    if not sys.platform.startswith("linux") or any(
        name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ
    ):
        return None
    function: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    return function


def _page_entries(first: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """What the kernel says of pages, one number each; nothing where it is not asked."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(8 * first)
            return np.frombuffer(file.read(8 * count), dtype=np.uint64)
    except OSError:
        return np.empty(0, dtype=np.uint64)


@functools.cache
def _advise() -> Callable[..., int]:
    madvise: Callable[..., int] = ctypes.CDLL(None, use_errno=True).madvise
    return madvise
