"""Linear layers for CPUs: the products of `torch.nn.functional.linear`, by oneDNN, in a half to a quarter of the time.

There are two ways, both equal to torch's product except for rounding:

- `apply_linear` multiplies by a *packed* copy of a layer's weight, in a layout of oneDNN's choice. The prior reads
  gigabytes of weights for a few rows of features, and the usual row-major layout makes poor use of memory and caches
  for that.
- `onednn_linear_layers` makes all linear layers, also those of other libraries, multiply by oneDNN without a copy. In
  float32 this takes half the time of torch's product on some processors.

`benchmarks/linear.py` measures what packing gains.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kandinsky22.kernels import half_precision, host_memory, settings
from kandinsky22.kernels.fingerprint import TensorFingerprint
from kandinsky22.kernels.locks import ObjectLock
from kandinsky22.kernels.modules import runs_own_forward

MIN_MULTIPLICATIONS = 2**20  # below this, torch's product is as fast
TENSOR_TYPES = (Tensor, nn.Parameter)  # subclasses, such as quantized tensors, define their products
PACKING_ROWS = 64  # oneDNN packs for a number of rows; the layout for 64 suits a few and thousands nearly as well


_packing = ObjectLock()  # several threads that need a copy make it once

LINEAR_FORWARD = nn.Linear.forward  # a library that replaces it for the whole process gets its calls


def packed_weight(layer: nn.Module, layout: str, pack: Callable[[Tensor], Any]) -> Any:
    """Return `pack(layer.weight)`, stored with the layer until the weight changes. One layout is stored at a time.

    The copy is made at the first use and again after every change of the weight (see `TensorFingerprint` for changes
    that are noticed). It is not part of the state dict, of pickles or of copies. While it exists, the memory of a
    weight that is mapped from a file is given back to the system.

    Args:
        layer: A layer with a parameter `weight`.
        layout: Name of the layout that `pack` makes.
        pack: Converts a weight.
    """
    weight: Any = layer.weight
    packed: _PackedWeight | None = layer.__dict__.get("_packed_weight")
    if packed is not None and packed.layout == layout and packed.is_current(weight):
        return packed.value
    with _packing:
        packed = layer.__dict__.get("_packed_weight")
        if packed is None or packed.layout != layout or not packed.is_current(weight):
            layer.__dict__.pop("_packed_weight", None)  # freed before the next one takes memory
            packed = layer.__dict__["_packed_weight"] = _PackedWeight(weight, layout, pack)
        return packed.value


def may_pack(layer: nn.Module) -> bool:
    """Return whether a layer may store a packed copy of its weight.

    A weight that is computed for each call, by a parametrization for example, would be packed for each call. The
    attribute `pack_weights` = False of a layer leaves that layer unpacked; the settings switch all layers.

    Args:
        layer: A layer with a `weight`.
    """
    return layer.__dict__.get("pack_weights", True) and layer._parameters.get("weight") is not None


def packing_layers(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a network that may store packed copies of their weights.

    Args:
        network: Any module.
    """
    return (module for module in network.modules() if isinstance(module, PackedWeightMixin) or _is_linear(module))


class PackedWeightMixin:
    """Mixin for classes of layers that store a packed copy of their `weight`; inherited before the torch layer.

    The copy is dropped when the layer is moved or converted: it would stay in the CPU's memory after a move, and after
    a conversion it could match other data that came to the same address. Networks do so for plain torch layers.
    """

    weight: Tensor

    def _packed(self, layout: str, pack: Callable[[Tensor], Any]) -> Any:
        return packed_weight(self, layout, pack)  # type: ignore[arg-type]  # the mixin of a module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.__dict__.pop("_packed_weight", None)
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed_weight"}


def stored_packed(layer: nn.Module) -> tuple[str, Any] | None:
    """Return name and value of the packed copy that a layer stores now; None if it stores none.

    Args:
        layer: Any module.
    """
    packed: _PackedWeight | None = layer.__dict__.get("_packed_weight")
    return None if packed is None else (packed.layout, packed.value)


