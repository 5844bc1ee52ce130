"""Convolutions and linear layers whose inputs and weights are both rounded to 8 bits, multiplied as integers by oneDNN.

The numbers of a layer, all of them in its state dict:

- `weight`: 8-bit integers q in [-127, 127]. The weight they stand for is q * scale, with one scale per output channel.
- `scale`: largest absolute weight of an output channel, divided by 127.
- `input_range`: smallest and largest input [low, high] that was seen in the calibration, of all channels together, with
  low <= 0 <= high. An input x becomes round(x / step) + zero point in [0, 255], with step = (high - low) / 255 and zero
  point = round(-low / step); inputs outside of the range become its ends. Layers of the prior have no range: each token
  is rounded to integers in [-127, 127], with a step of its largest absolute value divided by 127.

CPUs without VNNI would add two such products with overflow (`largest_level`). There inputs have 7 bits: 127 takes the
place of 255, and 63 that of 127.

The rounding of an input does not depend on the other items of a batch. Where oneDNN multiplies no integers (other CPUs
than x86, GPUs, compiled code), the layers convert their weights and do not round their inputs.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.errors import CheckpointError
from kandinsky22.kernels import half_precision
from kandinsky22.kernels.conv import can_accumulate, corner_kernels, upsample2x
from kandinsky22.kernels.linear import PackedWeightMixin, may_pack
from kandinsky22.kernels.packed_memory import PackedProduct
from kandinsky22.runtime.quantized_layers import (
    HAS_INTEGER_CONVOLUTION,
    ZERO_POINT,
    LowRankMixin,
    QuantizedConv2d,
    largest_level,
    rounded_weight,
)

LEVELS = 255  # largest unsigned integer of 8 bits
MIN_STEP = torch.finfo(torch.float32).tiny  # of inputs that are all zero
# Spatial positions up to which features are padded here instead of by oneDNN: a third of its time at 8 x 8 goes to zero
# points at the edges otherwise (1536 channels, batch of two: 13.4 instead of 15.5 ms). At 32 x 32 nothing is gained.
MAX_PADDED = 64
FLOATS = (torch.float32, torch.bfloat16)  # types of results that oneDNN writes
WHOLE, PADDED, CORNERS = "int8", "int8_padded", "int8_upsample"  # layouts of packed weights
Geometry: TypeAlias = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation and groups


class CalibratedMixin:
    """Mixin for layers with an `input_range`."""

    input_range: Tensor | None

    def set_input_range(self, low: float, high: float) -> None:
        """Set the range in which inputs are rounded to 8 bits; zero is made part of it.

        Args:
            low: Smallest input.
            high: Largest input.
        """
        assert self.input_range is not None, "layers that round per token have no range"
        with torch.no_grad():
            self.input_range.copy_(torch.tensor([min(0.0, low), max(0.0, high)]))

    def _packed(self, layout: str, pack: Callable[[Tensor], Any]) -> Any:
        layer: Any = self
        if may_pack(layer):
            return super()._packed(layout, pack)  # type: ignore[misc]  # of PackedWeightMixin
        return pack(layer.weight.detach())  # the low-memory mode stores no copies

    def _step_and_zero_point(self) -> tuple[float, int]:
        assert self.input_range is not None
        low, high = self.input_range.tolist()
        if not (math.isfinite(high - low) and low <= 0 <= high):
            raise CheckpointError(f"the range of a layer's inputs is {low:g} to {high:g}: expected one around 0")
        step = max((high - low) / largest_level(), MIN_STEP)
        return step, round(-low / step)


class Int8Conv2d(CalibratedMixin, QuantizedConv2d):
    """`nn.Conv2d` with 8-bit weights, and inputs of 8 bits in a range that does not change."""

    fuses_upsample_and_residual = True

    def __init__(self, layer: nn.Conv2d) -> None:
        """Quantize the weight of a layer, which is not changed. The range is set by `set_input_range`.

        Args:
            layer: The layer, with one group and no dilation.
        """
        super().__init__(layer, dynamic=False)
        self.input_range = nn.Parameter(layer.weight.new_zeros(2), requires_grad=False)

    def forward(self, features: Tensor, upsample: bool = False, residual: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            features: Tensor of shape (batch, in, H, W).
            upsample: Whether the features are first upsampled by two, by nearest neighbour.
            residual: Tensor of the result's shape to add, overwritten with the sum; None adds nothing.

        Returns:
            Tensor of shape (batch, out, H', W').
        """
        low_rank = self.low_rank
        if low_rank is not None or not _multiplies_integers(features):
            out = super().forward(features, upsample)
            return out if residual is None else out.add_(residual)
        step, zero_point = self._step_and_zero_point()
        levels = rounded(features.contiguous(memory_format=torch.channels_last), step, zero_point)
        if upsample and self.padding == [1, 1] and self.stride == [1, 1]:
            out = self._upsampled(levels, step, zero_point, features.dtype)
        else:
            levels = upsample2x(levels) if upsample else levels
            if residual is not None and can_accumulate(features, residual):
                return self._multiplied(levels, step, zero_point, features.dtype, residual)
            out = self._multiplied(levels, step, zero_point, features.dtype)
        return out if residual is None else residual.add_(out)

    def _convolve(self, features: Tensor) -> Tensor:
        if not _multiplies_integers(features):
            return super()._convolve(features)
        step, zero_point = self._step_and_zero_point()
        levels = rounded(features.contiguous(memory_format=torch.channels_last), step, zero_point)
        return self._multiplied(levels, step, zero_point, features.dtype)

    def _multiplied(
        self, levels: Tensor, step: float, zero_point: int, dtype: torch.dtype, residual: Tensor | None = None
    ) -> Tensor:
        is_small = levels.shape[2] * levels.shape[3] <= MAX_PADDED and self.padding != [0, 0]
        if is_small:
            levels = _padded(levels, self.padding, zero_point)
        layout = PADDED if is_small else WHOLE
        packed = self._packed(layout, lambda weight: self._pack(layout, weight, levels))
        return packed.convolve(levels, step, zero_point, dtype, residual)

    def _upsampled(self, levels: Tensor, step: float, zero_point: int, dtype: torch.dtype) -> Tensor:
        """Convolve upsampled features by four 2x2 kernels; `kernels/conv.py` describes the method."""
        batch, _, height, width = levels.shape
        packed = self._packed(CORNERS, lambda weight: self._pack(CORNERS, weight, levels))
        corners = packed.convolve(levels, step, zero_point, dtype).permute(0, 2, 3, 1)
        corners = corners.unflatten(3, (2, 2, -1))  # (batch, row, column, above or below, left or right, out)
        out = torch.empty(batch, height, 2, width, 2, corners.shape[-1], dtype=dtype)
        for a in (0, 1):  # the upper pixels of a square are the lower ones around the corners above
            for b in (0, 1):
                out[:, :, a, :, b] = corners[:, a : a + height, b : b + width, 1 - a, 1 - b]
        return out.view(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)

    def _pack(self, layout: str, weight: Tensor, levels: Tensor) -> _PackedKernels:
        """Pack a weight in the layout that suits these features. Others are multiplied correctly too."""
        vectors = {"scale": self.scale.detach().float()}
        if layout == CORNERS:
            weight, vectors["scale"] = rounded_weight(
                corner_kernels(weight.float() * vectors["scale"][:, None, None, None])
            )
        elif layout == PADDED:
            vectors["sums"] = weight.sum(dim=(1, 2, 3)).float() * vectors["scale"]
        zero_point = 0 if layout == PADDED else ZERO_POINT
        packed = torch.ops.onednn.qconv_prepack(
            weight, vectors["scale"], 1.0, zero_point, *self._geometry(layout), list(levels.shape)
        )
        return self.packed_product(layout, packed, vectors)

    def packed_product(self, layout: str, weight: Tensor, vectors: Mapping[str, Tensor]) -> _PackedKernels:
        """Return what products need, from a weight that was packed before.

        Args:
            layout: Name of its layout.
            weight: Opaque tensor.
            vectors: The vectors of the packed product.
        """
        bias = self.bias.repeat(4) if self.bias is not None and layout == CORNERS else self.bias
        return _PackedKernels(weight, vectors["scale"], bias, self._geometry(layout), vectors.get("sums"))

    def _geometry(self, layout: str) -> Geometry:
        if layout == CORNERS:
            return [1, 1], [1, 1], [1, 1], 1
        return self.stride, [0, 0] if layout == PADDED else self.padding, [1, 1], 1


