"""Group normalisation for CPUs, of features that have their channels last in memory, with what follows it.

A scale and a shift for each channel and place, and silu, are applied a few rows at a time, while the rows are in the
cache. The formula is torch's, and so is the result but for rounding: torch's own kernel for this layout takes the
variance as the mean of squares minus the square of the mean, which costs up to three digits; here it is the mean of
squared distances to the mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kandinsky22.runtime import pages

BLOCK = 2**18  # numbers of features at a time: a megabyte in float32

enabled = True
"""False switches this off: torch's own group norm is used instead."""


def suits(features: Tensor) -> bool:
    """Whether `group_norm` can be used for these features, and is worth it."""
    return (
        enabled
        and features.device.type == "cpu"
        and features.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and features.is_contiguous(memory_format=torch.channels_last)
    )


def group_norm(
    features: Tensor, groups: int, eps: float, scale: Tensor, shift: Tensor, *, activated: bool, spent: bool
) -> Tensor:
    """(features - mean) / deviation * scale + shift, then silu if `activated`.

    Features are (batch, channels, H, W), mean and deviation those of each group of channels; scale and shift
    are (batch or 1, channels, h, w), each of their places standing for H / h x W / w places of the features. If
    these are `spent`, the result takes their memory.
    """
    pixels = features.permute(0, 2, 3, 1)
    step = _rows(pixels)
    table = Table(moments(pixels.split(step, dim=1), groups, eps), scale, shift)
    out = pixels if spent else pages.empty(pixels, *pixels.shape)
    height = pixels.shape[1]
    # with a row of the table at a time, no copy of it has to be made for each block
    step = step if table.height == 1 else height // table.height
    for row in range(0, height, step):
        table.apply(pixels[:, row : row + step], row, height, activated=activated, out=out[:, row : row + step])
    return out.permute(0, 3, 1, 2)


class Table:
    """What normalised features are times and plus, at each place: all that is to be known of them and of the norm."""

    def __init__(self, moments: tuple[Tensor, Tensor], scale: Tensor, shift: Tensor) -> None:
        mean, deviation = moments
        scale, shift = (part.permute(0, 2, 3, 1).float() for part in (scale, shift))
        self.scale = scale / deviation
        self.shift = shift - mean * self.scale
        self.height, self.width = self.scale.shape[1:3]

    def apply(self, pixels: Tensor, first: int, height: int, *, activated: bool, out: Tensor | None = None) -> Tensor:
        """Normalised pixels (batch, rows, W, channels), which begin with the row `first` of `height` rows."""
        tall, last = height // self.height, first + pixels.shape[1]
        rows: Any = slice(first // tall, first // tall + 1)
        if (last - 1) // tall != first // tall:
            rows = torch.arange(first, last, device=pixels.device) // tall
        a, b = (part[:, rows, :, None] for part in (self.scale, self.shift))
        part = pixels.unflatten(2, (self.width, -1))
        place = None if out is None else out.unflatten(2, (self.width, -1))
        if part.dtype != a.dtype:
            made = torch.addcmul(b, part.float(), a)
        else:
            made = torch.addcmul(b, part, a) if place is None else torch.addcmul(b, part, a, out=place)
        if activated:
            F.silu(made, inplace=True)
        if place is None:
            made = made.to(pixels.dtype)
        elif made is not place:
            made = place.copy_(made)
        return made.flatten(2, 3)


def moments(blocks: Iterable[Tensor], groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the group that each channel belongs to, (batch, 1, 1, channels) each, in float32.

    Blocks are (batch, rows, W, channels), together all rows.
    """
    rows, means, spreads = [], [], []
    for block in blocks:
        block = block.float()
        mean = block.mean(dim=(1, 2))
        rows.append(block.shape[1])
        means.append(mean)
        spreads.append((block - mean[:, None, None]).square_().mean(dim=(1, 2)))
    parts, within = torch.stack(means), torch.stack(spreads)
    sizes = torch.tensor(rows, dtype=parts.dtype, device=parts.device).view(-1, 1, 1) / sum(rows)
    # what is spread within parts, and what the parts' means are spread
    mean = (parts * sizes).sum(0)
    spread = ((within + (parts - mean).square()) * sizes).sum(0)
    batch, channels = mean.shape
    mean, spread = mean.view(batch, groups, -1), spread.view(batch, groups, -1)
    group_mean = mean.mean(-1, keepdim=True)
    deviation = (spread + (mean - group_mean).square()).mean(-1, keepdim=True).add_(eps).sqrt_()
    both = (part.expand_as(mean).reshape(batch, 1, 1, channels) for part in (group_mean, deviation))
    return next(both), next(both)


def _rows(pixels: Tensor) -> int:
    """How many rows of pixels (batch, H, W, channels) are dealt with at a time, whatever the batch."""
    return max(1, BLOCK // pixels[0, 0].numel())
