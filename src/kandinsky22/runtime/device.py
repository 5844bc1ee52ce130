"""Devices and dtypes: names that a user can type, resolved to what torch offers on this machine."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch

from kandinsky22.errors import InputError, invalid
from kandinsky22.inputs.validation import usable_device

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
DTYPE_NAMES = ("auto", *_DTYPES)
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")  # values of `device_map` that name no device


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device of a name.

    Args:
        name: "auto" (CUDA if available, else MPS, else the CPU), "cpu", "cuda", "cuda:1" or "mps", for example.

    Raises:
        InputError: If the name is unknown or the device is not available.
    """
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if _count(kind)))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise invalid("device", name, "auto, cpu, cuda, cuda:N or mps") from None
    present = _count(device.type)
    if (device.index or 0) >= present:
        reason = f"torch {torch.__version__} finds {present or 'no'} {device.type} devices; cpu is always available"
        raise invalid("device", name, "a device that is available here", reason)
    return device


def mapped_device(device_map: Any) -> torch.device:
    """Return the device of the argument `device_map`: all networks of a pipeline are on the same one.

    Args:
        device_map: A device, its name or index, or one of `STRATEGIES`, which take the accelerator if there is one. A
            mapping is accepted if all its values are the same device.

    Raises:
        InputError: If it is anything else, or the device cannot be used here.
    """
    if isinstance(device_map, Mapping):
        devices = {str(mapped_device(device)) for device in device_map.values()}
        if len(devices) != 1:
            raise invalid("device_map", device_map, "one device for all networks, or 'balanced'")
        return torch.device(devices.pop())
    if isinstance(device_map, str) and device_map in STRATEGIES:
        return resolve_device()
    if isinstance(device_map, bool) or not isinstance(device_map, str | int | torch.device):
        raise invalid("device_map", device_map, f"a device, or one of {', '.join(STRATEGIES)}")
    return usable_device(device_map, "device_map")


def select_accelerator(method: str, gpu_id: Any, device: torch.device | str | int | None) -> torch.device:
    """Return the device that offloaded networks run on.

    Args:
        method: Name of the pipeline's method that offloads, for messages.
        gpu_id: Index of the accelerator; None for the index in `device`, or 0.
        device: Any device of torch; None for CUDA or MPS, whichever is available.

    Raises:
        InputError: If there is no accelerator, `gpu_id` or `device` is invalid, or they name different indices.
    """
    if gpu_id is not None and (isinstance(gpu_id, bool) or not isinstance(gpu_id, int) or gpu_id < 0):
        raise invalid("gpu_id", gpu_id, "the index of an accelerator, from 0, or None")
    selected = resolve_device() if device is None else usable_device(device)
    if device is None and selected.type == "cpu":
        raise InputError(
            f"{method}() needs an accelerator, but torch {torch.__version__} finds none here (CUDA or MPS); on a CPU "
            "call enable_low_memory() instead, or pass device="
        )
    if gpu_id is not None and selected.index not in (None, gpu_id):
        raise invalid("gpu_id", gpu_id, f"None or {selected.index}, the index in device={device!r}")
    if gpu_id and selected.type in ("cpu", "mps"):
        raise invalid("gpu_id", gpu_id, f"0 or None, because there is only one {selected.type} device")
    if selected.type == "cuda" or gpu_id:
        return usable_device(f"{selected.type}:{gpu_id or selected.index or 0}")
    return selected


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the floating-point type of a name.

    Args:
        name: Name of a type; "auto" for the fastest type that the device computes in natively (float16 on CUDA and MPS,
            bfloat16 on CPUs with instructions for it, else float32); None for the usual type (float16 on CUDA, else
            float32).
        device: Device that the networks run on.

    Raises:
        InputError: If the name is unknown.
    """
    if name is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    if name == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if computes_bfloat16() else torch.float32
        return torch.float16
    if name not in _DTYPES:
        raise invalid("dtype", name, f"one of {', '.join(DTYPE_NAMES)}")
    return _DTYPES[name]


def floating_dtype(dtype: Any, argument: str = "dtype") -> torch.dtype:
    """Return a floating-point type of torch.

    Args:
        dtype: The type.
        argument: Name of the argument, for the message.

    Raises:
        InputError: If it is anything else.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise invalid(argument, dtype, "a floating-point torch.dtype")
    return dtype


def computes_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 natively: x86 with AMX or AVX512-BF16, Arm with its BF16 extension.

    Others are faster in float32. Those with AVX-512 convert each product, those without it each layer
    (`kernels/half_precision.py`).
    """
    if platform.machine().lower() in ("x86_64", "amd64"):
        # These functions are not part of torch's public interface, and early releases lack them.
        checks = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
        return any(check is not None and check() for check in checks)
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def dtype_name(dtype: torch.dtype) -> str:
    """Return the long name of a dtype, such as "float32", which `resolve_dtype` accepts.

    Args:
        dtype: Any dtype of torch.
    """
    return str(dtype).removeprefix("torch.")


def _count(kind: str) -> int:
    if kind == "cuda":
        return torch.cuda.device_count()
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return int(kind == "cpu")
