"""Conversion of weights to another type while they are read, by all CPU cores.

Mapping a file and converting its pages costs more in page faults than in conversion. Here each core reads pieces of the
file into a buffer that stays in its cache, and converts them from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
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

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
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
    with contextlib.ExitStack() as stack:
        in_pieces: list[_StoredWeight] = []
        for path in dict.fromkeys(sources[name] for name in converts):
            descriptor = stack.enter_context(_opened(path))
            large = {name: tensors[name] for name in converts if sources[name] == path and tensors[name].nbytes > LARGE}
            offsets = _offsets(path, descriptor, large)
            in_pieces += [_StoredWeight(name, path, descriptor, offset) for name, offset in offsets.items()]
        in_pieces.sort(key=lambda weight: -tensors[weight.name].nbytes)  # all threads end at about the same time
        for name in set(converts) - {weight.name for weight in in_pieces}:
            result[name] = host_memory.convert_and_drop(tensors[name], dtype)
        buffers = threading.local()

        def convert(weight: _StoredWeight) -> None:
            if not hasattr(buffers, "own"):
                buffers.own = torch.empty(PIECE, dtype=torch.uint8, device="cpu")
            _read_converted(weight, tensors[weight.name].dtype, result[weight.name], buffers.own)

        for weight in in_pieces:
            # by this thread, because the C library keeps the freed memory of each thread apart
            result[weight.name] = torch.empty(tensors[weight.name].shape, dtype=dtype, device="cpu")
        pool = stack.enter_context(ThreadPoolExecutor(torch.get_num_threads()))
        list(pool.map(convert, in_pieces))
    return result


@dataclasses.dataclass(frozen=True)
class _StoredWeight:
    """Position of a weight in an open file."""

    name: str
    path: Path
    descriptor: int
    offset: int


def _read_converted(weight: _StoredWeight, stored: torch.dtype, out: Tensor, buffer: Tensor) -> None:
    """Fill `out` with a weight that is stored in the type `stored`."""
    offset = weight.offset
    flat, values = out.view(-1), buffer.view(stored)
    memory = memoryview(buffer.numpy())  # type: ignore[arg-type]  # arrays have the buffer interface
    for start in range(0, len(flat), len(values)):
        count = min(len(values), len(flat) - start)
        missing = memory[: count * stored.itemsize]
        while missing:
            read = os.preadv(weight.descriptor, [missing], offset)
            if read == 0:
                raise CheckpointError(f"cannot read {weight.path}: it was truncated while it was read")
            missing, offset = missing[read:], offset + read
        for first in range(0, count, CONVERTED_ELEMENTS):
            last = min(first + CONVERTED_ELEMENTS, count)
            flat[start + first : start + last].copy_(values[first:last])


def _offsets(path: Path, descriptor: int, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the position of tensors in an opened safetensors file; none for other formats and other systems.

    The library has opened the file before, and has checked its header. A tensor that the header describes otherwise now
    is left out: the file has been replaced since.
    """
    if path.suffix != ".safetensors" or not hasattr(os, "preadv"):
        return {}
    size = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    header = json.loads(os.pread(descriptor, size, 8))
    offsets = {}
    for name, tensor in tensors.items():
        entry = header.get(name, {})
        first, last = entry.get("data_offsets", (0, 0))
        stored = (entry.get("shape"), DTYPES.get(entry.get("dtype")), last - first)
        if stored == (list(tensor.shape), tensor.dtype, tensor.nbytes):
            offsets[name] = 8 + size + first
    return offsets


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
