"""Device and dtype policy: names a user can type, resolved to what torch has here."""

from __future__ import annotations

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


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The floating-point type called `name`; "auto" is float16 on CUDA, where it is the custom, else float32.

    Raises InputError for other names.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise InputError(f"unknown dtype {name!r}; accepted: {', '.join(DTYPE_NAMES)}")
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The long name of `dtype`, as `resolve_dtype` reads it: "float32"."""
    return str(dtype).removeprefix("torch.")


def _count(kind: str) -> int:
    if kind == "cuda":
        return torch.cuda.device_count()
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return int(kind == "cpu")
