"""Properties of the machine, its peak arithmetic, memory of a process, and operations of a call, for the benchmarks.

Peak arithmetic is that of the fastest of several convolutions and matrix products of the networks of Kandinsky 2.2, in
the usual and in packed layout. It is the limit that measured times are compared with.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

GIB = 2**30
STATUS = Path("/proc/self/status")

# Cases: (batch, input channels, output channels, side) of 3x3 convolutions; (rows, inputs, outputs) of matrix products.
CONVOLUTIONS = ((2, 384, 384, 64), (2, 768, 768, 32), (2, 1152, 1152, 16), (1, 512, 512, 64), (1, 256, 256, 256))
PRODUCTS = ((2048, 2048, 2048), (512, 2048, 8192), (8192, 768, 768), (2048, 1152, 1152))
SMALL_CONVOLUTIONS, SMALL_PRODUCTS = ((1, 64, 64, 32),), ((256, 256, 256),)


def cores() -> int:
    """Return the number of cores that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable is not None else os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Return processor, cores, memory, versions of packages, and the system's current load average."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    about = {"processor": _processor(), "cores": cores(), "memory_gib": _memory(), "python": platform.python_version()}
    about["versions"] = {name: installed(name) for name in ("torch", "diffusers", "transformers")}
    about["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return about


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {name.strip(): value.strip() for name, value in facts.items()}
    flags = values.get("flags", "").split()
    extensions = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags]
    return f"{values.get('model name', platform.machine())} ({', '.join(extensions) or platform.machine()})"


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)
    except (ValueError, OSError, AttributeError):
        return None


# Memory


def status(name: str, path: Path = STATUS) -> float | None:
    """Return a size in GiB from a process's status file.

    Args:
        name: "VmHWM" for the peak resident memory, "RssAnon" for the current memory that is not backed by files.
        path: The status file.

    Returns:
        The size, or None on systems other than Linux.
    """
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / GIB for line in lines if line.startswith(f"{name}:")), None)


def peak_memory() -> float:
    """Return the peak memory of this process in GiB, including pages of mapped files."""
    peak = status("VmHWM")
    if peak is None:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "linux" else GIB)
    return peak


def forget_peak() -> bool:
    """Reset the peak of `peak_memory`.

    Returns:
        Whether the system supports it; Linux does.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


# Arithmetic


def peaks(dtype: str, device: str = "cpu", *, seconds: float = 0.4, small: bool = False) -> dict[str, float]:
    """Return the peak floating-point operations per second of convolutions and of matrix products.

    Args:
        dtype: Name of a dtype of torch.
        device: "cpu" or "cuda".
        seconds: Time for which each case is repeated; its shortest call counts.
        small: Whether to measure small cases, for tests.

    Returns:
        Operations per second by "convolution" and "product".
    """
    import torch

    kind, generator = getattr(torch, dtype), torch.Generator().manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=kind)

    def convolutions() -> Iterable[tuple[float, Callable[[], object]]]:
        for batch, inputs, outputs, side in SMALL_CONVOLUTIONS if small else CONVOLUTIONS:
            features = random(batch, inputs, side, side).contiguous(memory_format=torch.channels_last)
            weight = random(outputs, inputs, 3, 3).contiguous(memory_format=torch.channels_last)
            work = 2.0 * batch * side * side * inputs * outputs * 9
            yield work, lambda f=features, w=weight: torch.nn.functional.conv2d(f, w, padding=1)
            if device == "cpu" and (packed := _packed_convolution(features, weight)):
                yield work, packed

    def products() -> Iterable[tuple[float, Callable[[], object]]]:
        for rows, inputs, outputs in SMALL_PRODUCTS if small else PRODUCTS:
            features, weight = random(rows, inputs), random(outputs, inputs)
            work = 2.0 * rows * inputs * outputs
            yield work, lambda f=features, w=weight: torch.nn.functional.linear(f, w)
            if device == "cpu" and (packed := _packed_product(features, weight)):
                yield work, packed

    wait = torch.cuda.synchronize if device.startswith("cuda") else None
    with torch.no_grad():
        return {
            "convolution": max(work / _best(call, seconds, wait) for work, call in convolutions()),
            "product": max(work / _best(call, seconds, wait) for work, call in products()),
        }


def _best(call: Callable[[], object], seconds: float, wait: Callable[[], None] | None) -> float:
    """Return the shortest of the calls that fit into `seconds`, after a warm-up call."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if wait is not None:
            wait()
        return time.perf_counter() - start

    once()
    best, end = once(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, once())
    return best


def _packed_convolution(features: Any, weight: Any) -> Callable[[], object] | None:
    import torch

    settings = [1, 1], [1, 1], [1, 1], 1  # padding, stride, dilation, groups
    try:
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *settings, list(features.shape))
    except (AttributeError, RuntimeError):
        return None
    return lambda: torch.ops.mkldnn._convolution_pointwise(features, packed, None, *settings, "none", [], "")


def _packed_product(features: Any, weight: Any) -> Callable[[], object] | None:
    import torch

    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(features))
    except (AttributeError, RuntimeError):
        return None
    return lambda: torch.ops.mkldnn._linear_pointwise(features, packed, None, "none", [], "")


class _NoModules(contextlib.nullcontext[None]):
    """A tracker of modules that counts everything for the whole call."""

    parents = frozenset({"Global"})


def count_operations(call: Callable[[], object]) -> dict[str, int]:
    """Return the floating-point operations of a call.

    Operators of packed layers, which torch's counter does not know, are counted as well.

    Args:
        call: Function without arguments.

    Returns:
        Operations by "convolution" and "product" (matrix products including attention).
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def product(features: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return int(2 * torch.Size(out_shape).numel() * features[-1])

    def convolution(features: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return int(2 * torch.Size(out_shape).numel() * weight[1] * weight[2] * weight[3])

    def convolution_add(residual: Any, features: Any, weight: Any, *_: Any, **__: Any) -> int:
        return convolution(features, weight, out_shape=residual)

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        batch, heads, rows, width = query
        return int(2 * batch * heads * rows * key[2] * (width + value[3]))

    formulas: dict[Any, Any] = {}
    for space, name, formula in (
        ("mkldnn", "_linear_pointwise", product),
        ("mkldnn", "_convolution_pointwise", convolution),
        ("mkldnn", "_convolution_pointwise_", convolution_add),
        ("aten", "_scaled_dot_product_flash_attention_for_cpu", attention),
    ):
        if (operator := getattr(getattr(torch.ops, space), name, None)) is not None:
            formulas[operator] = formula
    counter: Any = FlopCounterMode(display=False, custom_mapping=formulas)
    # The counter's tracker hooks all modules, and hooked networks of ours run without their fast methods.
    counter.mod_tracker = _NoModules()
    with counter:
        call()
    counts = {"convolution": 0, "product": 0}
    for operator, count in counter.get_flop_counts().get("Global", {}).items():
        counts["convolution" if "conv" in str(operator) else "product"] += count
    return counts
