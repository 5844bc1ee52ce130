"""Packed weights of oneDNN as plain bytes, and back, so that they can be mapped from a file.

oneDNN multiplies by weights in a layout of its choice. torch holds such a weight in an opaque tensor: its values cannot
be read element by element, but its memory is one block, and its layout has a description of a few hundred bytes. torch
makes opaque tensors from both for models that were compiled ahead of time; the functions here call the same C
interface. The result has the same bytes in the same layout, therefore all products are the same bit for bit.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import platform
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CPU = 0  # number of the device type in torch's C interface
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}


class PackedProduct:
    """A packed weight that is multiplied together with vectors, such as the scales of its rows.

    Attributes:
        weight: Opaque tensor.
    """

    weight: Tensor

    def vectors(self) -> dict[str, Tensor]:
        """Return the float32 vectors that are not parameters of the layer, by name."""
        return {}


@dataclasses.dataclass(frozen=True)
class PackedBytes:
    """A packed weight as bytes.

    Attributes:
        memory: The bytes, a tensor of uint8. Its address should be a multiple of 64.
        layout: oneDNN's description of the layout.
        shape: Shape of the weight.
        dtype: Type of the weight: float32, bfloat16 or int8.
    """

    memory: Tensor
    layout: bytes
    shape: tuple[int, ...]
    dtype: torch.dtype


def to_bytes(packed: Tensor) -> PackedBytes:
    """Return a copy of a packed weight as bytes.

    Args:
        packed: Result of `pack_linear_weight`, or of reordering a convolution's weight.
    """
    operators = torch.ops.mkldnn
    size, address = int(operators._nbytes(packed)), int(operators.data_ptr(packed))
    memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    ctypes.memmove(memory.data_ptr(), address, size)
    layout = operators._get_mkldnn_serialized_md(packed).numpy().tobytes()
    return PackedBytes(memory, layout, tuple(packed.shape), packed.dtype)


def from_bytes(packed: PackedBytes) -> Tensor:
    """Return a packed weight whose memory is that of `packed.memory`.

    Args:
        packed: Bytes that `to_bytes` has made on a machine with the same `fingerprint`.

    Raises:
        RuntimeError: The layout is not one of oneDNN's, or needs more memory than there is.
    """
    tensor = _opaque(packed)
    if int(torch.ops.mkldnn._nbytes(tensor)) > len(packed.memory):
        raise RuntimeError("a packed weight is larger than its memory")
    tensor.packed_memory = packed.memory  # type: ignore[attr-defined]  # kept as long as the Python object
    return tensor


def _opaque(packed: PackedBytes, *, is_probe: bool = False) -> Tensor:
    """Return an opaque tensor over the memory, which it does not keep; one reference of a probe is left."""
    library = _library()
    if len(packed.layout) != _layout_bytes():
        raise RuntimeError("the layout of a packed weight has another length")
    rank = len(packed.shape)
    strides = [1] * rank
    for axis in reversed(range(rank - 1)):
        strides[axis] = strides[axis + 1] * packed.shape[axis + 1]
    handle = ctypes.c_void_p()
    # the types of all arguments are those of torch/csrc/inductor/aoti_torch/c/shim.h
    failed = library.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(packed.memory.data_ptr()),
        ctypes.c_int64(rank),
        (ctypes.c_int64 * rank)(*packed.shape),
        (ctypes.c_int64 * rank)(*strides),
        ctypes.c_int64(0),
        ctypes.c_int32(getattr(library, f"aoti_torch_dtype_{_DTYPES[packed.dtype]}")()),
        ctypes.c_int32(_CPU),
        ctypes.c_int32(0),
        ctypes.byref(handle),
        ctypes.c_int32(library.aoti_torch_layout__mkldnn()),
        (ctypes.c_uint8 * len(packed.layout)).from_buffer_copy(packed.layout),
        ctypes.c_int64(len(packed.layout)),
    )
    if failed or not handle.value:
        raise RuntimeError("torch refuses the layout of a packed weight")
    new_capsule: Any = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    tensor: Tensor = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(new_capsule(handle.value, None, None))
    if not is_probe and _leaves_references():
        library.aoti_torch_delete_tensor_object(handle)
    return tensor


@functools.cache
def _leaves_references() -> bool:
    """Return whether torch's function leaves the reference that it is said to take over, which then has to be deleted.

    Releases up to 2.13 leave it. Deleting it where it was taken over would free the tensor twice.
    """
    about = _small()
    tensor = _opaque(about, is_probe=True)
    reference = weakref.ref(tensor)
    del tensor
    probe = reference()
    if probe is not None:  # it stays for the rest of the process, and so does its memory
        probe.packed_memory = about.memory  # type: ignore[attr-defined]
    return probe is not None


@functools.cache
def fingerprint() -> str | None:
    """Return what the layouts of this machine depend on: processor and releases of torch and oneDNN.

    None means that this release of torch, or this system, does not make packed weights from bytes.
    """
    if not _round_trip_works():
        return None
    parts = (torch.__version__, torch.__config__.show(), torch.backends.cpu.get_cpu_capability(), _processor())
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def _processor() -> str:
    """Return the processor's name and CPU flags, which determine the layouts that oneDNN chooses."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))


def _round_trip_works() -> bool:
    """Return whether a small matrix survives the way to bytes and back; the interface is not a public one of torch."""
    weight = torch.arange(64 * 32, dtype=torch.float32, device="cpu").view(64, 32)
    features = weight[:1]
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
        copy = to_bytes(packed)
        again = from_bytes(copy)
        multiply = torch.ops.mkldnn._linear_pointwise
        first, second = (multiply(features, each, None, "none", [], "") for each in (packed, again))
        return torch.equal(first, second)
    except (AttributeError, RuntimeError, OSError, TypeError, ValueError):
        return False


def _small() -> PackedBytes:
    """Return a packed matrix of a few numbers."""
    return to_bytes(torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=torch.float32, device="cpu"), 16))


@functools.cache
def _layout_bytes() -> int:
    """Return the length of oneDNN's description of a layout."""
    return len(_small().layout)


@functools.cache
def _library() -> Any:
    """Return torch's library with its C interface."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    library.aoti_torch_create_tensor_from_blob_v2.restype = ctypes.c_int32
    library.aoti_torch_layout__mkldnn.restype = ctypes.c_int32
    for name in _DTYPES.values():
        getattr(library, f"aoti_torch_dtype_{name}").restype = ctypes.c_int32
    return library
