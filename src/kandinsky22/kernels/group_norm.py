"""Group normalisation for CPUs, of features that have their channels last in memory, with what follows it.

A scale and a shift for each channel and place, and silu, are applied a few rows at a time, while the rows are in the
cache. The formula is torch's, and so is the result but for rounding: torch's own kernel for this layout takes the
variance as the mean of squares minus the square of the mean, which costs up to three digits; here it is the mean of
squared distances to the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kandinsky22.kernels import host_memory

MEASURED = 2**18  # numbers of features that are averaged at a time: a megabyte in float32
BLOCK = 2**19  # and that are normalised at a time

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
    if features.dtype == torch.bfloat16 and scale.shape == shift.shape == (1, features.shape[1], 1, 1):
        # torch's kernel is faster, and keeps far more digits of the variance than the result has
        made = F.group_norm(features, groups, scale.flatten(), shift.flatten(), eps)
        return F.silu(made, inplace=True) if activated else made
    pixels = features.permute(0, 2, 3, 1)
    table = Table(moments(pixels.split(_row_count(pixels, MEASURED), dim=1), groups, eps), scale, shift)
    out = pixels if spent else host_memory.empty(pixels, *pixels.shape)
    return table.apply(pixels, 0, pixels.shape[1], activated=activated, out=out).permute(0, 3, 1, 2)


class Table:
    """What normalised features are times and plus, at each place: all that is to be known of them and of the norm."""

    def __init__(self, moments: tuple[Tensor, Tensor], scale: Tensor, shift: Tensor) -> None:
        mean, deviation = moments
        scale, shift = (part.permute(0, 2, 3, 1).float().contiguous() for part in (scale, shift))
        self.scale = scale / deviation
        self.shift = shift - mean * self.scale
        self.height, self.width = self.scale.shape[1:3]

    def apply(self, pixels: Tensor, first: int, height: int, *, activated: bool, out: Tensor | None = None) -> Tensor:
        """Normalised pixels (batch, rows, W, channels), which begin with the row `first` of `height` rows.

        They are written to `out`, whose rows lie without gaps, and which may be the pixels.
        """
        out = torch.empty_like(pixels, memory_format=torch.contiguous_format) if out is None else out
        given, made = pixels.flatten(2), out.view(*out.shape[:2], -1)
        tall, across = height // self.height, pixels.shape[2] // self.width
        most = _row_count(pixels, BLOCK)
        space = None if pixels.dtype == torch.float32 else given.new_empty(
            len(given), min(most, given.shape[1]), given.shape[2], dtype=torch.float32
        )  # fmt: skip
        looked_up: tuple[int, int] | None = None
        for start, rows, entries in _spans(first, first + pixels.shape[1], tall, most):
            if looked_up != (start // tall, entries):
                looked_up = start // tall, entries
                scale, shift = (_spread(part, *looked_up, across) for part in (self.scale, self.shift))
            here = slice(start - first, start - first + rows)
            part, place = (whole[:, here].unflatten(1, (entries, -1)) for whole in (given, made))
            if space is None:
                result = torch.addcmul(shift, part, scale, out=place)
            else:
                result = space[:, :rows].unflatten(1, (entries, -1)).copy_(part)
                torch.addcmul(shift, result, scale, out=result)
            if activated:
                F.silu(result, inplace=True)
            if space is not None:
                place.copy_(result)
        return out


def _spans(first: int, last: int, tall: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Spans of rows: where each begins, its rows, `most` or less, and how many entries of a table it is about.

    An entry stands for `tall` rows. A span is about several whole ones, or about one or a part of one.
    """
    while first < last:
        inside = first % tall
        whole = 0 if inside else min(most, last - first) // tall
        rows = whole * tall or min(most, tall - inside, last - first)
        yield first, rows, max(1, whole)
        first += rows


def _spread(table: Tensor, first: int, entries: int, across: int) -> Tensor:
    """Some rows of a table (batch, h, w, channels) with each place repeated `across` times, (batch, entries, 1, row).

    Sums and products of long rows that lie in memory as they are take a third of the time of those that repeat.
    """
    rows = table[:, first : first + entries, None, :, None]
    return rows.expand(-1, -1, -1, -1, across, -1).flatten(3)


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


def _row_count(pixels: Tensor, numbers: int) -> int:
    """How many rows of pixels (batch, H, W, channels) have so many numbers, whatever the batch."""
    return max(1, numbers // pixels[0, 0].numel())
