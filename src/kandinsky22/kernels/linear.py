"""Linear layers for CPUs, by oneDNN, whose weights it lays out for itself: the same products, two to four times sooner.

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

from kandinsky22.kernels import host_memory

WORTHWHILE = 2**20  # multiplications below which the plain product is as fast
PLAIN = (Tensor, nn.Parameter)  # others, such as quantized ones, have products of their own
ROWS = 64  # the layout that suits so many rows suits a few and thousands nearly as well


class Packs:
    """A layer that keeps a rearranged copy of its `weight` for the CPU; to be inherited before the plain layer.

    The copy is made at the first use and again whenever the weight changed, and is in no state dict. Changes that torch
    does not count, in place through `weight.data` or a numpy view, are noticed if they concern most of the weight. The
    weight's own memory is given back for as long as it is mapped from a file. `packing = False`, on the layer or on its
    class, switches all of this off.
    """

    packing: bool = True
    weight: Tensor

    def _packed(self, kind: str, make: Callable[[Tensor], Any]) -> Any:
        """What `make` makes of the weight, as long as the weight stays as it is. Only one kind is kept."""
        pack: _Pack | None = self.__dict__.get("_pack")
        if pack is None or pack.kind != kind or not pack.holds(self.weight):
            self.__dict__.pop("_pack", None)  # before the other one takes memory too
            pack = self.__dict__["_pack"] = _Pack(self.weight, kind, make)
        return pack.made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # moved or converted: the copy would stay in the CPU's memory, or fit other data that came to the same address
        self.__dict__.pop("_pack", None)
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        # copies and pickles make a packed weight of their own
        return {name: value for name, value in self.__dict__.items() if name != "_pack"}


def give_up(network: nn.Module, kind: str) -> None:
    """Forget a network's copies of this kind until they are needed again."""
    layers = [layer for layer in network.modules() if getattr(layer.__dict__.get("_pack"), "kind", None) == kind]
    for layer in layers:
        layer.__dict__.pop("_pack", None)  # another thread may have done so
    if layers:
        host_memory.trim()


class DirectLinear(nn.Linear):
    """`nn.Linear` that multiplies by oneDNN wherever no gradient is wanted on an x86 CPU, by its weight as it is.

    In float32 that takes half the time of torch's own product on processors for which that was not made. Results differ
    by rounding. `direct = False`, on a layer or the class, switches it off.
    """

    direct: bool = True

    def forward(self, features: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        weight, bias = self.weight, self.bias
        suits = self.direct and not self._is_small(features) and can_multiply(features, weight, bias)
        if not suits or not weight.is_contiguous():  # other layouts are multiplied number by number
            return F.linear(features, weight, bias)
        return product(features, weight, bias)

    def _is_small(self, features: Tensor) -> bool:
        # compiled code asks for no sizes here, which it would then be made for
        return torch.compiler.is_compiling() or features.numel() * self.out_features < WORTHWHILE


class Linear(Packs, DirectLinear):
    """`DirectLinear` that keeps a packed copy of its weight and multiplies by that.

    The copy takes as much memory as the weight.
    """

    def forward(self, features: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if not self.packing or self._is_small(features) or not can_pack(features, self.weight, self.bias):
            return super().forward(features)
        return product(features, self._packed("linear", packed_matrix), self.bias)


def make_direct(network: nn.Module) -> None:
    """Have the plain linear layers of somebody else's network multiply by oneDNN."""
    for layer in network.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = DirectLinear


def packed_matrix(weight: Tensor) -> Tensor:
    """A matrix (out, in) as oneDNN likes it best, for `product`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return packed


def product(features: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by a matrix, packed or not."""
    made: Tensor = torch.ops.mkldnn._linear_pointwise(features, matrix, bias, "none", [], "")
    return made


class _Pack:
    """What was made of a weight, and of which state of it."""

    def __init__(self, weight: Tensor, kind: str, make: Callable[[Tensor], Any]) -> None:
        self.kind = kind
        self.source = weight
        self.version = weight._version
        self.address = weight.data_ptr()
        self.few = _few(weight).clone()
        host_memory.expect_large()  # where weights are packed, features are large
        with torch.no_grad():
            self.made = make(weight.detach())
        host_memory.forget(weight)

    def holds(self, weight: Tensor) -> bool:
        # `module.to` keeps the parameter and gives it other data; an optimizer step counts up the version; averages of
        # weights and adapters are often merged through `weight.data`, which counts nothing
        same = self.source is weight and self.version == weight._version and self.address == weight.data_ptr()
        return same and torch.equal(self.few, _few(weight))


def _few(weight: Tensor) -> Tensor:
    """A few numbers from all over a weight."""
    rows, columns = (max(1, size // 4) for size in weight.shape[:2])
    return weight.detach()[::rows, ::columns]


def can_pack(features: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a layer may multiply by a copy of its weight; not of one that does not count its changes."""
    return can_multiply(features, weight, bias) and not weight.is_inference()


def can_multiply(features: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN can multiply these, and nothing has to keep a trace of it."""
    return (
        bool(DTYPES)
        and type(features) in PLAIN
        and type(weight) in PLAIN
        and weight.device.type == "cpu"
        and features.device.type == "cpu"
        and weight.dtype == features.dtype
        and weight.dtype in DTYPES
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, features, bias)))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def _supported() -> tuple[torch.dtype, ...]:
    """Types with packed products here: float32, and bfloat16 where the CPU computes in it."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return ()
    try:  # not part of torch's public interface: a release without them leaves the plain product
        operators = (
            torch.ops.mkldnn._linear_pointwise,
            torch.ops.mkldnn._reorder_linear_weight,
            torch.ops.mkldnn._convolution_pointwise,
            torch.ops.mkldnn._convolution_pointwise_,
            torch.ops.mkldnn._reorder_convolution_weight,
        )
        bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return ()
    return (torch.float32, torch.bfloat16)[: 1 + bool(bfloat16 and operators)]


DTYPES = _supported()
