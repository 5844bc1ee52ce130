"""Conversion of weights to another type while they are read, by all CPU cores.

Mapping a file and converting its pages costs more in page faults than in conversion. Here each core reads pieces of the
file into a buffer that stays in its cache, and converts them from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from kandinsky22.errors import CheckpointError
from kandinsky22.kernels import host_memory

LARGE = 2**20  # smallest tensor, in bytes, that is read in pieces
PIECE = 2**20  # bytes that are read at a time
# Elements converted at a time. torch distributes operations over threads from 2^15 elements on; here every thread
# converts a piece of its own.
CONVERTED_ELEMENTS = 2**15 - 2**6


@torch.inference_mode(False)  # its tensors cannot be written by the threads, and not be packed
def convert_weights(
    tensors: Mapping[str, Tensor], sources: Mapping[str, Path], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return weights in another floating-point type.

    Args:
        tensors: Weights by name, as `read_tensors` yields them.
        sources: File of each weight.
        dtype: Type of the result; None returns the weights as they are. Integers are never converted.

    Returns:
        The weights by name, in the same order. Those that were converted are not mapped from a file.

    Raises:
        CheckpointError: If a file was truncated since it was opened.
    """
    converts = [name for name, t in tensors.items() if dtype is not None and t.is_floating_point() and t.dtype != dtype]
    result = dict(tensors)
    if dtype is None or not converts:
        return result
    in_pieces = []
    for path in dict.fromkeys(sources[name] for name in converts):
        offsets = _offsets(path)
        names = [name for name in converts if sources[name] == path]
        in_pieces += [(path, offsets[name], name) for name in names if name in offsets and tensors[name].nbytes > LARGE]
    in_pieces.sort(key=lambda piece: -tensors[piece[2]].nbytes)  # so that all threads end at about the same time
    for name in set(converts) - {name for _, _, name in in_pieces}:
        result[name] = host_memory.convert_and_drop(tensors[name], dtype)
    with contextlib.ExitStack() as stack:
        descriptors = {path: stack.enter_context(_opened(path)) for path, _, _ in in_pieces}
        buffers = threading.local()

        def convert(piece: tuple[Path, int, str]) -> None:
            path, offset, name = piece
            if not hasattr(buffers, "own"):
                buffers.own = torch.empty(PIECE, dtype=torch.uint8, device="cpu")
            _read_converted(descriptors[path], path, offset, tensors[name].dtype, result[name], buffers.own)

        for _, _, name in in_pieces:
            # by this thread, because the C library keeps the freed memory of each thread apart
            result[name] = torch.empty(tensors[name].shape, dtype=dtype, device="cpu")
        pool = stack.enter_context(ThreadPoolExecutor(torch.get_num_threads()))
        list(pool.map(convert, in_pieces))
    return result


def _read_converted(descriptor: int, path: Path, offset: int, stored: torch.dtype, out: Tensor, buffer: Tensor) -> None:
    """Fill `out` with the values of a file from `offset` on, which are of type `stored`."""
    flat, values = out.view(-1), buffer.view(stored)
    memory = memoryview(buffer.numpy())  # type: ignore[arg-type]  # arrays have the buffer interface
    for start in range(0, len(flat), len(values)):
        count = min(len(values), len(flat) - start)
        missing = memory[: count * stored.itemsize]
        while missing:
            read = os.preadv(descriptor, [missing], offset)
            if read == 0:
                raise CheckpointError(f"cannot read {path}: it was truncated while it was read")
            missing, offset = missing[read:], offset + read
        for first in range(0, count, CONVERTED_ELEMENTS):
            last = min(first + CONVERTED_ELEMENTS, count)
            flat[start + first : start + last].copy_(values[first:last])


def _offsets(path: Path) -> dict[str, int]:
    """Return the position of each tensor in a safetensors file; none for other formats and other systems.

    The library has opened the file before, and has checked its header.
    """
    if path.suffix != ".safetensors" or not hasattr(os, "preadv"):
        return {}
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
