"""Convolutions for CPUs: the results of `nn.Conv2d`, in less time, by one of three exact methods.

- *Packed*: the weight is converted to oneDNN's layout once, not at each call, and features are channels last.
- *Winograd*: a 3x3 convolution with a quarter of the multiplications (`winograd.py`), for float32 at large sizes. In
  bfloat16 it would cost precision, and in float32 instead of bfloat16 everything that it gains, except on CPUs that
  compute bfloat16 in float32 anyway (`half_precision.py`).
- *Fused upsampling*: a 3x3 convolution after nearest-neighbour upsampling reads every pixel more than once. Four 2x2
  convolutions with summed weights, one per pixel of the 2x2 square, are the same sums with 4/9 of the work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.kernels import half_precision, host_memory, settings, winograd
from kandinsky22.kernels.linear import PackedWeightMixin, can_pack, may_pack
from kandinsky22.kernels.modules import runs_own_forward

MIN_MULTIPLICATIONS = 2**24  # per batch item; below this, packing gains nothing, and rounds more
MIN_WINOGRAD_CHANNELS = 256  # mean of input and output channels; below this, the transforms cost more than is saved
MIN_WINOGRAD_TILES = 64  # per batch item; below this, reading weights of four times the size costs more
MAX_WINOGRAD_KERNELS = 2**20  # input channels x output channels; above this, the weights take too much memory
# Elements of a large result that are computed at a time: 16 MB in float32, which the C library keeps for the next ones.
STRIP_ELEMENTS = 2**22
CHANNELS_LAST = torch.channels_last


class Conv2d(PackedWeightMixin, nn.Conv2d):
    """`nn.Conv2d` that takes the fastest exact method wherever no gradient is needed on an x86 CPU.

    Results differ from those of `nn.Conv2d` by rounding, and are channels last. Small, grouped and dilated convolutions
    are computed by torch.
    """

    fuses_upsample_and_residual = True

    def forward(self, features: Tensor, upsample: bool = False, residual: Tensor | None = None) -> Tensor:
        """Return features (batch, out, H', W').

        Args:
            features: Tensor (batch, in, H, W).
            upsample: Whether the features are upsampled first, by a factor of two with nearest neighbour.
            residual: Tensor of the result's shape to add. It is overwritten with the sum where no gradient is needed.
                None adds nothing.
        """
        if self._is_slow(features, upsample):
            return _add(
                half_precision.convolve(features, *self._plain_parameters(), self._for_one_call(upsample)), residual
            )
        if not self._should_pack(features, upsample):
            return _add(super().forward(upsample2x(features) if upsample else features), residual)
        options, is_3x3 = settings.current(), self._is_same_3x3()
        if upsample and options.fused_upsample and is_3x3:
            return _add(self._upsampled(features.contiguous(memory_format=CHANNELS_LAST)), residual)
        if residual is not None and not can_accumulate(features, residual):
            return _add(Conv2d.forward(self, features, upsample), residual)
        features = (upsample2x(features) if upsample else features).contiguous(memory_format=CHANNELS_LAST)
        if options.winograd and is_3x3 and self._is_winograd_faster(features):
            matrices = self._packed(winograd.LAYOUT, winograd.transform_weight)
            return winograd.convolve(features, matrices, self.out_channels, self.bias, residual)
        return self._direct(features, residual)

    def _multiplications(self, features: Tensor, upsample: bool) -> int:
        # Per batch item, so that an image does not depend on the number of images that are generated with it.
        return features[:1, 0].numel() * self.weight.numel() * (4 if upsample else 1)

    def _is_slow(self, features: Tensor, upsample: bool) -> bool:
        weight, bias = self._plain_parameters()
        return (
            type(self) is Conv2d
            and self.groups == 1
            and weight is not None
            and bias is self.bias
            and half_precision.is_slow(features, weight, bias)
            and self._multiplications(features, upsample) >= half_precision.MIN_MULTIPLICATIONS
        )

    def _plain_parameters(self) -> tuple[Any, Any]:
        """Return weight and bias, None where they are missing or computed for each call."""
        return self._parameters.get("weight"), self._parameters.get("bias")

    def _for_one_call(self, upsample: bool) -> half_precision.Product:
        """Return this convolution as a function of features, weight and bias, which packs nothing for later calls."""

        def convolve(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            layer = _Conv2dOfOneCall.__new__(_Conv2dOfOneCall)
            parameters = {"weight": weight, "bias": bias}
            layer.__dict__.update(self.__dict__, _parameters=parameters, out_channels=len(weight))
            return Conv2d.forward(layer, features, upsample)

        return convolve

    def _should_pack(self, features: Tensor, upsample: bool) -> bool:
        # Compiled code must not read sizes here: it would then be compiled for these sizes only.
        return (
            not torch.compiler.is_compiling()
            and features.device.type == "cpu"
            and may_pack(self)
            and self._multiplications(features, upsample) >= MIN_MULTIPLICATIONS
            and settings.current().packed_conv
            and self.groups == 1
            and self.dilation == (1, 1)
            and self.padding_mode == "zeros"
            and can_pack(features, self.weight, self.bias)
        )

    def _is_same_3x3(self) -> bool:
        return self.kernel_size == (3, 3) and self.stride == (1, 1) and self.padding == (1, 1)

    def _is_winograd_faster(self, features: Tensor) -> bool:
        height, width = features.shape[-2:]
        return (
            features.dtype == torch.float32
            and self.in_channels + self.out_channels >= 2 * MIN_WINOGRAD_CHANNELS
            and self.in_channels * self.out_channels <= MAX_WINOGRAD_KERNELS
            and winograd.is_supported_size(height, width)
            and height * width >= MIN_WINOGRAD_TILES * winograd.OUTPUT_TILE**2
        )

    def _upsampled(self, features: Tensor) -> Tensor:
        """Convolve upsampled features: compute results around each corner where four pixels meet, then move them."""
        batch, _, height, width = features.shape
        weight = self._packed("fused_upsample", lambda w: self._reordered(corner_kernels(w), features))
        out = host_memory.empty_large(features, batch, 2 * height, 2 * width, self.out_channels)
        squares = out.unflatten(2, (width, 2)).unflatten(1, (height, 2))
        for item, (first, last) in itertools.product(
            range(batch), row_strips(height, (width + 1) * 4 * self.out_channels)
        ):
            strip = _padded_rows(features[item : item + 1], first - 1, last + 1)
            corners = self._convolve(strip, weight, padding=(0, 1), bias=False).permute(0, 2, 3, 1)
            corners = corners.unflatten(3, (2, 2, -1))  # (1, row, column, above or below, left or right, out)
            for a in (0, 1):  # the upper pixels of a square are the lower ones around the corners above
                for b in (0, 1):
                    source = corners[0, a : a + last - first, b : b + width, 1 - a, 1 - b]
                    target = squares[item, first:last, a, :, b]
                    target.copy_(source) if self.bias is None else torch.add(source, self.bias, out=target)
        return out.permute(0, 3, 1, 2)

    def _direct(self, features: Tensor, residual: Tensor | None) -> Tensor:
        weight = self._packed("conv", lambda w: self._reordered(w, features))
        if residual is not None:
            layer = weight, self.bias, list(self.padding), list(self.stride), [1, 1], 1
            torch.ops.mkldnn._convolution_pointwise_.binary(residual, features, *layer, "add", None, None, [], None)
            return residual
        batch, _, height, width = features.shape
        row_elements, margin = width * self.out_channels, self.kernel_size[0] // 2
        keeps_size = (
            self.stride == (1, 1)
            and self.kernel_size == (2 * margin + 1, 2 * margin + 1)
            and self.padding == (margin, margin)
        )
        if not keeps_size or height * row_elements * features.element_size() < host_memory.LARGE_BUFFER:
            return self._convolve(features, weight, self.padding)
        # strips, because oneDNN would allocate the result itself, in small pages
        out = host_memory.empty_large(features, batch, height, width, self.out_channels).permute(0, 3, 1, 2)
        for item, (first, last) in itertools.product(range(batch), row_strips(height, row_elements)):
            strip = _padded_rows(features[item : item + 1], first - margin, last + margin)
            out[item : item + 1, :, first:last] = self._convolve(strip, weight, (0, margin))
        return out

    def _reordered(self, weight: Tensor, features: Tensor) -> Tensor:
        reordered: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            weight, list(self.padding), list(self.stride), [1, 1], 1, list(features.shape)
        )
        return reordered

    def _convolve(self, features: Tensor, weight: Tensor, padding: Any, *, bias: bool = True) -> Tensor:
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(
            features, weight, self.bias if bias else None, list(padding), list(self.stride), [1, 1], 1, "none", [], ""
        )
        return out


class _Conv2dOfOneCall(Conv2d):
    """A convolution whose weight exists for one call: packed weights are not stored."""

    def _packed(self, layout: str, pack: Callable[[Tensor], Any]) -> Any:
        return pack(self.weight)


def row_strips(height: int, row_elements: int) -> Iterator[tuple[int, int]]:
    """Yield the first row and the row after the last one of strips of about `STRIP_ELEMENTS` elements.

    Args:
        height: Number of rows.
        row_elements: Elements per row.
    """
    rows = max(1, STRIP_ELEMENTS // row_elements)
    for first in range(0, height, rows):
        yield first, min(first + rows, height)


def _padded_rows(features: Tensor, first: int, last: int) -> Tensor:
    """Return rows `first` to `last` of features, with zero rows outside of them."""
    height = features.shape[2]
    rows = features[:, :, max(0, first) : min(height, last)]
    if first < 0 or last > height:
        rows = F.pad(rows, (0, 0, max(0, -first), max(0, last - height)))
    return rows.contiguous(memory_format=CHANNELS_LAST)


def apply_conv(layer: nn.Module, features: Tensor, *, upsample: bool = False, residual: Tensor | None = None) -> Tensor:
    """Return layer(features), of upsampled features and with a residual added if these are requested.

    The layer itself does both if its class has the attribute `fuses_upsample_and_residual` and nothing was attached to
    it. Any other layer is called as torch's convolutions are: with the features that it convolves, and its hooks
    receive the output without anything added.

    Args:
        layer: Any module in the position of a convolution.
        features: Tensor (batch, in, H, W).
        upsample: Whether the features are upsampled first, by a factor of two with nearest neighbour.
        residual: Tensor of the output's shape to add; it may be overwritten where no gradient is needed. None adds
            nothing.

    Returns:
        Tensor (batch, out, H', W').
    """
    if torch.compiler.is_compiling():
        outside = getattr(layer, "_outside_graphs", None)
        if outside is not None:
            return outside(layer, features, upsample=upsample, residual=residual)
        return _add(layer(upsample2x(features) if upsample else features), residual)
    # an attribute of the very class: a subclass may have another `forward`
    if vars(type(layer)).get("fuses_upsample_and_residual") and runs_own_forward(layer):
        return layer(features, upsample=upsample, residual=residual)
    return _add(half_precision.call_conv(layer, upsample2x(features) if upsample else features), residual)


def upsample2x(features: Tensor) -> Tensor:
    """Return features (batch, channels, 2 H, 2 W): each pixel repeated in a 2x2 square.

    Args:
        features: Tensor (batch, channels, H, W).
    """
    return F.interpolate(features, scale_factor=2.0, mode="nearest")


def _add(out: Tensor, residual: Tensor | None) -> Tensor:
    if residual is None:
        return out
    return out + residual if torch.is_grad_enabled() else residual.add_(out)


def can_accumulate(features: Tensor, residual: Tensor) -> bool:
    """Return whether a convolution can add its result to the residual in place.

    Args:
        features: Input of the convolution.
        residual: Tensor of the result's shape.
    """
    return (
        residual.dtype == features.dtype
        and residual.is_contiguous(memory_format=CHANNELS_LAST)
        and not torch.is_grad_enabled()
    )


def corner_kernels(weight: Tensor) -> Tensor:
    """Return kernels (4 out, in, 2, 2) for the four pixels around a corner, in rows from the upper left.

    A pixel above a corner lies in the lower half of its square: of the three rows that its kernel reads, the first two
    fall into its own square and the third into the one below. A pixel below lies in the upper half, the other way
    round.

    Args:
        weight: Kernels (out, in, 3, 3).
    """
    kernels = weight.reshape(-1, 9).float()
    above, below = kernels.new_tensor([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]])
    sums = [torch.mm(kernels, torch.kron(rows, columns).T) for rows in (above, below) for columns in (above, below)]
    return torch.cat(sums).to(weight.dtype).view(4 * len(weight), -1, 2, 2)
