"""Host memory: dropping pages that are mapped from files, and a pool of buffers in huge pages for large tensors."""

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

from kandinsky22.kernels import settings

LARGE_BUFFER = 2**25  # bytes; the C library maps and unmaps allocations of this size and more each time
LARGE_WEIGHT = 2**20  # bytes; below this, dropping pages is not worth a system call

_MADV_DONTNEED, _MADV_HUGEPAGE = 4, 14  # of Linux
# Bits of an entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst of the Linux kernel).
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1) << np.uint64(bit) for bit in (63, 62, 61))

_nesting, _free_buffers = 0, list[mmap.mmap]()  # depth of `reuse_buffers()`, and the pool's buffers that are not in use
_lock = threading.RLock()  # reentrant: a tensor may be freed, and return its buffer, at any time


# Pages of files


def drop_mapped_pages(tensor: Tensor) -> bool:
    """Take a tensor's pages out of this process's memory if they are unchanged pages of a file.

    The next access brings them back from the file, or from the system's cache of it.

    Args:
        tensor: Any tensor.

    Returns:
        True if the pages were dropped. False for tensors that are not mapped from a file, not contiguous or not on the
        CPU, if a page was written to, if the setting `drop_mapped_pages` is off, and on systems other than Linux.
    """
    supported = sys.platform.startswith("linux") and settings.current().drop_mapped_pages
    if not supported or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return False
    size = mmap.PAGESIZE
    first, last = tensor.data_ptr() // size, -(-(tensor.data_ptr() + tensor.nbytes) // size)
    entries = _page_entries(first, last - first)
    in_memory = entries & (_PRESENT | _SWAPPED) != 0
    if not in_memory.any() or not ((entries[in_memory] & _OF_FILE) != 0).all():
        return False
    return _madvise()(ctypes.c_void_p(first * size), ctypes.c_size_t((last - first) * size), _MADV_DONTNEED) == 0


def drop_large_mapped_pages(tensors: Iterable[Tensor]) -> None:
    """Call `drop_mapped_pages` for each tensor of a megabyte and more.

    Args:
        tensors: For example the parameters of a network that is not needed for a while.
    """
    for tensor in tensors:
        if tensor.nbytes >= LARGE_WEIGHT:
            drop_mapped_pages(tensor)


def convert_and_drop(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in another dtype, and drop the mapped pages that were read for the conversion.

    Args:
        tensor: Tensor, often mapped from a file.
        dtype: Type of the result; the tensor itself is returned if it has this type.
    """
    converted = tensor.to(dtype)
    if converted is not tensor:
        drop_mapped_pages(tensor)
    return converted


def _page_entries(first: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Return the kernel's entries for `count` pages from page number `first`; none where they cannot be read."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(8 * first)
            return np.frombuffer(file.read(8 * count), dtype=np.uint64)
    except OSError:
        return np.empty(0, dtype=np.uint64)


@functools.cache
def _madvise() -> Callable[..., int]:
    madvise: Callable[..., int] = ctypes.CDLL(None, use_errno=True).madvise
    return madvise


# Large buffers


def empty_large(like: Tensor, *shape: int) -> Tensor:
    """Return an uninitialised contiguous tensor, as `like.new_empty(shape)` does.

    On Linux, CPU tensors of `LARGE_BUFFER` bytes and more get a buffer in huge pages, where the system has them: the
    first write to a page costs more than writing its values, and there are 512 times fewer huge pages. Inside
    `reuse_buffers()` they come from the pool.

    Args:
        like: Tensor that sets dtype and device.
        shape: Shape of the result.
    """
    size = math.prod(shape) * like.element_size()
    is_cpu_tensor = like.device.type == "cpu" and type(like) in (Tensor, nn.Parameter)
    if size < LARGE_BUFFER or not is_cpu_tensor or not sys.platform.startswith("linux"):
        return like.new_empty(shape)
    pooled = settings.current().buffer_pool
    buffer = (_take(size) if pooled else None) or _new_buffer(size)
    if buffer is None:
        return like.new_empty(shape)
    view = (ctypes.c_char * size).from_buffer(buffer)
    if pooled:
        weakref.finalize(view, _give_back, buffer).atexit = False  # the tensor holds the view
    return torch.frombuffer(view, dtype=like.dtype).view(shape)


def reuse_buffers() -> contextlib.AbstractContextManager[None]:
    """Return a context manager in which buffers of freed large tensors are reused for the next ones.

    The buffers are freed when the outermost of such contexts ends, of all threads together.
    """
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _reuse_buffers()


@contextlib.contextmanager
def _reuse_buffers() -> Iterator[None]:
    global _nesting
    raise_mmap_threshold()
    with _lock:
        _nesting += 1
    try:
        yield
    finally:
        with _lock:
            _nesting -= 1
            if not _nesting:
                _free_buffers.clear()


def _take(size: int) -> mmap.mmap | None:
    """Take the smallest buffer of `size` to 4 x `size` bytes; without one, empty the pool and return None."""
    with _lock:
        fitting = [buffer for buffer in _free_buffers if size <= len(buffer) <= 4 * size]
        if fitting:
            smallest = min(fitting, key=len)
            _free_buffers.remove(smallest)
            return smallest
        _free_buffers.clear()
    return None


def _new_buffer(size: int) -> mmap.mmap | None:
    """Return a new buffer in huge pages; None if the system has no more memory."""
    try:
        buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None
    with contextlib.suppress(OSError):  # kernels without huge pages
        buffer.madvise(_MADV_HUGEPAGE)
    return buffer


def _give_back(buffer: mmap.mmap) -> None:
    with _lock:
        if _nesting:
            _free_buffers.append(buffer)


def _reset_in_child() -> None:
    """Reset the pool in a forked process, where no context is active."""
    global _nesting, _lock
    _nesting, _lock = 0, threading.RLock()
    _free_buffers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_in_child)


# The C library's allocator


@functools.cache
def raise_mmap_threshold() -> None:
    """Make the C library of Linux keep freed memory below `LARGE_BUFFER` bytes for later allocations.

    Its threshold for returning memory to the system rises to the largest size that was freed (mallopt(3),
    M_MMAP_THRESHOLD).
    """
    torch.empty(LARGE_BUFFER - 2**16, dtype=torch.uint8)


def available_bytes() -> int:
    """Return the memory that this process can still use without swapping; a huge number where it is unknown."""
    try:
        with open("/proc/meminfo") as file:
            entries = dict(line.split(":", 1) for line in file)
        return int(entries["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return sys.maxsize


def malloc_trim() -> None:
    """Return freed memory to the system; the C library of Linux keeps some for later allocations."""
    if sys.platform.startswith("linux"):
        function = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if function is not None:
            function(0)