def store_packed(layer: nn.Module, layout: str, value: Any) -> None:
    """Store a packed copy of a layer's weight that was made before, from equal values.

    Args:
        layer: A layer with a parameter `weight`.
        layout: Name of its layout.
        value: The copy.
    """
    weight: Any = layer.weight
    layer.__dict__["_packed_weight"] = _PackedWeight(weight, layout, lambda _: value)


def move_packed(source: nn.Module, target: nn.Module) -> None:
    """Give the packed copies of a network's layers to another network that has taken over the same parameters.

    Args:
        source: Network that gives.
        target: Network of the same structure.
    """
    layers = dict(target.named_modules())
    for path, layer in source.named_modules():
        packed = layer.__dict__.pop("_packed_weight", None)
        if packed is not None and packed.is_current(layers[path].weight):
            layers[path].__dict__["_packed_weight"] = packed


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

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # copies and pickles of a plain torch layer have None instead


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


def apply_linear(layer: nn.Module, features: Tensor) -> Tensor:
    """Return layer(features), by a packed copy of the weight wherever no gradient is needed on an x86 CPU.

    The layer is called unless it is a plain `nn.Linear` that nothing was attached to. In half precision on CPUs that do
    not multiply it, the product is that of `half_precision.py`, and nothing is stored. The copy takes as much memory as
    the weight. Without it (`pack_weights`, the setting `packed_linear`) the product is oneDNN's with the weight as it
    is.

    Args:
        layer: Any module in the position of a linear layer.
        features: Tensor (..., in_features).

    Returns:
        Tensor (..., out_features).
    """
    if torch.compiler.is_compiling():  # compiled code must not read sizes: it would be compiled for these only
        outside = getattr(layer, "_outside_graphs", None)
        return layer(features) if outside is None else outside(layer, features)
    if features.device.type != "cpu":
        return layer(features)
    if not (_is_linear(layer) and runs_own_forward(layer)):
        return _called(layer, features)
    weight: Any = layer.weight
    bias: Any = layer.bias
    if _is_slow(features, weight, bias):
        return half_precision.linear(features, weight, bias, _linear)
    if features.numel() * len(weight) < MIN_MULTIPLICATIONS:
        return F.linear(features, weight, bias)
    if may_pack(layer) and settings.current().packed_linear and can_pack(features, weight, bias):
        return onednn_linear(features, packed_weight(layer, "linear", pack_linear_weight), bias)
    return _linear(features, weight, bias)


def _is_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and nn.Linear.forward is LINEAR_FORWARD


def _called(layer: nn.Module, features: Tensor) -> Tensor:
    """Call a layer; its product, or those of layers that an adapter contains, are oneDNN's where that is faster."""
    with onednn_linear_layers() if isinstance(layer, nn.Linear) or layer._modules else contextlib.nullcontext():
        out: Tensor = layer(features)
    return out


def onednn_linear_layers() -> contextlib.AbstractContextManager[Any]:
    """Return a context manager in which `torch.nn.functional.linear` multiplies by oneDNN where that is faster.

    It acts on the calls of this thread, and therefore on all linear layers that run inside, whatever their class. With
    gradients, under autocast, in compiled code, for small products, for weights that are not contiguous and on other
    devices than x86 CPUs torch's product is used. Half precision that the CPU does not multiply is computed in float32.
    Results differ from torch's by rounding.
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
    if _is_slow(input, weight, bias):
        return half_precision.linear(input, weight, bias, _linear)
    if (
        not _is_small(input, weight)
        and settings.current().onednn_linear
        and can_multiply(input, weight, bias)
        and weight.is_contiguous()  # oneDNN multiplies other layouts one element at a time
    ):
        return onednn_linear(input, weight, bias)
    return F.linear(input, weight, bias)


def _is_slow(features: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        half_precision.is_slow(features, weight, bias)
        and features.numel() * len(weight) >= half_precision.MIN_MULTIPLICATIONS
    )


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
