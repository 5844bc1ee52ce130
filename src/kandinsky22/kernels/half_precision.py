"""Layers in bfloat16 or float16 on x86 CPUs that do not multiply these types: float32 products for one call at a time.

torch's own products of these types are slow there: on a CPU with AVX2 alone, a convolution takes a hundred times as
long as in float32, a linear layer six times. Converting weights and features to float32 for each call costs a small
part of the product, keeps the memory of half precision, and rounds the result once.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.kernels.modules import runs_own_forward

MIN_MULTIPLICATIONS = 2**16  # below this, torch's products are as fast
# Elements of a matrix, and of kernels, that are converted at a time: four and ten megabytes, which stay in the caches.
BLOCK = 2**20
KERNEL_BLOCK = 5 * 2**19
CHANNELS = 16  # output channels that oneDNN computes together
ROWS = 256  # more rows of features multiply a matrix that is converted at once: joining the parts would cost more

LayerT = TypeVar("LayerT", bound=nn.Module)


def _slow_types() -> tuple[torch.dtype, ...]:
    """Return the half-precision types that oneDNN does not multiply on this CPU."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return ()
    try:  # not part of torch's public interface
        is_fast = {
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        }
    except (AttributeError, RuntimeError):
        return ()
    return tuple(dtype for dtype, fast in is_fast.items() if not fast)


SLOW_TYPES = _slow_types()


def is_slow(features: Tensor, *parameters: Tensor | None) -> bool:
    """Return whether a layer is faster with float32 products, and nothing records the operation.

    Args:
        features: Input of the layer.
        *parameters: Its weight and bias; None for none.
    """
    if torch.compiler.is_compiling() or features.dtype not in SLOW_TYPES or features.device.type != "cpu":
        return False
    tensors = (features, *(tensor for tensor in parameters if tensor is not None))
    return (
        all(type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def linear(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear,
) -> Tensor:
    """Return features · weightᵀ + bias, computed in float32 and rounded to the type of the features.

    Args:
        features: Tensor (..., in_features).
        weight: Matrix (out_features, in_features).
        bias: Tensor (out_features,); None for no bias.
        multiply: Function that computes the product in float32.
    """
    dtype, features = features.dtype, features.float()
    bias = None if bias is None else bias.float()
    if weight.numel() <= BLOCK or features.numel() > ROWS * features.shape[-1]:
        return multiply(features, weight.float(), bias).to(dtype)
    rows = max(1, BLOCK // weight.shape[1])
    biases = [None] * -(-len(weight) // rows) if bias is None else bias.split(rows)
    parts = [multiply(features, part.float(), b).to(dtype) for part, b in zip(weight.split(rows), biases, strict=True)]
    return torch.cat(parts, dim=-1)


def call_conv(layer: nn.Module, features: Tensor) -> Tensor:
    """Return layer(features), with float32 products if the layer is a plain `nn.Conv2d` and they are faster.

    Args:
        layer: Any module in the position of a convolution.
        features: Tensor (batch, in, H, W).
    """
    is_plain = not torch.compiler.is_compiling() and type(layer) is nn.Conv2d and runs_own_forward(layer)
    if is_plain and is_slow(features, layer.weight, layer.bias):
        parts = [part(features.float()).to(features.dtype) for part in float32_layers(layer)]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    out: Tensor = layer(features)
    return out


def float32_layers(layer: LayerT) -> Iterator[LayerT]:
    """Yield layers with float32 parameters, for one call: together they have the output channels of a layer.

    A small layer yields one. The others are converted in parts, which stay in the caches until they are multiplied.

    Args:
        layer: A convolution without submodules.
    """
    parameters = {name: p for name, p in layer._parameters.items() if p is not None}
    weight = parameters["weight"]
    rows = len(weight)
    if weight.numel() > KERNEL_BLOCK:
        rows = max(CHANNELS, KERNEL_BLOCK // weight[0].numel() // CHANNELS * CHANNELS)
    for first in range(0, len(weight), rows):
        part: LayerT = object.__new__(type(layer))
        floats = {name: p.detach()[first : first + rows].float() for name, p in parameters.items()}
        part.__dict__.update(layer.__dict__, _parameters={"bias": None, **floats}, out_channels=len(floats["weight"]))
        part.__dict__.pop("_packed_weight", None)
        yield part
