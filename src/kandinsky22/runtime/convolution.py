"""Convolutions for CPUs: the same results, sooner, by one of three exact ways.

- *packed*: the weight is laid out once as oneDNN likes it, not at each call, and pixels have their channels together.
- *Winograd*: a 3x3 convolution with a quarter of the multiplications (`winograd.py`), for float32 at large sizes; in
  bfloat16 it would cost precision, and float32 in its place all that is gained.
- *doubled*: a 3x3 convolution of pixels that were each repeated in a 2x2 square reads every pixel more than once, so
  four 2x2 convolutions with summed weights, one for each place in the square, give the same with 4/9 of the work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.runtime import pages, winograd
from kandinsky22.runtime.packed import Packs, can_pack

WORTHWHILE = 2**24  # multiplications for one picture below which rearranging gains nothing, and rounds more
NARROW = 256  # channels, the mean of in and out, below which transforms cost more than products are saved
FEW = 64  # squares of a picture below which reading four times as many weights costs more
LARGE = 2**20  # kernels above which four times as many weights take too much memory


class Conv2d(Packs, nn.Conv2d):
    """`nn.Conv2d` that takes the fastest exact way wherever no gradient is wanted on an x86 CPU.

    Results differ from the plain layer's by rounding, and have their channels last in memory. `packing = False`
    switches all ways off, `winograd = False` and `doubling = False` one each; on a layer or on the class.
    """

    winograd: bool = True
    doubling: bool = True

    def forward(self, features: Tensor, doubled: bool = False) -> Tensor:
        """(batch, out, H', W') from (batch, in, H, W), of which each pixel counts as a 2x2 square if `doubled`."""
        # compiled code asks for no sizes here, which it would then be made for
        # the batch does not count, so that a picture does not depend on how many are made with it
        products = 0 if torch.compiler.is_compiling() else features[:1, 0].numel() * self.weight.numel()
        if doubled:
            products *= 4
        if products < WORTHWHILE or not (
            self.packing and _is_plain(self) and can_pack(features, self.weight, self.bias)
        ):
            return super().forward(double(features) if doubled else features)
        if doubled and self.doubling and self._is_3x3():
            return self._doubled(features.contiguous(memory_format=torch.channels_last))
        features = (double(features) if doubled else features).contiguous(memory_format=torch.channels_last)
        if self.winograd and self._is_3x3() and self._suits_winograd(features):
            matrices = self._packed("winograd", winograd.transformed)
            return winograd.convolve(features, matrices, self.out_channels, self.bias)
        return self._product(features, self._packed("convolution", lambda w: self._reordered(w, features)))

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
        corners = self._product(features, weight, bias=False).permute(0, 2, 3, 1)
        corners = corners.unflatten(3, (2, 2, -1))  # (batch, corners down, across, below or above, right or left, out)
        out = pages.empty(features, batch, 2 * height, 2 * width, self.out_channels)
        squares = out.unflatten(2, (width, 2)).unflatten(1, (height, 2))
        for a in (0, 1):  # the upper pixels of a square are the lower ones around the corners above
            for b in (0, 1):
                part = corners[:, a : a + height, b : b + width, 1 - a, 1 - b]
                place = squares[:, :, a, :, b]
                place.copy_(part) if self.bias is None else torch.add(part, self.bias, out=place)
        return out.permute(0, 3, 1, 2)

    def _reordered(self, weight: Tensor, features: Tensor) -> Tensor:
        made: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            weight, list(self.padding), list(self.stride), [1, 1], 1, list(features.shape)
        )
        return made

    def _product(self, features: Tensor, weight: Tensor, bias: bool = True) -> Tensor:
        settings = list(self.padding), list(self.stride), [1, 1], 1
        made: Tensor = torch.ops.mkldnn._convolution_pointwise(
            features, weight, self.bias if bias else None, *settings, "none", [], ""
        )
        return made


def double(features: Tensor) -> Tensor:
    """Each pixel repeated in a 2x2 square."""
    return F.interpolate(features, scale_factor=2.0, mode="nearest")


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
