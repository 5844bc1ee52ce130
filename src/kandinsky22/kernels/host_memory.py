"""Memory of the CPU, where the system decides too early or too late when it is given back."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

_DONTNEED, _HUGEPAGE = 4, 14  # MADV_... of Linux
MAPPED = 2**25  # bytes from which on the C library would ask the system for memory each time, and return it each time
# Bits of an entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst of the Linux kernel).
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1) << np.uint64(bit) for bit in (63, 62, 61))

keeping, forgetting = True, True
"""False switches `kept` and `forget` off."""
_keeping, _blocks = 0, list[mmap.mmap]()  # how many are within, and what is kept for them
_lock = threading.RLock()  # for tensors may go at any time


def forget(tensor: Tensor) -> bool:
    """Take a CPU tensor's pages out of this process's memory if they are unchanged pages of a file.

    The next look at the tensor brings them back from the file, or from the system's cache of it. Returns whether that
    was done: not for other memory, for pages that were written to, or on systems other than Linux.
    """
    possible = forgetting and sys.platform.startswith("linux")
    if not possible or tensor.device.type != "cpu" or not tensor.is_contiguous():
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


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another type; what was read of it from a file is not looked at again, so it is given up."""
    made = tensor.to(dtype)
    if made is not tensor:
        forget(tensor)
    return made


def empty(like: Tensor, *shape: int) -> Tensor:
    """A contiguous tensor of this shape, else like the other, that is quick to fill.

    Large ones on Linux have a block of memory of their own, in huge pages where the system has them: new pages cost
    more when they are first used than numbers take to write, and so there are 512 times fewer of them.
    """
    size = math.prod(shape) * like.element_size()
    plain = like.device.type == "cpu" and type(like) in (Tensor, nn.Parameter)
    block = _take(size) if size >= MAPPED and plain and sys.platform.startswith("linux") else None
    if block is None:
        return like.new_empty(shape)
    view = (ctypes.c_char * size).from_buffer(block)
    weakref.finalize(view, _give_back, block).atexit = False  # the tensor holds the view
    return torch.frombuffer(view, dtype=like.dtype).view(shape)


def kept() -> contextlib.AbstractContextManager[None]:
    """Within, the blocks of large tensors that are gone stay for the next ones; at the end they are given back."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _kept()


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    global _keeping
    expect_large()
    with _lock:
        _keeping += 1
    try:
        yield
    finally:
        with _lock:
            _keeping -= 1
            if not _keeping:
                _blocks.clear()


@functools.cache
def expect_large() -> None:
    """Have the C library of Linux keep what is freed and smaller than blocks: it does so with sizes it has seen go."""
    torch.empty(MAPPED - 2**16, dtype=torch.uint8)


def _take(size: int) -> mmap.mmap | None:
    """The smallest block that was kept and is large enough, but not by far, else a new one, for which all that were
    kept are let go; None if there is no more memory."""
    with _lock:
        fitting = [block for block in _blocks if size <= len(block) <= 4 * size]
        if fitting:
            chosen = min(fitting, key=len)
            _blocks.remove(chosen)
            return chosen
        _blocks.clear()
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None
    with contextlib.suppress(OSError):  # of a kernel without huge pages
        block.madvise(_HUGEPAGE)
    return block


def _begin_anew() -> None:
    """In a forked process nobody is within."""
    global _keeping, _lock
    _keeping, _lock = 0, threading.RLock()
    _blocks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def _give_back(block: mmap.mmap) -> None:
    with _lock:
        if keeping and _keeping:
            _blocks.append(block)


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
