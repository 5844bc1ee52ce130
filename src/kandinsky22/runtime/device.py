"""Device and dtype policy: names a user can type, resolved to what torch has here."""

from __future__ import annotations

import platform
from typing import Any

import torch

from kandinsky22.errors import InputError

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
DTYPE_NAMES = ("auto", *_DTYPES)


def resolve_device(name: str = "auto") -> torch.device:
    """The device called `name`: "auto" (CUDA, then MPS, then the CPU), "cpu", "cuda", "cuda:1", "mps".

    Raises InputError when the name means nothing or the device is not there.
    """
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if _count(kind)))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}; accepted: auto, cpu, cuda, cuda:N, mps") from None
    present = _count(device.type)
    if (device.index or 0) >= present:
        what = f"{present} of them" if present else "none"
        raise InputError(f"device {name!r} is not available: torch {torch.__version__} sees {what} here; try cpu")
    return device


def usable_device(device: torch.device | str | int) -> torch.device:
    """`device` as torch knows it; raises InputError if nothing can be put there."""
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"device={device!r} is not usable here: {reason}") from error


def chosen_accelerator(method: str, gpu_id: Any, device: torch.device | str | int | None) -> torch.device:
    """The device that networks are to be offloaded from by `method`: the one given, or the first accelerator here.

    `gpu_id` is its number (0 unless given). Raises InputError if there is none, or for two different numbers.
    """
    if gpu_id is not None and (isinstance(gpu_id, bool) or not isinstance(gpu_id, int) or gpu_id < 0):
        raise InputError(f"gpu_id={gpu_id!r}; accepted: the number of an accelerator, from 0, or None")
    found = resolve_device() if device is None else usable_device(device)
    if device is None and found.type == "cpu":
        raise InputError(
            f"{method}: torch {torch.__version__} sees no accelerator here (CUDA or MPS). On a CPU-only machine call "
            "enable_low_memory(), which keeps only what works in memory; or pass device="
        )
    if gpu_id is not None and found.index not in (None, gpu_id):
        raise InputError(f"gpu_id={gpu_id} and device={device!r} name two accelerators; give the number once")
    if gpu_id and found.type in ("cpu", "mps"):
        raise InputError(f"gpu_id={gpu_id}: there is only one {found.type!r}; accepted: 0 or None")
    if found.type == "cuda" or gpu_id:
        return usable_device(f"{found.type}:{gpu_id or found.index or 0}")
    return found


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The floating-point type called `name`.

    None is what is usual: float16 on CUDA, else float32. "auto" is the fastest type that the device computes in by
    itself: float16 on CUDA and MPS, bfloat16 on CPUs with instructions for it (`computes_bfloat16`), else float32.
    Raises InputError for other names.
    """
    if name is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    if name == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if computes_bfloat16() else torch.float32
        return torch.float16
    if name not in _DTYPES:
        raise InputError(f"unknown dtype {name!r}; accepted: {', '.join(DTYPE_NAMES)}")
    return _DTYPES[name]


def computes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 numbers by itself: x86 with AMX or AVX512-BF16, Arm with its BF16.

    Others only convert them, which saves memory and takes more time.
    """
    if platform.machine().lower() in ("x86_64", "amd64"):
        # not part of torch's public interface; early releases do not tell
        asks = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
        return any(ask is not None and ask() for ask in asks)
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def dtype_name(dtype: torch.dtype) -> str:
    """The long name of `dtype`, as `resolve_dtype` reads it: "float32"."""
    return str(dtype).removeprefix("torch.")


def _count(kind: str) -> int:
    if kind == "cuda":
        return torch.cuda.device_count()
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return int(kind == "cpu")
