"""Layers with weights of 8 or 4 bits. Their weights are plain parameters, which move, offload and save like any others.

Linear layers use torchao's products: the parts of torchao's tensor are stored as parameters, and the tensor is put
together again for each call. torchao has no convolution that is faster than the original one, so convolutions use
oneDNN's integer convolution (on x86 CPUs) or convert their weight for each call.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import platform
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.errors import InputError
from kandinsky22.kernels import half_precision
from kandinsky22.kernels.linear import PackedWeightMixin

GROUP = 32  # elements of a 4-bit weight that share a scale and a zero point; input features must be a multiple of it
ROWS_INT4 = 16  # output features of a 4-bit weight must be a multiple of it
ZERO_POINT = 128  # zero point of a symmetric range of unsigned 8-bit values
MAX_INT8 = 127.0  # largest absolute value of an 8-bit weight


@functools.cache
def torchao() -> Any:
    """Import torchao, without its warnings about each CUDA library that a CPU cannot load.

    Returns:
        The module `torchao.quantization`.
    """
    # The second logger is torch's: it warns about a deprecated call that torchao makes while it is imported.
    with _errors_only("torchao"), _errors_only("torch.utils._pytree"):
        import torchao.quantization

    return torchao.quantization


@contextlib.contextmanager
def _errors_only(name: str) -> Iterator[None]:
    """Suppress the warnings of one logger and those below it."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def configuration(kind: str) -> Any:
    """Return torchao's configuration for the weight of a linear layer.

    Args:
        kind: One of `quantize.KINDS`.
    """
    if kind == "int8":
        return torchao().Int8WeightOnlyConfig()
    if kind == "int8-dynamic":
        return torchao().Int8DynamicActivationInt8WeightConfig()
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=GROUP)


def quantized_matrix(weight: Tensor, kind: str) -> Tensor:
    """Return torchao's quantized tensor of a matrix.

    Args:
        weight: Matrix of shape (out, in).
        kind: One of `quantize.KINDS`.
    """
    holder = nn.Sequential(nn.Linear(1, 1, bias=False))
    holder[0].weight = nn.Parameter(weight.detach(), requires_grad=False)
    torchao().quantize_(holder, configuration(kind), filter_fn=lambda module, _: isinstance(module, nn.Linear))
    quantized: Tensor = holder[0].weight
    return quantized


@functools.lru_cache(maxsize=64)
def _tensor_layout(kind: str, out_features: int, in_features: int) -> tuple[type, dict[str, Any], dict[str, Tensor]]:
    """Return class and attributes of torchao's tensor for a matrix of this shape, and its parts without values."""
    example = quantized_matrix(torch.zeros(out_features, in_features, dtype=torch.bfloat16), kind)
    names, attributes = example.__tensor_flatten__()  # type: ignore[attr-defined]
    return type(example), dict(attributes), {name: getattr(example, name).to("meta") for name in names}


