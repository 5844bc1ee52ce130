"""Packed weights of a network in a file of its folder: products use them as they are mapped from there.

Packing takes longer than a step of the denoising process. A prepared checkpoint has the published layout, and next to
the weights of each network a file with the copies that its layers multiply by. The file belongs to one kind of
processor, one release of torch and one set of weights. Anywhere else, and after any change of the weights, it is
ignored, and layers pack their weights as usual.

oneDNN trusts the description of a layout: a forged one could make it read any memory. The file is therefore signed with
a key in the user's cache folder, and used only if the signature is right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky22.checkpoints.atomic_files import atomic_write, open_regular_file
from kandinsky22.checkpoints.cache_folder import cache_folder, signing_key
from kandinsky22.checkpoints.hub_files import file_digest
from kandinsky22.errors import CheckpointError
from kandinsky22.kernels import packed_memory
from kandinsky22.kernels.linear import drop_packed, packing_layers, store_packed, stored_packed
from kandinsky22.kernels.packed_memory import PackedBytes, PackedProduct
from kandinsky22.verbosity import warn_once

logger = logging.getLogger(__name__)

PACKED_FILE = "packed_weights.safetensors"
ALIGNMENT = 64  # bytes; packed weights begin at multiples of a cache line
LAYOUTS = ("linear", "conv", "fused_upsample")
INT8_LAYOUTS = ("int8", "int8_padded", "int8_upsample")
CORNER_LAYOUTS = ("fused_upsample", "int8_upsample")  # four kernels of 2 x 2 each
SIGNATURE = "signature"
MAX_HEADER_BYTES = 2**25  # that of a published network has less than 2**21
RECORDED_BYTES = 2**26  # digests of smaller files are computed at each load
NO_KEY = "prepared checkpoints need a key in the cache folder (KANDINSKY22_CACHE), which is off or cannot be written"


@dataclasses.dataclass(frozen=True)
class _Packed:
    """Packed weight of a layer: its layout, the opaque tensor, and the vectors that products need besides."""

    layout: str
    weight: Tensor
    vectors: Mapping[str, Tensor]

    @classmethod
    def stored_with(cls, layer: nn.Module) -> _Packed | None:
        """Return what a layer stores now; None if that is nothing, or nothing that is written."""
        layout, value = stored_packed(layer) or ("", None)
        if layout in LAYOUTS and isinstance(value, Tensor):
            return cls(layout, value, {})
        if layout in INT8_LAYOUTS and isinstance(value, PackedProduct):
            return cls(layout, value.weight, value.vectors())
        return None


def write_packed(network: nn.Module, folder: Path, weight_files: Iterable[Path]) -> int:
    """Write the packed weights that the layers of a network hold now.

    Layers hold them once they have run. Weights of Winograd's method are left out: they are four times as large as the
    weights themselves.

    Args:
        network: The network.
        folder: Its folder.
        weight_files: The files of its weights.

    Returns:
        Number of weights; 0 if there are none, and no file then.

    Raises:
        CheckpointError: The installed torch cannot map packed weights, the cache folder for the key is unavailable, or
            the file cannot be written.
    """
    fingerprint, key = packed_memory.fingerprint(), signing_key(create=True)
    if fingerprint is None:
        raise CheckpointError("this release of torch, or this system, does not map packed weights from files")
    if key is None:
        raise CheckpointError(NO_KEY)
    layers = {id(layer) for layer in packing_layers(network)}
    packed: dict[str, _Packed] = {}
    for path, layer in network.named_modules():
        stored = _Packed.stored_with(layer) if id(layer) in layers else None
        if stored is not None:
            packed[path] = stored
    if packed:
        dtype = str(_dtype(network)).removeprefix("torch.")
        files = list(weight_files)
        status = [os.stat(file) for file in files]  # before they are read: a later change makes the check invalid
        digest = _digest(files)
        about = {"fingerprint": fingerprint, "weights": digest, "dtype": dtype}
        _write_file(folder / PACKED_FILE, packed, about, key)
        _record_check(_check_record(status, digest))  # otherwise the first load would read all files for it
    return len(packed)


def attach_packed(network: nn.Module, folder: Path, weight_files: Iterable[Path]) -> int:
    """Let the layers of a network use the packed weights of its folder, if they fit machine, user, weights and type.

    A file that does not fit is ignored, with a message in the log unless only the type is another one.

    Args:
        network: A network that was just read.
        folder: Its folder.
        weight_files: The files that its weights were read from.

    Returns:
        Number of layers that use them; 0 if there is no file, or if it does not fit.
    """
    path, dtype = folder / PACKED_FILE, _dtype(network)
    if not os.path.isfile(path):
        return 0
    try:
        header, start = _read_header(path)
        about = header.pop("__metadata__")
        if about["dtype"] != str(dtype).removeprefix("torch."):
            return 0
        _check_origin(about, weight_files)
        return _attach(network, path, header, start, json.loads(about["entries"]), dtype)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        drop_packed(network)
        # not the folder, which can be a temporary one with links to files that are open
        name = type(network).__name__
        warn_once(logger, f"{name}: the checkpoint is prepared, but {error}: weights are packed again")
        return 0


def prepared_dtype(folder: Path) -> str | None:
    """Return the name of the type for which a network was prepared, by whomever; None if it was not.

    Args:
        folder: Its folder.
    """
    path = folder / PACKED_FILE
    if not os.path.isfile(path):
        return None
    try:
        header, _ = _read_json(path)
        name = header["__metadata__"]["dtype"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return name if name in ("float32", "bfloat16") else None


def _check_origin(about: Mapping[str, str], weight_files: Iterable[Path]) -> None:
    if about["fingerprint"] != packed_memory.fingerprint():
        raise ValueError("on another kind of machine")
    if not _have_digest(list(weight_files), about["weights"]):
        raise ValueError("its weights were replaced since")


def _attach(
    network: nn.Module,
    path: Path,
    header: Mapping[str, Any],
    start: int,
    entries: Mapping[str, Mapping[str, Any]],
    dtype: torch.dtype,
) -> int:
    """Give the layers that a signed file names their packed weights, and return their number."""
    memory = torch.from_file(str(path), shared=False, size=os.path.getsize(path), dtype=torch.uint8, device="cpu")
    layers, allowed = dict(network.named_modules()), {id(layer) for layer in packing_layers(network)}
    for name, entry in entries.items():
        layer: Any = layers[name]
        layout, shape = entry["name"], tuple(entry["shape"])
        is_integer = layer.weight.dtype == torch.int8
        if (
            id(layer) not in allowed
            or shape != _packed_shape(layer, layout)
            or layout not in (INT8_LAYOUTS if is_integer else LAYOUTS)
        ):
            raise ValueError(f"it does not fit the layer {name!r}")

        def block(part: str) -> Tensor:
            first, last = header[part]["data_offsets"]
            return memory[start + first : start + last]

        layer_dtype = torch.int8 if is_integer else dtype
        packed: Any = PackedBytes(block(name), bytes.fromhex(entry["layout"]), shape, layer_dtype)
        packed = packed_memory.from_bytes(packed)
        if is_integer:
            vectors = {
                vector: block(f"{name}:{vector}").view(torch.float32)[:length]
                for vector, length in entry["vectors"].items()
            }
            packed = layer.packed_product(layout, packed, vectors)
        store_packed(layer, layout, packed)
    return len(entries)


def _packed_shape(layer: Any, layout: str) -> tuple[int, ...]:
    """Return the shape that a packed weight of a layer has."""
    shape = tuple(layer.weight.shape)
    if layout in CORNER_LAYOUTS:
        return 4 * shape[0], shape[1], 2, 2
    return shape[::-1] if layout in INT8_LAYOUTS and len(shape) == 2 else shape


def _dtype(network: nn.Module) -> torch.dtype:
    """Return the type in which a network computes."""
    return next(p.dtype for p in network.parameters() if p.is_floating_point())


def _have_digest(files: Sequence[Path], digest: str) -> bool:
    """Return whether the digest of files equals `digest`. For large files, a successful check is cached."""
    record = _check_record([os.stat(file) for file in files], digest)
    if record is not None and record.exists():
        return True
    if _digest(files) != digest:
        return False
    _record_check(record)
    return True


def _check_record(status: Sequence[os.stat_result], digest: str) -> Path | None:
    """Return the cache entry for the check that files have a digest; None for small files and without a cache.

    The entry is an empty file. Its name is a hash of the digest and of device, inode, size and times of each file.
    Every write changes at least one of these.
    """
    cache = cache_folder()
    if cache is None or sum(s.st_size for s in status) < RECORDED_BYTES:
        return None
    stamps = [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in status]
    return cache / "prepared" / hashlib.sha256(json.dumps([digest, stamps]).encode()).hexdigest()


def _record_check(record: Path | None) -> None:
    """Write the cache entry of a successful check, where that is possible."""
    if record is not None:
        with contextlib.suppress(OSError):
            record.parent.mkdir(parents=True, exist_ok=True)
            record.touch()


def _digest(files: Iterable[Path]) -> str:
    """Return a digest of the content of files."""
    return hashlib.sha256(" ".join(map(file_digest, files)).encode()).hexdigest()


def _write_file(path: Path, packed: Mapping[str, _Packed], about: Mapping[str, str], key: bytes) -> None:
    """Write packed weights and their vectors as bytes, in the safetensors format, each at an aligned position."""
    entries: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    position = 0
    for name, each in packed.items():
        packed_bytes = packed_memory.to_bytes(each.weight)
        lengths = {vector: len(value) for vector, value in each.vectors.items()}
        entries[name] = {
            "name": each.layout,
            "shape": list(packed_bytes.shape),
            "layout": packed_bytes.layout.hex(),
            "vectors": lengths,
        }
        sizes = {name: len(packed_bytes.memory)}
        sizes.update({f"{name}:{vector}": 4 * length for vector, length in lengths.items()})
        for part, size in sizes.items():
            size += -size % ALIGNMENT
            tensors[part] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
            position += size
    header = {"__metadata__": {**about, "entries": json.dumps(entries)}, **tensors}
    header["__metadata__"][SIGNATURE] = _signature(header, key)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for each in packed.values():
            for content in (packed_memory.to_bytes(each.weight).memory, *each.vectors.values()):
                file.write(content.numpy().data)
                file.write(bytes(-content.nbytes % ALIGNMENT))


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a file that is complete and signed by this user, and the position of its data.

    Raises:
        ValueError: The file is damaged, or signed with another key.
    """
    length, key = os.path.getsize(path), signing_key(create=False)
    if key is None:
        raise ValueError("the signing key is missing")
    try:
        header, size = _read_json(path)
        signature = header["__metadata__"].pop(SIGNATURE)
        is_signed = isinstance(signature, str) and hmac.compare_digest(
            signature.encode(), _signature(header, key).encode()
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("its file of packed weights is damaged") from error
    if not is_signed:
        raise ValueError("by another user, or its file of packed weights is damaged")
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if 8 + size + max(ends, default=0) != length:
        raise ValueError("its file of packed weights is truncated")
    return header, 8 + size


def _read_json(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file as it is, and its length in bytes.

    Raises:
        OSError: The file cannot be read.
        ValueError: The header is invalid or too long.
    """
    with open_regular_file(path) as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError("its header is too long")
        header = json.loads(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return header, size


def _signature(header: Mapping[str, Any], key: bytes) -> str:
    return hmac.new(key, json.dumps(header, sort_keys=True).encode(), "sha256").hexdigest()
