"""Layers in bfloat16 or float16 on x86 CPUs whose oneDNN does not multiply these types: float32 products.

torch's own products of these types are slow there: on a CPU with AVX2 alone, a convolution takes a hundred times as
long as in float32, and a linear layer six times. The weight and the features of a layer are converted to float32 while
it runs, which costs a small part of the product. Weights take the memory of half precision between calls.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.kernels import settings
from kandinsky22.kernels.modules import runs_own_forward

MIN_MULTIPLICATIONS = 2**16  # below this, torch's products are as fast
# Elements of a matrix, and of kernels, that are converted at a time: four and ten megabytes, which stay in the caches.
BLOCK = 2**20
KERNEL_BLOCK = 5 * 2**19
CHANNELS = 16  # output channels that oneDNN computes together
# With more rows of features, a matrix is converted at once: its conversion counts less, and joining results more.
ROWS = 256

# From features, weight and bias to the result.
Product: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _slow_types() -> tuple[torch.dtype, ...]:
    """Return the half-precision types that oneDNN does not multiply on this CPU."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return ()
    try:  # not part of torch's public interface
        support = {
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        }
    except (AttributeError, RuntimeError):
        return ()
    return tuple(dtype for dtype, is_supported in support.items() if not is_supported)


SLOW_TYPES = _slow_types()


def is_slow(features: Tensor, *parameters: Tensor | None) -> bool:
    """Return whether float32 products are faster, and nothing records the operation.

    Args:
        features: Input of the layer.
        *parameters: Other tensors that are multiplied or added; None for none.
    """
    if torch.compiler.is_compiling() or features.dtype not in SLOW_TYPES or not settings.current().float32_products:
        return False
    tensors = (features, *(tensor for tensor in parameters if tensor is not None))
    return (
        all(type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" for tensor in tensors)
        and all(tensor.dtype == features.dtype for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def linear(features: Tensor, weight: Tensor, bias: Tensor | None, multiply: Product = F.linear) -> Tensor:
    """Return features · weightᵀ + bias, computed in float32 and rounded to the type of the features.

    Args:
        features: Tensor (..., in_features).
        weight: Matrix (out_features, in_features).
        bias: Tensor (out_features,); None for no bias.
        multiply: Function that computes the product in float32.
    """
    rows = len(weight)
    if weight.numel() > BLOCK and features.numel() <= ROWS * features.shape[-1]:
        rows = max(1, BLOCK // weight.shape[1])
    return _in_parts(multiply, features, weight, bias, rows, dim=-1)


def convolve(features: Tensor, weight: Tensor, bias: Tensor | None, convolution: Product) -> Tensor:
    """Return a convolution with one group, computed in float32 and rounded to the type of the features.

    Args:
        features: Tensor (batch, in, H, W).
        weight: Kernels (out, in, height, width).
        bias: Tensor (out,); None for no bias.
        convolution: Function that computes it in float32.
    """
    rows = len(weight)
    if weight.numel() > KERNEL_BLOCK:
        rows = max(CHANNELS, KERNEL_BLOCK // weight[0].numel() // CHANNELS * CHANNELS)
    return _in_parts(convolution, features, weight, bias, rows, dim=-3)


def call_conv(layer: nn.Module, features: Tensor) -> Tensor:
    """Return layer(features), with float32 products if the layer is a plain `nn.Conv2d` and they are faster.

    Args:
        layer: Any module in the position of a convolution.
        features: Tensor (batch, in, H, W).
    """
    if (
        not torch.compiler.is_compiling()
        and isinstance(layer, nn.Conv2d)
        and type(layer) is nn.Conv2d
        and layer.groups == 1
        and runs_own_forward(layer)
        and is_slow(features, layer.weight, layer.bias)
    ):
        return convolve(features, layer.weight, layer.bias, layer._conv_forward)
    out: Tensor = layer(features)
    return out


def _in_parts(
    product: Product, features: Tensor, weight: Tensor, bias: Tensor | None, rows: int, *, dim: int
) -> Tensor:
    """Apply a product to `rows` rows of the weight at a time, and join the results along `dim`."""
    floats, parts = features.float(), []
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        part_bias = None if bias is None else bias.detach()[part].float()
        parts.append(product(floats, weight.detach()[part].float(), part_bias).to(features.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