class LowRankMixin:
    """Mixin for quantized layers, which take no updates into their weights: they add a low-rank product to their own.

    The factors are buffers that no checkpoint contains, and move and convert with the layer.
    """

    def set_low_rank(self, factors: tuple[Tensor, Tensor] | None) -> None:
        """Set the factors of the product.

        Args:
            factors: Down (rank, in) or kernels (rank, in, height, width), and up (out, rank); None for no product.
        """
        layer: Any = self
        floating = next(tensor for tensor in (layer.bias, *layer.parameters()) if _is_floating(tensor))
        for name, factor in zip(("low_rank_down", "low_rank_up"), factors or (None, None), strict=True):
            value = None if factor is None else factor.to(floating.device, floating.dtype)
            layer.register_buffer(name, value, persistent=False)

    def plus_low_rank(self, out: Tensor, features: Tensor) -> Tensor:
        """Return the output of a linear layer with the low-rank product of its features added, if there is one.

        Args:
            out: Output without the product (..., out).
            features: Input of the layer (..., in).
        """
        if self.low_rank is None:
            return out
        down, up = (factor.to(features.dtype) for factor in self.low_rank)
        return out + _linear(_linear(features, down), up)

    @property
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Factors of the product; None if there is none."""
        down: Tensor | None = getattr(self, "low_rank_down", None)
        return None if down is None else (down, getattr(self, "low_rank_up"))  # noqa: B009 - a buffer


def _linear(features: Tensor, weight: Tensor) -> Tensor:
    if half_precision.is_slow(features, weight):
        return half_precision.linear(features, weight, None)
    return F.linear(features, weight)


def _is_floating(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point() and tensor.dtype.itemsize > 1


class QuantizedLinear(LowRankMixin, nn.Module):
    """`nn.Linear` whose weight is stored as the parts of torchao's quantized tensor."""

    bias: Tensor | None
    weight_qdata: Tensor

    def __init__(self, kind: str, in_features: int, out_features: int, bias: Tensor | None) -> None:
        """Create a layer without weight, on the meta device.

        Args:
            kind: One of `quantize.KINDS`.
            in_features: Number of input features.
            out_features: Number of output features.
            bias: Vector of shape (out_features,), or None for a layer without bias.
        """
        super().__init__()
        self.kind, self.in_features, self.out_features = kind, in_features, out_features
        _, _, parts = _tensor_layout(kind, out_features, in_features)
        for name, part in parts.items():
            self.register_parameter(f"weight_{name}", nn.Parameter(torch.empty_like(part), requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def from_linear(cls, layer: nn.Linear, kind: str) -> QuantizedLinear:
        """Return a quantized form of a layer.

        Args:
            layer: The layer; it is not changed.
            kind: One of `quantize.KINDS`.
        """
        quantized = cls(kind, layer.in_features, layer.out_features, layer.bias)
        weight = quantized_matrix(layer.weight, kind)
        for name in quantized._part_names():
            part = getattr(weight, name).detach().clone()
            setattr(quantized, f"weight_{name}", nn.Parameter(part, requires_grad=False))
        return quantized

    def _part_names(self) -> list[str]:
        return list(_tensor_layout(self.kind, self.out_features, self.in_features)[2])

    def forward(self, features: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            features: Tensor of shape (..., in_features).

        Returns:
            Tensor of shape (..., out_features).

        Raises:
            InputError: If the weight is int4 and the features are not bfloat16 on a CPU.
        """
        if self.kind == "int4" and (features.dtype != torch.bfloat16 or features.device.type != "cpu"):
            raise InputError(f"int4 weights compute in bfloat16 on CPUs, not {features.dtype} on {features.device}")
        if self.kind != "int4" and half_precision.is_slow(features, self.bias):
            bias = None if self.bias is None else self.bias.float()
            out = self._multiply(features.float(), bias).to(features.dtype)
        else:
            out = self._multiply(features, self.bias)
        return self.plus_low_rank(out, features)

    def _multiply(self, features: Tensor, bias: Tensor | None) -> Tensor:
        tensor_class, attributes, _ = _tensor_layout(self.kind, self.out_features, self.in_features)
        if "dtype" in attributes:
            attributes = {**attributes, "dtype": features.dtype}
        parts = {name: getattr(self, f"weight_{name}").detach() for name in self._part_names()}
        shape, stride = torch.Size((self.out_features, self.in_features)), (self.in_features, 1)
        weight = tensor_class.__tensor_unflatten__(parts, attributes, shape, stride)  # type: ignore[attr-defined]
        return F.linear(features, weight, bias)

    @property
    def unquantized_shape(self) -> tuple[int, ...]:
        """Shape of the weight that the parts stand for."""
        return self.out_features, self.in_features

    def portable_weight(self) -> Tensor:
        """Return the 4-bit values row by row, two per byte, from the order that suits this kind of CPU."""
        packed = self.weight_qdata.detach()
        values = torch.stack([packed & 15, packed >> 4], dim=-1).flatten()
        rows = torch.empty_like(values)
        rows[_packed_order(self.out_features, self.in_features)] = values
        low, high = rows.view(self.out_features, -1, 2).unbind(-1)
        return low | high << 4

    def arrange_weight(self) -> None:
        """Convert the 4-bit values from the order of `portable_weight` to the one that suits this CPU."""
        stored = self.weight_qdata.detach()
        values = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
        self.weight_qdata = nn.Parameter(packed, requires_grad=False)


def _packed_order(rows: int, columns: int) -> Tensor:
    """Return the indices (row by row) of the 4-bit values, in the order in which torch packs them.

    torch does not document the order, and it depends on the CPU. Therefore the indices themselves are packed, four bits
    at a time.
    """
    indices = torch.arange(rows * columns).view(rows, columns)
    order = torch.zeros(rows * columns, dtype=torch.int64)
    for shift in range(0, (rows * columns - 1).bit_length(), 4):
        bits = (indices >> shift & 15).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(bits, 1)
        order |= torch.stack([packed & 15, packed >> 4], dim=-1).flatten().long() << shift
    return order


class QuantizedConv2d(LowRankMixin, PackedWeightMixin, nn.Module):
    """`nn.Conv2d` with 8-bit weights and one scale per output channel."""

    bias: Tensor | None

    def __init__(self, layer: nn.Conv2d, *, dynamic: bool) -> None:
        """Quantize a layer, which is not changed.

        Args:
            layer: The layer, with one group and no dilation.
            dynamic: Whether activations are rounded to integers up to `largest_level` too, between the smallest and the
                largest of each batch item, and multiplied as integers, wherever oneDNN supports it. Elsewhere, and if
                False, the weight is converted for each call.
        """
        super().__init__()
        self.dynamic = dynamic
        self.stride, self.padding = list(layer.stride), [int(side) for side in layer.padding]
        weight = layer.weight.detach()
        levels, scale = rounded_weight(weight)
        self.weight = nn.Parameter(levels, requires_grad=False)
        self.scale = nn.Parameter(scale.to(weight.dtype), requires_grad=False)
        bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, features: Tensor, upsample: bool = False) -> Tensor:
        """Apply the layer.

        Args:
            features: Tensor of shape (batch, in, H, W).
            upsample: Whether the features are first upsampled by two, by nearest neighbour.

        Returns:
            Tensor of shape (batch, out, H', W').
        """
        if upsample:
            features = F.interpolate(features, scale_factor=2.0, mode="nearest")
        out = self._convolve(features)
        if (low_rank := self.low_rank) is not None:
            down, up = (factor.to(features.dtype) for factor in low_rank)
            reduced = self._float_convolution(features, down)
            out = out + _linear(reduced.movedim(1, -1), up).movedim(-1, 1)
        return out

    @property
    def unquantized_shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.weight.shape)

    def _convolve(self, features: Tensor) -> Tensor:
        if self.dynamic and HAS_INTEGER_CONVOLUTION and features.device.type == "cpu":
            # Item by item, so that an image does not depend on the others of its batch.
            return torch.cat([self._integer_convolution(item) for item in features.split(1)])
        if half_precision.is_slow(features, self.scale, self.bias):
            out = F.conv2d(features.float(), self.weight.float(), None, self.stride, self.padding)
            return self._scaled(out).to(features.dtype)
        return self._scaled(F.conv2d(features, self.weight.to(features.dtype), None, self.stride, self.padding))

    def _scaled(self, out: Tensor) -> Tensor:
        out = out * self.scale[:, None, None]
        return out if self.bias is None else out + self.bias[:, None, None]

    def _float_convolution(self, features: Tensor, weight: Tensor) -> Tensor:
        def convolution(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.conv2d(features, weight, bias, self.stride, self.padding)

        if half_precision.is_slow(features, weight):
            return half_precision.convolve(features, weight, None, convolution)
        return convolution(features, weight, None)

    def _integer_convolution(self, item: Tensor) -> Tensor:
        item = item.contiguous(memory_format=torch.channels_last)
        # The range includes zero, which is the value of the padding.
        low, high = min(0.0, item.amin().item()), max(0.0, item.amax().item())
        step = max((high - low) / largest_level(), torch.finfo(torch.float32).tiny)
        zero_point = round(-low / step)
        rounded = (item.float() * (1 / step) + zero_point).round_().clamp_(0, largest_level()).to(torch.uint8)
        geometry = self.stride, self.padding, [1, 1], 1  # stride, padding, dilation, groups
        scale = self.scale.float()
        # A packed weight is the same for all scales and zero points of activations.
        packed = self._packed("levels", lambda w: _packed_integer_weight(w, scale, geometry))
        bias = None if self.bias is None else self.bias.float()
        weight_zero_points = torch.zeros(len(scale), dtype=torch.int32)
        out: Tensor = torch.ops.onednn.qconv2d_pointwise(
            rounded,
            step,
            zero_point,
            packed,
            scale,
            weight_zero_points,
            bias,
            *geometry,
            1.0,  # scale of the output, which is not quantized
            0,  # zero point of the output
            torch.float32 if item.dtype in half_precision.SLOW_TYPES else item.dtype,
            "none",  # no operation after the convolution, without arguments
            [],
            "",
        )
        return out.to(item.dtype)


def rounded_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight rounded to integers in [-127, 127], and the scale of each output channel.

    Args:
        weight: Matrix (out, in) or kernels (out, in, height, width).

    Returns:
        Tensor of `int8`, and float32 scales of shape (out,).
    """
    largest = weight.abs().flatten(1).amax(dim=1).float()
    scale = (largest / MAX_INT8).clamp_min(torch.finfo(torch.float32).tiny)
    levels = (weight / scale.view(-1, *[1] * (weight.ndim - 1))).round().to(torch.int8)
    return levels, scale


def _packed_integer_weight(weight: Tensor, scale: Tensor, geometry: Any) -> Tensor:
    packed: Tensor = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, ZERO_POINT, *geometry, None)
    return packed


def _has_integer_convolution() -> bool:
    """Return whether oneDNN convolves integers here: on x86 CPUs, in releases of torch that expose it."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    try:  # not part of torch's public interface
        operators = torch.ops.onednn.qconv2d_pointwise, torch.ops.onednn.qconv_prepack
    except (AttributeError, RuntimeError):
        return False
    return len(operators) == 2


HAS_INTEGER_CONVOLUTION = _has_integer_convolution()


@functools.cache
def largest_level() -> int:
    """Return the largest input for which oneDNN adds products with 8-bit weights exactly on this CPU.

    It is 255, or 127 (inputs of 7 bits) on CPUs without VNNI: they add two products in a signed 16-bit integer, and
    2 * 130 * 127 does not fit. `HAS_INTEGER_CONVOLUTION` must be true.
    """
    inputs = torch.full((1, 64), 255, dtype=torch.uint8, device="cpu")
    weight = torch.full((16, 64), 127, dtype=torch.int8, device="cpu")
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    scales, zero_points = torch.ones(16, device="cpu"), torch.zeros(16, dtype=torch.int32, device="cpu")
    product = torch.ops.onednn.qlinear_pointwise(
        *(inputs, 1.0, 0, packed, scales, zero_points, None), *(1.0, 0, torch.float32, "none", [], "")
    )
    return 255 if int(product[0, 0]) == 255 * 127 * inputs.shape[1] else 127
