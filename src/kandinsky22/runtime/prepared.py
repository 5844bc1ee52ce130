"""Packed weights of a network in a file of its folder: products use them as they are mapped from there.

Packing takes longer than a step of the denoising process. A prepared checkpoint has the published layout, and next to
the weights of each network a file with the copies that its layers multiply by. The file belongs to one kind of
processor, one release of torch and one set of weights. Anywhere else, and after any change of the weights, it is
ignored, and layers pack their weights as usual.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kandinsky22.checkpoints.atomic_files import atomic_write
from kandinsky22.errors import CheckpointError
from kandinsky22.kernels import packed_memory
from kandinsky22.kernels.linear import packing_layers, store_packed, stored_packed
from kandinsky22.kernels.packed_memory import PackedBytes
from kandinsky22.verbosity import warn_once

logger = logging.getLogger(__name__)

PACKED_FILE = "packed_weights.safetensors"
ALIGNMENT = 64  # bytes; packed weights begin at multiples of a cache line
BLOCKS, BLOCK_BYTES = 64, 4096  # parts of each weight file that its digest covers


def write_packed(network: nn.Module, folder: Path, weight_files: Iterable[Path]) -> int:
    """Write the packed weights that the layers of a network hold now.

    Layers hold them once they have run. Weights of Winograd's method are left out: they are four times as large as the
    weights themselves.

    Args:
        network: The network.
        folder: Its folder.
        weight_files: The files of its weights.

    Returns:
        Number of weights.

    Raises:
        CheckpointError: This release of torch does not support it, or the file cannot be written.
    """
    fingerprint = packed_memory.fingerprint()
    if fingerprint is None:
        raise CheckpointError("this release of torch, or this system, does not map packed weights from files")
    layers = {id(layer) for layer in packing_layers(network)}
    packed: dict[str, Any] = {}
    for path, layer in network.named_modules():
        if id(layer) in layers and (stored := stored_packed(layer)) is not None and isinstance(stored[1], torch.Tensor):
            packed[path] = stored
    _write_file(folder / PACKED_FILE, packed, fingerprint=fingerprint, weights=_weights_digest(weight_files))
    return len(packed)


def attach_packed(network: nn.Module, folder: Path, weight_files: Iterable[Path], dtype: torch.dtype) -> int:
    """Let the layers of a network use the packed weights of its folder, if they fit machine, weights and type.

    Args:
        network: A network that was just read.
        folder: Its folder.
        weight_files: The files that its weights were read from.
        dtype: Type of the weights.

    Returns:
        Number of layers that use them; 0 if there is no file, or if it does not fit.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = folder / PACKED_FILE
    if not os.path.isfile(path):
        return 0
    header, start = _read_header(path)
    about = header.pop("__metadata__")
    if about.get("dtype") != str(dtype).removeprefix("torch."):
        return 0
    if about.get("fingerprint") != packed_memory.fingerprint():
        warn_once(logger, f"{folder} was prepared on another kind of machine: its weights are packed again")
        return 0
    if about.get("weights") != _weights_digest(weight_files):
        warn_once(logger, f"the weights in {folder} were replaced after it was prepared: they are packed again")
        return 0
    memory = torch.from_file(str(path), shared=False, size=os.path.getsize(path), dtype=torch.uint8)
    layers, allowed = dict(network.named_modules()), {id(layer) for layer in packing_layers(network)}
    entries = json.loads(about["entries"])
    for name, entry in entries.items():
        layer = layers.get(name)
        if layer is None or id(layer) not in allowed or name not in header:
            raise CheckpointError(f"{path} does not fit the network: it has no layer {name!r}")
        first, last = header[name]["data_offsets"]
        block = memory[start + first : start + last]
        try:
            packed = PackedBytes(block, bytes.fromhex(entry["layout"]), tuple(entry["shape"]), dtype)
            store_packed(layer, entry["name"], packed_memory.from_bytes(packed))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"cannot read {path}: damaged ({error})") from error
    return len(entries)


def _weights_digest(files: Iterable[Path]) -> str:
    """Return a digest over sizes and evenly spread blocks of weight files."""
    digest = hashlib.sha256()
    for path in files:
        size = os.path.getsize(path)
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for index in range(BLOCKS):
                file.seek(size * index // BLOCKS)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def _write_file(path: Path, packed: dict[str, Any], *, fingerprint: str, weights: str) -> None:
    """Write packed weights as bytes, in the safetensors format, each at an aligned position."""
    entries: dict[str, Any] = {}
    header: dict[str, Any] = {}
    position, dtype = 0, ""
    for name, (layout, tensor) in packed.items():
        about = packed_memory.to_bytes(tensor)
        size = -(-len(about.memory) // ALIGNMENT) * ALIGNMENT
        dtype = str(about.dtype).removeprefix("torch.")
        entries[name] = {"name": layout, "shape": list(about.shape), "layout": about.layout.hex()}
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
        position += size
    about_file = {"fingerprint": fingerprint, "weights": weights, "dtype": dtype, "entries": json.dumps(entries)}
    text = json.dumps({"__metadata__": about_file, **header}).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in packed.values():
            content = packed_memory.to_bytes(tensor).memory.numpy()
            file.write(content.tobytes())
            file.write(bytes(-len(content) % ALIGNMENT))


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of the file, and the position of its data."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, os.path.getsize(path))))
        about = header["__metadata__"]
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if not isinstance(about, dict) or 8 + size + max(ends, default=0) != os.path.getsize(path):
            raise ValueError("it is truncated")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read {path}: damaged ({error})") from error
    return header, 8 + size