class Int8Linear(CalibratedMixin, LowRankMixin, PackedWeightMixin, nn.Module):
    """`nn.Linear` with 8-bit weights, and inputs of 8 bits in a range that does not change, or in one per token."""

    rounds_inputs = True  # attention to results of this layer need not be more exact than they are

    bias: Tensor | None

    def __init__(self, layer: nn.Linear, *, per_token: bool) -> None:
        """Quantize the weight of a layer, which is not changed.

        Args:
            layer: The layer.
            per_token: Whether each token is rounded in a range of its own. If False, `set_input_range` sets the range.
        """
        super().__init__()
        weight = layer.weight.detach()
        levels, scale = rounded_weight(weight)
        self.weight = nn.Parameter(levels, requires_grad=False)
        self.scale = nn.Parameter(scale.to(weight.dtype), requires_grad=False)
        bias: Tensor | None = layer.bias
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        input_range = None if per_token else nn.Parameter(weight.new_zeros(2), requires_grad=False)
        self.register_parameter("input_range", input_range)

    def forward(self, features: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            features: Tensor of shape (..., in_features).

        Returns:
            Tensor of shape (..., out_features).
        """
        if not _multiplies_integers(features):
            out = self._without_rounding(features)
        elif self.input_range is None:
            out = self._by_token(features)
        else:
            step, zero_point = self._step_and_zero_point()
            levels = rounded(features.contiguous(), step, zero_point)
            packed = self._packed(WHOLE, self._pack)
            out = packed.multiply(levels, step, zero_point, features.dtype)
        return self.plus_low_rank(out, features)

    def _without_rounding(self, features: Tensor) -> Tensor:
        dtype = torch.float32 if half_precision.is_slow(features, self.scale, self.bias) else features.dtype
        out = F.linear(features.to(dtype), self.weight.to(dtype)) * self.scale.to(dtype)
        return (out if self.bias is None else out + self.bias).to(features.dtype)

    @property
    def unquantized_shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.weight.shape)

    def packed_product(self, layout: str, weight: Tensor, vectors: Mapping[str, Tensor]) -> _PackedMatrix:
        """Return what products need, from a weight that was packed before.

        Args:
            layout: Name of its layout.
            weight: Opaque tensor.
            vectors: The vectors of the packed product.
        """
        return _PackedMatrix(weight, self.scale, None if self.input_range is None else self.bias)

    def _pack(self, weight: Tensor) -> _PackedMatrix:
        return self.packed_product(WHOLE, torch.ops.onednn.qlinear_prepack(weight, None), {})

    def _by_token(self, features: Tensor) -> Tensor:
        """Multiply tokens that are rounded one by one, in as few operations as possible: the prior has few tokens."""
        tokens = features.float()
        largest = largest_level() // 2
        step = tokens.abs().amax(-1, keepdim=True).mul_(1 / largest).add_(MIN_STEP)
        levels = tokens.div(step).add_(largest + 1.5).to(torch.uint8)  # conversion cuts off: rounds to the nearest
        packed = self._packed(WHOLE, self._pack)
        out: Tensor = packed.multiply(levels, 1.0, largest + 1, torch.float32)
        out = out.mul_(step) if self.bias is None else torch.addcmul(self.bias, out, step)
        return out.to(features.dtype)


class _PackedKernels(PackedProduct):
    """Weight of a convolution in oneDNN's layout, with its scales and its bias in the types that oneDNN reads."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, geometry: Geometry, sums: Tensor | None):
        """Take a weight that is packed already.

        Args:
            weight: Opaque tensor.
            scale: Scales of shape (out,).
            bias: Vector of shape (out,); None for none.
            geometry: Stride, padding, dilation and groups.
            sums: Sums of the kernels of each output channel, multiplied by its scale: what the zero point of the
                features contributes is subtracted with the bias. None leaves this to oneDNN.
        """
        self.weight, self.geometry, self.sums = weight, geometry, sums
        self.scale, self.bias = scale.detach().float(), None if bias is None else bias.detach().float()
        self.zero_points = torch.zeros(len(scale), dtype=torch.int32, device="cpu")

    def vectors(self) -> dict[str, Tensor]:
        return {"scale": self.scale} if self.sums is None else {"scale": self.scale, "sums": self.sums}

    def convolve(
        self, levels: Tensor, step: float, zero_point: int, dtype: torch.dtype, residual: Tensor | None = None
    ) -> Tensor:
        bias = self.bias
        if self.sums is not None:
            correction = self.sums * (step * zero_point)
            bias, zero_point = -correction if bias is None else bias - correction, 0
        operands = levels, step, zero_point, self.weight, self.scale, self.zero_points
        if dtype in half_precision.SLOW_TYPES:  # oneDNN rounds results to such types one element at a time
            out = self._convolve(operands, bias, torch.float32).to(dtype)
            return out if residual is None else residual.add_(out)
        if residual is None:
            return self._convolve(operands, bias, dtype)
        # the output has no scale of its own (1.0) and no zero point (0), and no operation follows ("none")
        torch.ops.onednn.qconv2d_pointwise.binary(
            *operands, residual, bias, *self.geometry, 1.0, 0, dtype, 1.0, 0, "sum", 1.0, "none", [], ""
        )
        return residual

    def _convolve(self, operands: tuple[Any, ...], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        out: Tensor = torch.ops.onednn.qconv2d_pointwise(*operands, bias, *self.geometry, 1.0, 0, dtype, "none", [], "")
        return out


class _PackedMatrix(PackedProduct):
    """Weight of a linear layer in oneDNN's layout, with its scales and its bias in the types that oneDNN reads."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.scale, self.bias = scale.detach().float(), None if bias is None else bias.detach().float()
        self.zero_points = torch.zeros(len(scale), dtype=torch.int32, device="cpu")

    def multiply(self, levels: Tensor, step: float, zero_point: int, dtype: torch.dtype) -> Tensor:
        operands = levels, step, zero_point, self.weight, self.scale, self.zero_points, self.bias
        written = torch.float32 if dtype in half_precision.SLOW_TYPES else dtype
        out: Tensor = torch.ops.onednn.qlinear_pointwise(*operands, 1.0, 0, written, "none", [], "")
        return out.to(dtype)


def _padded(levels: Tensor, padding: list[int], zero_point: int) -> Tensor:
    """Return features with a margin of zeros, which the zero point stands for."""
    batch, channels, height, width = levels.shape
    rows, columns = padding
    out = torch.full((batch, height + 2 * rows, width + 2 * columns, channels), zero_point, dtype=torch.uint8)
    out[:, rows : rows + height, columns : columns + width] = levels.permute(0, 2, 3, 1)
    return out.permute(0, 3, 1, 2)


def rounded(features: Tensor, step: float, zero_point: int) -> Tensor:
    """Return round(features / step) + zero point, limited to [0, `largest_level()`], as `uint8`.

    Args:
        features: Tensor of any shape, dense.
        step: Distance between two levels.
        zero_point: Level of zero.
    """
    if not _has_fused_rounding():
        scaled = features.float().mul(1 / step).round_().add_(zero_point)
        return scaled.clamp_(0, largest_level()).to(torch.uint8)
    levels = torch.quantize_per_tensor(features.float(), step, zero_point, torch.quint8)
    # the same memory without torch's quantized type, which oneDNN's operators do not take
    plain = torch.empty(0, dtype=torch.uint8)
    plain = plain.set_(levels.untyped_storage(), 0, levels.shape, levels.stride())
    return plain if largest_level() == LEVELS else plain.clamp_(max=largest_level())


@functools.cache
def _has_fused_rounding() -> bool:
    """Return whether torch still has the operator that rounds in a quarter of the time; it is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            levels = torch.quantize_per_tensor(torch.tensor([0.5, -9.0]), 0.25, 8, torch.quint8)
            return bool(levels.int_repr().tolist() == [10, 0])
        except (AttributeError, RuntimeError):
            return False


def _multiplies_integers(features: Tensor) -> bool:
    return (
        HAS_INTEGER_CONVOLUTION
        and features.device.type == "cpu"
        and features.dtype in FLOATS
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )
