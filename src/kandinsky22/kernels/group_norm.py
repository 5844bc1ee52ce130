"""Group normalisation for CPUs, fused with the modulation and the SiLU after it, for channels-last features.

Scale, shift and SiLU are applied a few rows at a time, while the rows are in the cache. The formula is torch's, and so
is the result except for rounding: torch's kernel for this layout computes the variance as the mean of squares minus
the square of the mean, which costs up to three digits; here it is the mean of squared distances to the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kandinsky22.kernels import host_memory, settings

STATISTICS_BLOCK = 2**18  # elements whose statistics are computed at a time: a megabyte in float32
NORMALISE_BLOCK = 2**19  # elements that are normalised at a time


class GroupStatistics(NamedTuple):
    """Mean and standard deviation of the group that each channel belongs to, in float32.

    Attributes:
        mean: Tensor (batch, 1, 1, channels).
        deviation: Tensor (batch, 1, 1, channels), the square root of the variance plus eps.
    """

    mean: Tensor
    deviation: Tensor


def is_supported(features: Tensor) -> bool:
    """Return whether `group_norm` can be used for these features, and is faster than torch's kernel.

    Args:
        features: Tensor (batch, channels, H, W).
    """
    return (
        not torch.compiler.is_compiling()
        and settings.current().fused_group_norm
        and features.device.type == "cpu"
        and features.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
        and features.is_contiguous(memory_format=torch.channels_last)
    )


def group_norm(
    features: Tensor, groups: int, eps: float, scale: Tensor, shift: Tensor, *, silu: bool, inplace: bool
) -> Tensor:
    """Return (features - mean) / deviation * scale + shift, and SiLU of that if `silu`.

    Mean and deviation are those of each group of channels (https://arxiv.org/abs/1803.08494, equation 1).

    Args:
        features: Tensor (batch, channels, H, W), for which `is_supported` is true.
        groups: Number of groups of channels.
        eps: Added to the variance.
        scale: Tensor (batch or 1, channels, h, w), upsampled to (H, W) by nearest neighbour; h divides H, w divides W.
        shift: Tensor of the same shape.
        silu: Whether SiLU follows.
        inplace: Whether `features` may be overwritten.

    Returns:
        Tensor (batch, channels, H, W), channels last.
    """
    if features.dtype == torch.bfloat16 and scale.shape[2:] == shift.shape[2:] == (1, 1):
        # torch's kernel is faster, and keeps far more digits of the variance than the result has
        if len(scale) == len(shift) == 1:
            normed = torch.group_norm(features, groups, scale.flatten(), shift.flatten(), eps)
            return F.silu(normed, inplace=True) if silu else normed
        return _normalise_items(features, groups, eps, scale, shift, silu=silu, inplace=inplace)
    pixels = features.permute(0, 2, 3, 1)
    statistics = group_statistics(pixels.split(_row_count(pixels, STATISTICS_BLOCK), dim=1), groups, eps)
    out = pixels if inplace else host_memory.empty_large(pixels, *pixels.shape)
    normed = ScaleShift(statistics, scale, shift).apply(pixels, 0, pixels.shape[1], silu=silu, out=out)
    return normed.permute(0, 3, 1, 2)


def _normalise_items(
    features: Tensor, groups: int, eps: float, scale: Tensor, shift: Tensor, *, silu: bool, inplace: bool
) -> Tensor:
    """Compute `group_norm` by torch's kernel for a scale and shift that differ between the items of a batch."""
    out = features if inplace else torch.empty_like(features)
    scales, shifts = (part.flatten(1).expand(len(features), -1) for part in (scale, shift))
    for index in range(len(features)):
        item = slice(index, index + 1)
        normed = torch.group_norm(features[item], groups, scales[index], shifts[index], eps)
        if silu:
            torch.ops.aten.silu.out(normed, out=out[item])
        else:
            out[item].copy_(normed)
    return out


class ScaleShift:
    """Scale and shift per channel and spatial position that fuse a group norm with its modulation.

    y = x * scale + shift equals (x - mean) / deviation * modulation scale + modulation shift.
    """

    def __init__(self, statistics: GroupStatistics, scale: Tensor, shift: Tensor) -> None:
        scale, shift = (part.permute(0, 2, 3, 1).float().contiguous() for part in (scale, shift))
        self.scale = scale / statistics.deviation
        self.shift = shift - statistics.mean * self.scale
        self.height, self.width = self.scale.shape[1:3]

    def apply(self, pixels: Tensor, first: int, height: int, *, silu: bool, out: Tensor | None = None) -> Tensor:
        """Return normalised rows of features.

        Args:
            pixels: Tensor (batch, rows, W, channels): rows `first` to `first + rows` of the features.
            first: Index of the first row.
            height: Number of rows of all features, a multiple of the height of scale and shift.
            silu: Whether SiLU follows.
            out: Contiguous tensor for the result, which may be `pixels`; None allocates one.

        Returns:
            Tensor (batch, rows, W, channels).
        """
        out = torch.empty_like(pixels, memory_format=torch.contiguous_format) if out is None else out
        in_rows, out_rows = pixels.flatten(2), out.view(*out.shape[:2], -1)
        rows_per_entry, columns_per_entry = height // self.height, pixels.shape[2] // self.width
        limit = _row_count(pixels, NORMALISE_BLOCK)
        buffer = None  # bfloat16 rows are computed in float32
        if pixels.dtype != torch.float32:
            buffer_shape = len(in_rows), min(limit, in_rows.shape[1]), in_rows.shape[2]
            buffer = in_rows.new_empty(buffer_shape, dtype=torch.float32)
        expanded: tuple[int, int] | None = None
        for start, count, entries in _spans(first, first + pixels.shape[1], rows_per_entry, limit):
            if expanded != (start // rows_per_entry, entries):
                expanded = start // rows_per_entry, entries
                scale, shift = (_expand(part, *expanded, columns_per_entry) for part in (self.scale, self.shift))
            span = slice(start - first, start - first + count)
            source, target = (rows[:, span].unflatten(1, (entries, -1)) for rows in (in_rows, out_rows))
            if buffer is None:
                result = torch.addcmul(shift, source, scale, out=target)
            else:
                result = buffer[:, :count].unflatten(1, (entries, -1)).copy_(source)
                torch.addcmul(shift, result, scale, out=result)
            if silu:
                F.silu(result, inplace=True)
            if buffer is not None:
                target.copy_(result)
        return out


def _spans(first: int, last: int, rows_per_entry: int, limit: int) -> Iterator[tuple[int, int, int]]:
    """Yield spans of at most `limit` rows between `first` and `last`: first row, number of rows, entries of the table.

    An entry of the table belongs to `rows_per_entry` rows. A span covers several complete entries, or one or a part of
    one.
    """
    while first < last:
        offset = first % rows_per_entry
        complete = 0 if offset else min(limit, last - first) // rows_per_entry
        count = complete * rows_per_entry or min(limit, rows_per_entry - offset, last - first)
        yield first, count, max(1, complete)
        first += count


def _expand(table: Tensor, first: int, entries: int, repeats: int) -> Tensor:
    """Repeat each column in rows of a table (batch, h, w, channels): (batch, entries, 1, w * repeats * channels).

    Sums and products of long contiguous rows take a third of the time of broadcast ones.
    """
    rows = table[:, first : first + entries, None, :, None]
    return rows.expand(-1, -1, -1, -1, repeats, -1).flatten(3)


def group_statistics(blocks: Iterable[Tensor], groups: int, eps: float) -> GroupStatistics:
    """Return mean and standard deviation of each group of channels.

    Blocks are combined by the parallel algorithm of Chan, Golub and LeVeque (1979): variances within blocks plus
    variances of the blocks' means.

    Args:
        blocks: Tensors (batch, rows, W, channels), together all rows.
        groups: Number of groups of channels.
        eps: Added to the variance.
    """
    rows, block_means, block_variances = [], [], []
    for block in blocks:
        block = block.float()
        mean = block.mean(dim=(1, 2))
        rows.append(block.shape[1])
        block_means.append(mean)
        block_variances.append((block - mean[:, None, None]).square_().mean(dim=(1, 2)))
    means, variances = torch.stack(block_means), torch.stack(block_variances)
    shares = torch.tensor(rows, dtype=means.dtype, device=means.device).view(-1, 1, 1) / sum(rows)
    mean = (means * shares).sum(0)
    variance = ((variances + (means - mean).square()) * shares).sum(0)
    batch, channels = mean.shape
    mean, variance = mean.view(batch, groups, -1), variance.view(batch, groups, -1)
    group_mean = mean.mean(-1, keepdim=True)
    deviation = (variance + (mean - group_mean).square()).mean(-1, keepdim=True).add_(eps).sqrt_()
    return GroupStatistics(
        group_mean.expand_as(mean).reshape(batch, 1, 1, channels),
        deviation.expand_as(mean).reshape(batch, 1, 1, channels),
    )


def _row_count(pixels: Tensor, elements: int) -> int:
    """Return the rows of pixels (batch, H, W, channels) that have `elements` elements per batch item, at least one."""
    return max(1, elements // pixels[0, 0].numel())
