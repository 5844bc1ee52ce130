"""Linear layers for CPUs: the products of `torch.nn.functional.linear`, by oneDNN, in a half to a quarter of the time.

There are two ways, both equal to torch's product except for rounding:

- `Linear` multiplies by a *packed* copy of its weight, in a layout of oneDNN's choice. The prior reads gigabytes of
  weights for a few rows of features, and the usual row-major layout makes poor use of memory and caches for that.
- `onednn_linear_layers` makes all linear layers, also those of other libraries, multiply by oneDNN without a copy. In
  float32 this takes half the time of torch's product on some processors.

`benchmarks/linear.py` measures what packing gains.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kandinsky22.kernels import host_memory, settings
from kandinsky22.kernels.fingerprint import TensorFingerprint

MIN_MULTIPLICATIONS = 2**20  # below this, torch's product is as fast
TENSOR_TYPES = (Tensor, nn.Parameter)  # subclasses, such as quantized tensors, define their products
PACKING_ROWS = 64  # oneDNN packs for a number of rows; the layout for 64 suits a few and thousands nearly as well


class PackedWeightMixin:
    """Mixin for layers that store a copy of their `weight` in another layout; inherited before the torch layer.

    The copy is made at the first use and again after every change of the weight (see `TensorFingerprint` for changes
    that are noticed). It is not part of the state dict, of pickles or of copies. While it exists, the memory of a
    weight that is mapped from a file is given back to the system.

    Attributes:
        pack_weights: False on an instance leaves that layer unpacked; the settings switch all layers.
    """

    pack_weights: bool = True
    weight: Tensor

    def _packed(self, layout: str, pack: Callable[[Tensor], Any]) -> Any:
        """Return `pack(weight)`, stored until the weight changes. Only one layout is stored at a time."""
        packed: _PackedWeight | None = self.__dict__.get("_packed_weight")
        if packed is None or packed.layout != layout or not packed.is_current(self.weight):
            self.__dict__.pop("_packed_weight", None)  # freed before the next one takes memory
            packed = self.__dict__["_packed_weight"] = _PackedWeight(self.weight, layout, pack)
        return packed.value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # After a move the copy would stay in the CPU's memory; after a conversion it could match other data that came
        # to the same address.
        self.__dict__.pop("_packed_weight", None)
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed_weight"}


class _PackedWeight:
    """A weight in another layout, with the state of the weight that it was made from."""

    def __init__(self, weight: Tensor, layout: str, pack: Callable[[Tensor], Any]) -> None:
        self.layout = layout
        self._source = weight  # referenced, so that no other tensor can get its address
        self._fingerprint = TensorFingerprint(weight, samples_per_side=5)
        host_memory.raise_mmap_threshold()  # layers with packed weights have large features
        with torch.no_grad():
            self.value = pack(weight.detach())
        host_memory.drop_mapped_pages(weight)

    def is_current(self, weight: Tensor) -> bool:
        return self._source is weight and self._fingerprint.matches(weight)


def drop_packed(network: nn.Module, layout: str | None = None) -> None:
    """Free the packed weights of a network's layers. They are packed again at their next use.

    Args:
        network: Network whose layers are searched.
        layout: Name of the layout to free, such as "winograd"; None frees all.
    """
    layers = []
    for layer in network.modules():
        packed: _PackedWeight | None = layer.__dict__.get("_packed_weight")
        if packed is not None and layout in (None, packed.layout):
            layers.append(layer)
    for layer in layers:
        layer.__dict__.pop("_packed_weight", None)  # another thread may have done so
    if layers:
        host_memory.malloc_trim()


class Linear(PackedWeightMixin, nn.Linear):
    """`nn.Linear` that multiplies by a packed copy of its weight wherever no gradient is needed on an x86 CPU.

    The copy takes as much memory as the weight. Without it (`pack_weights`, the setting `packed_linear`) the layer
    multiplies by oneDNN with the weight as it is.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Return features (..., out_features).

        Args:
            features: Tensor (..., in_features).
        """
        if _is_small(features, self.weight):
            return F.linear(features, self.weight, self.bias)
        packs = self.pack_weights and settings.current().packed_linear
        if packs and can_pack(features, self.weight, self.bias):
            return onednn_linear(features, self._packed("linear", pack_linear_weight), self.bias)
        return _linear(features, self.weight, self.bias)


def onednn_linear_layers() -> contextlib.AbstractContextManager[Any]:
    """Return a context manager in which `torch.nn.functional.linear` multiplies by oneDNN where that is faster.

    It acts on the calls of this thread, and therefore on all linear layers that run inside, whatever their class. With
    gradients, under autocast, in compiled code, for small products, for weights that are not contiguous and on other
    devices than x86 CPUs torch's product is used. Results differ from it by rounding.
    """
    if torch.compiler.is_compiling() or not (ONEDNN_DTYPES and settings.current().onednn_linear):
        return contextlib.nullcontext()
    return _OneDnnLinearMode()


class _OneDnnLinearMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear` (same argument names) by oneDNN where that is faster, with the weight as it is."""
    if (
        not _is_small(input, weight)
        and settings.current().onednn_linear
        and can_multiply(input, weight, bias)
        and weight.is_contiguous()  # oneDNN multiplies other layouts one element at a time
    ):
        return onednn_linear(input, weight, bias)
    return F.linear(input, weight, bias)


def _is_small(features: Tensor, weight: Tensor) -> bool:
    # Compiled code must not read sizes here: it would then be compiled for these sizes only.
    return torch.compiler.is_compiling() or features.numel() * weight.shape[0] < MIN_MULTIPLICATIONS


def pack_linear_weight(weight: Tensor) -> Tensor:
    """Return a matrix in the layout that oneDNN prefers, for `onednn_linear`.

    Args:
        weight: Matrix (out_features, in_features).
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKING_ROWS)
    return packed


def onednn_linear(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return features · weightᵀ + bias, (..., out_features), computed by oneDNN.

    Args:
        features: Tensor (..., in_features), float32 or bfloat16, on the CPU.
        weight: Matrix (out_features, in_features) of the same dtype, packed by `pack_linear_weight` or not.
        bias: Tensor (out_features,), None for no bias.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(features, weight, bias, "none", [], "")
    return product


def can_pack(features: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether a layer may multiply by a packed copy of its weight.

    As `can_multiply`, except for weights of inference mode: their changes cannot be detected.

    Args:
        features: Input of the layer.
        weight: Weight of the layer.
        bias: Bias of the layer, None for none.
    """
    return can_multiply(features, weight, bias) and not weight.is_inference()


def can_multiply(features: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether oneDNN can multiply these tensors, and nothing records the operation.

    Args:
        features: Input of the product.
        weight: Matrix or convolution weight.
        bias: Bias, None for none.
    """
    return (
        bool(ONEDNN_DTYPES)
        and type(features) in TENSOR_TYPES
        and type(weight) in TENSOR_TYPES
        and weight.device.type == "cpu"
        and features.device.type == "cpu"
        and weight.dtype == features.dtype
        and weight.dtype in ONEDNN_DTYPES
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, features, bias)))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    """Return the types that oneDNN multiplies on this machine: float32, and bfloat16 where the CPU computes in it."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return ()
    try:  # not part of torch's public interface: without these operators torch's product is used
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


ONEDNN_DTYPES = _onednn_dtypes()
