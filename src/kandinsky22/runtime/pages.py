"""Memory of weights that are mapped from a file: it can be given back while the weights stay usable."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import numpy as np
from torch import Tensor

_DONTNEED, _HUGEPAGE = 4, 14  # MADV_... of Linux
HUGE = 2**21  # bytes of a huge page
MAPPED = 2**25  # bytes from which on the C library asks the system for memory, and returns it when it is not needed
# Bits of an entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst of the Linux kernel).
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1) << np.uint64(bit) for bit in (63, 62, 61))


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
