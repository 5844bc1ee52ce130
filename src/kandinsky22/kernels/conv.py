"""Convolutions for CPUs: the same results, sooner, by one of three exact ways.

- *packed*: the weight is laid out once as oneDNN likes it, not at each call, and pixels have their channels together.
- *Winograd*: a 3x3 convolution with a quarter of the multiplications (`winograd.py`), for float32 at large sizes; in
  bfloat16 it would cost precision, and float32 in its place all that is gained.
- *doubled*: a 3x3 convolution of pixels that were each repeated in a 2x2 square reads every pixel more than once, so
  four 2x2 convolutions with summed weights, one for each place in the square, give the same with 4/9 of the work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.kernels import host_memory, winograd
from kandinsky22.kernels.linear import Packs, can_pack

WORTHWHILE = 2**24  # multiplications for one picture below which rearranging gains nothing, and rounds more
NARROW = 256  # channels, the mean of in and out, below which transforms cost more than products are saved
FEW = 64  # squares of a picture below which reading four times as many weights costs more
# Numbers of a large result that are made at a time: 16 MB in float32, which the C library keeps for the next ones.
BAND = 2**22
LARGE = 2**20  # kernels above which four times as many weights take too much memory
LAST = torch.channels_last


class Conv2d(Packs, nn.Conv2d):
    """`nn.Conv2d` that takes the fastest exact way wherever no gradient is wanted on an x86 CPU.

    Results differ from the plain layer's by rounding, and have their channels last in memory. `packing = False`
    switches all ways off, `winograd = False` and `doubling = False` one each; on a layer or on the class.
    """

    winograd: bool = True
    doubling: bool = True

    def forward(self, features: Tensor, doubled: bool = False, onto: Tensor | None = None) -> Tensor:
        """(batch, out, H', W') from (batch, in, H, W), of which each pixel counts as a 2x2 square if `doubled`.

        With `onto`, of the result's shape, the sum of both; where no gradient is wanted, it takes onto's memory.
        """
        # compiled code asks for no sizes here, which it would then be made for
        # the batch does not count, so that a picture does not depend on how many are made with it
        products = 0 if torch.compiler.is_compiling() else features[:1, 0].numel() * self.weight.numel()
        if doubled:
            products *= 4
        if products < WORTHWHILE or not (
            self.packing and _is_plain(self) and can_pack(features, self.weight, self.bias)
        ):
            return _plus(super().forward(double(features) if doubled else features), onto)
        if doubled and self.doubling and self._is_3x3():
            return _plus(self._doubled(features.contiguous(memory_format=LAST)), onto)
        if onto is not None and not (
            onto.dtype == features.dtype and onto.is_contiguous(memory_format=LAST) and not torch.is_grad_enabled()
        ):
            return _plus(Conv2d.forward(self, features, doubled), onto)
        features = (double(features) if doubled else features).contiguous(memory_format=LAST)
        if self.winograd and self._is_3x3() and self._suits_winograd(features):
            matrices = self._packed(winograd.KIND, winograd.transformed)
            return winograd.convolve(features, matrices, self.out_channels, self.bias, onto)
        return self._direct(features, onto)

    def _is_3x3(self) -> bool:
        return self.kernel_size == (3, 3) and self.stride == (1, 1) and self.padding == (1, 1)

    def _suits_winograd(self, features: Tensor) -> bool:
        height, width = features.shape[-2:]
        return (
            features.dtype == torch.float32
            and self.in_channels + self.out_channels >= 2 * NARROW
            and self.in_channels * self.out_channels <= LARGE
            and winograd.fits(height, width)
            and height * width >= FEW * winograd.SIDE**2
        )

    def _doubled(self, features: Tensor) -> Tensor:
        """Results around each corner where four pixels meet, four times the channels, then put in their places."""
        batch, _, height, width = features.shape
        weight = self._packed("doubled", lambda w: self._reordered(_around_corners(w), features))
        out = host_memory.empty(features, batch, 2 * height, 2 * width, self.out_channels)
        squares = out.unflatten(2, (width, 2)).unflatten(1, (height, 2))
        for sample, (first, last) in itertools.product(
            range(batch), strips(height, (width + 1) * 4 * self.out_channels)
        ):
            part = _rows(features[sample : sample + 1], first - 1, last + 1)
            corners = self._product(part, weight, padding=(0, 1), bias=False).permute(0, 2, 3, 1)
            corners = corners.unflatten(3, (2, 2, -1))  # (1, down, across, below or above, right or left, out)
            for a in (0, 1):  # the upper pixels of a square are the lower ones around the corners above
                for b in (0, 1):
                    given = corners[0, a : a + last - first, b : b + width, 1 - a, 1 - b]
                    place = squares[sample, first:last, a, :, b]
                    place.copy_(given) if self.bias is None else torch.add(given, self.bias, out=place)
        return out.permute(0, 3, 1, 2)

    def _reordered(self, weight: Tensor, features: Tensor) -> Tensor:
        made: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            weight, list(self.padding), list(self.stride), [1, 1], 1, list(features.shape)
        )
        return made

    def _direct(self, features: Tensor, onto: Tensor | None) -> Tensor:
        weight = self._packed("convolution", lambda w: self._reordered(w, features))
        if onto is not None:
            settings = weight, self.bias, list(self.padding), list(self.stride), [1, 1], 1
            torch.ops.mkldnn._convolution_pointwise_.binary(onto, features, *settings, "add", None, None, [], None)
            return onto
        batch, _, height, width = features.shape
        row, beyond = width * self.out_channels, self.kernel_size[0] // 2
        same = self.stride == (1, 1) and self.kernel_size == (2 * beyond + 1,) * 2 and self.padding == (beyond, beyond)
        if not same or height * row * features.element_size() < host_memory.MAPPED:
            return self._product(features, weight, self.padding)
        # large results in pages that `empty` chooses
        out = host_memory.empty(features, batch, height, width, self.out_channels).permute(0, 3, 1, 2)
        for sample, (first, last) in itertools.product(range(batch), strips(height, row)):
            part = _rows(features[sample : sample + 1], first - beyond, last + beyond)
            out[sample : sample + 1, :, first:last] = self._product(part, weight, (0, beyond))
        return out

    def _product(self, features: Tensor, weight: Tensor, padding: Any, *, bias: bool = True) -> Tensor:
        made: Tensor = torch.ops.mkldnn._convolution_pointwise(
            features, weight, self.bias if bias else None, list(padding), list(self.stride), [1, 1], 1, "none", [], ""
        )
        return made


def strips(height: int, row: int) -> Iterator[tuple[int, int]]:
    """First and last row, exclusively, of strips whose rows have so many numbers each."""
    rows = max(1, BAND // row)
    for first in range(0, height, rows):
        yield first, min(first + rows, height)


def _rows(features: Tensor, first: int, last: int) -> Tensor:
    """Rows of features, zeros for those above the first and below the last one."""
    height = features.shape[2]
    part = features[:, :, max(0, first) : min(height, last)]
    if first < 0 or last > height:
        part = F.pad(part, (0, 0, max(0, -first), max(0, last - height)))
    return part.contiguous(memory_format=LAST)


def added(convolution: Callable[[Tensor], Tensor], features: Tensor, onto: Tensor) -> Tensor:
    """What any layer makes of the features, plus `onto`, whose memory it may take where no gradient is wanted."""
    own = type(convolution) is Conv2d and "forward" not in convolution.__dict__
    if own and not cast(Conv2d, convolution)._forward_hooks:  # which see what the layer makes, without anything added
        return cast(Conv2d, convolution)(features, onto=onto)
    return _plus(convolution(features), onto)


def double(features: Tensor) -> Tensor:
    """Each pixel repeated in a 2x2 square."""
    return F.interpolate(features, scale_factor=2.0, mode="nearest")


def _plus(made: Tensor, onto: Tensor | None) -> Tensor:
    if onto is None:
        return made
    return made + onto if torch.is_grad_enabled() else onto.add_(made)


def _is_plain(layer: nn.Conv2d) -> bool:
    return layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"


def _around_corners(weight: Tensor) -> Tensor:
    """Weights (4 out, in, 2, 2) for the pixels to the upper left, upper right, lower left, lower right of a corner.

    A pixel above a corner lies in the lower half of its square: of its three rows, the first two fall into its own
    square and the third into the one below. A pixel below lies in the upper half, the other way round.
    """
    above, below = ((0, 1), (2,)), ((0,), (1, 2))
    made = [
        torch.stack([torch.stack([_sum(weight, ys, xs) for xs in across], -1) for ys in down], -2)
        for down in (above, below)
        for across in (above, below)
    ]
    return torch.cat(made).contiguous()


def _sum(weight: Tensor, rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
    return weight[:, :, rows][..., columns].sum(dim=(-2, -1))
