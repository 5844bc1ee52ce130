"""Linear layers for CPUs, whose weights oneDNN lays out for itself: the same products, two to four times sooner.

The prior reads gigabytes of weights for every few rows, and the usual row-by-row layout makes poor use of the memory
and of the caches for that. `benchmarks/linear.py` measures what the layout gains.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.runtime import pages

WORTHWHILE = 2**20  # multiplications below which the plain product is as fast
ROWS = 64  # the layout that suits so many rows suits a few and thousands nearly as well


class Linear(nn.Linear):
    """`nn.Linear` that multiplies by a packed copy of its weight wherever no gradient is wanted on an x86 CPU.

    The copy is made at the first use and again whenever the weight changed, and is in no state dict. Changes that torch
    does not count, in place through `weight.data` or a numpy view, are noticed if they concern most of the weight. The
    copy takes as much memory as the weight, whose own memory is given back for as long as it is mapped from a file.
    Results differ from the plain layer's by rounding. `Linear.packing = False` switches it off.
    """

    packing: bool = True

    def forward(self, features: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        small = features.numel() * self.out_features < WORTHWHILE
        if small or not (self.packing and DTYPES and _can_pack(features, self.weight)):
            return F.linear(features, self.weight, self.bias)
        pack: _Pack | None = self.__dict__.get("_pack")
        if pack is None or not pack.holds(self.weight):
            pack = self.__dict__["_pack"] = _Pack(self.weight)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(features, pack.weight, self.bias, "none", [], "")
        return product

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        # moved or converted: the copy would stay in the CPU's memory, or fit other data that came to the same address
        self.__dict__.pop("_pack", None)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # copies and pickles make a packed weight of their own
        return {name: value for name, value in self.__dict__.items() if name != "_pack"}


class _Pack:
    """A packed weight, and which state of the plain one it was made of."""

    def __init__(self, weight: Tensor) -> None:
        self.source = weight
        self.version = weight._version
        self.address = weight.data_ptr()
        self.few = _few(weight).clone()
        with torch.no_grad():
            self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        pages.forget(weight)

    def holds(self, weight: Tensor) -> bool:
        # `module.to` keeps the parameter and gives it other data; an optimizer step counts up the version; averages of
        # weights and adapters are often merged through `weight.data`, which counts nothing
        same = self.source is weight and self.version == weight._version and self.address == weight.data_ptr()
        return same and torch.equal(self.few, _few(weight))


def _few(weight: Tensor) -> Tensor:
    """A few numbers from all over a weight."""
    rows, columns = (max(1, size // 4) for size in weight.shape)
    return weight.detach()[::rows, ::columns]


def _can_pack(features: Tensor, weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and features.device.type == "cpu"
        and weight.dtype == features.dtype
        and weight.dtype in DTYPES
        and not (torch.is_grad_enabled() and (weight.requires_grad or features.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not weight.is_inference()  # such tensors do not count their changes
    )


def _supported() -> tuple[torch.dtype, ...]:
    """Types with packed products here: float32, and bfloat16 where the CPU computes in it."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return ()
    try:  # not part of torch's public interface: a release without them leaves the plain product
        operators = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight
        bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return ()
    return (torch.float32, torch.bfloat16)[: 1 + bool(bfloat16 and operators)]


DTYPES = _supported()
