"""Group normalisation for CPUs, of features that have their channels last in memory, with what follows it.

A scale and a shift for each channel and place, and silu, are applied a few rows at a time, while the rows are in the
cache. The formula is torch's, and so is the result but for rounding: torch's own kernel for this layout takes the
variance as the mean of squares minus the square of the mean, which costs up to three digits; here it is the mean of
squared distances to the mean.
"""

from __future__ import annotations

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
    mean, deviation = _moments(pixels, groups, eps)
    scale, shift = (part.permute(0, 2, 3, 1).float() for part in (scale, shift))
    scale = scale / deviation
    shift = shift - mean * scale
    down, across = scale.shape[1:3]
    tall = pixels.shape[1] // down  # rows of features for which one row of scale and shift stands
    step = _rows(pixels) if down == 1 else tall
    out = pixels if spent else pages.empty(pixels, *pixels.shape)
    for row in range(0, pixels.shape[1], step):
        part, place = (whole[:, row : row + step].unflatten(2, (across, -1)) for whole in (pixels, out))
        # (batch, 1 row, across, 1 column, channels), against (batch, rows, across, columns, channels)
        a, b = (whole[:, row // tall, :][:, None, :, None] for whole in (scale, shift))
        made = torch.addcmul(b, part, a, out=place) if part.dtype == a.dtype else torch.addcmul(b, part.float(), a)
        if activated:
            F.silu(made, inplace=True)
        if made is not place:
            place.copy_(made)
    return out.permute(0, 3, 1, 2)


def _moments(pixels: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the group that each channel belongs to, (batch, 1, 1, channels) each, in float32."""
    batch, height, _, channels = pixels.shape
    blocks = pixels.split(_rows(pixels), dim=1)
    sizes = torch.tensor([block.shape[1] / height for block in blocks]).view(-1, 1, 1)
    means, spreads = torch.empty(2, len(blocks), batch, channels)
    for index, block in enumerate(blocks):
        block = block.float()
        torch.mean(block, dim=(1, 2), out=means[index])
        distances = block - means[index][:, None, None]
        torch.mean(distances.square_(), dim=(1, 2), out=spreads[index])
    # what is spread within parts, and what the parts' means are spread
    mean = (means * sizes).sum(0)
    spread = ((spreads + (means - mean).square()) * sizes).sum(0)
    mean, spread = mean.view(batch, groups, -1), spread.view(batch, groups, -1)
    group_mean = mean.mean(-1, keepdim=True)
    deviation = (spread + (mean - group_mean).square()).mean(-1, keepdim=True).add_(eps).sqrt_()
    both = (part.expand_as(mean).reshape(batch, 1, 1, channels) for part in (group_mean, deviation))
    return next(both), next(both)


def _rows(pixels: Tensor) -> int:
    """How many rows of pixels (batch, H, W, channels) are dealt with at a time."""
    return max(1, BLOCK // pixels[:, 0].numel())
