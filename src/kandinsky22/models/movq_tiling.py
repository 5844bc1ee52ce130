"""MoVQ for large pictures, a band of rows at a time: exact, in a fraction of the memory.

Convolutions look one row up and down, so a band with one more row on each side gives all rows between. Norms look at
the whole picture, so each is taken in two passes, of which the first only sums. Of a residual block, only what enters
it and what its first convolution gives are ever whole in memory; what enters the level of full size is never whole but
computed again where it is needed. Attention is at the size of the latents. So the result is that of the whole picture,
up to rounding, without seams or shifts of colour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.kernels import host_memory
from kandinsky22.kernels.group_norm import Table, moments

NUMBERS = 2**24  # of features in a band: 64 MB in float32
STEP = 4  # bands have a multiple of so many rows, which is what fast convolutions like


class Rows(Protocol):
    """Features of which some rows can be had at a time."""

    shape: tuple[int, int, int, int]

    def rows(self, first: int, last: int) -> Tensor:
        """Features (batch, channels, last - first, W)."""


class Whole:
    """Rows of features that are there."""

    def __init__(self, features: Tensor) -> None:
        self.features = features.contiguous(memory_format=torch.channels_last)
        self.shape: Any = tuple(features.shape)

    def rows(self, first: int, last: int) -> Tensor:
        """Features (batch, channels, last - first, W)."""
        return self.features[:, :, first:last]


class Doubled:
    """Rows of what an upsampler, twice the size and a 3x3 convolution, makes of features."""

    def __init__(self, features: Tensor, upsampler: nn.Module) -> None:
        batch, channels, height, width = features.shape
        self._features, self._upsampler = features, upsampler
        self.shape: Any = (batch, channels, 2 * height, 2 * width)

    def rows(self, first: int, last: int) -> Tensor:
        """Features (batch, channels, last - first, W)."""
        upper, lower = max(0, first // 2 - 1), min(self._features.shape[2], -(-last // 2) + 1)
        made: Tensor = self._upsampler(self._features[:, :, upper:lower])
        return made[:, :, first - 2 * upper : last - 2 * upper]


class Convolved:
    """Rows of a 3x3 convolution of features."""

    def __init__(self, features: Tensor, convolution: nn.Conv2d) -> None:
        self._features, self._convolution = features, convolution
        self.shape: Any = (len(features), convolution.out_channels, *features.shape[2:])

    def rows(self, first: int, last: int) -> Tensor:
        """Features (batch, channels, last - first, W)."""
        upper, lower = max(0, first - 1), min(self.shape[2], last + 1)
        made: Tensor = self._convolution(self._features[:, :, upper:lower])
        return made[:, :, first - upper : last - upper]


def decode(decoder: Any, features: Tensor, latents: Tensor) -> Tensor:
    """What `decoder(features, latents)` gives."""
    latents = latents.contiguous(memory_format=torch.channels_last)  # the norms' tables of places come like that
    rows: Rows = Whole(decoder.mid_block(decoder.conv_in(features), latents))
    largest = len(decoder.up_blocks) - 2  # after which features are as large as they get
    for number, level in enumerate(decoder.up_blocks):
        for index, block in enumerate(level.resnets):
            made = _residual(block, rows, latents)
            if index < len(level.attentions):
                made = level.attentions[index](made, latents=latents)
            rows = Whole(made)
        if number == largest:
            rows = Doubled(made, level.upsamplers[0])
        elif level.resample is not None:
            rows = Whole(level.upsamplers[0](made))
    return _convolution(decoder.conv_norm_out, decoder.conv_out, rows, latents)


def encode(encoder: Any, sample: Tensor) -> Tensor:
    """What `encoder(sample)` gives."""
    rows: Rows = Convolved(sample, encoder.conv_in)
    for level in encoder.down_blocks:
        for index, block in enumerate(level.resnets):
            made = _residual(block, rows, None)
            if index < len(level.attentions):
                made = level.attentions[index](made)
            rows = Whole(made)
        if level.resample is not None:
            made = _halved(level.downsamplers[0].conv, made)
            rows = Whole(made)
    made = encoder.mid_block(made)
    return _convolution(encoder.conv_norm_out, encoder.conv_out, Whole(made), None)


def _residual(block: Any, rows: Rows, latents: Tensor | None) -> Tensor:
    """What a residual block without time makes of all rows."""
    hidden = _convolution(block.norm1, block.conv1, rows, latents)
    return _convolution(block.norm2, block.conv2, Whole(hidden), latents, into=hidden, shortcut=(rows, block))


def _convolution(
    norm: nn.Module,
    convolution: nn.Module,
    rows: Rows,
    latents: Tensor | None,
    *,
    into: Tensor | None = None,
    shortcut: tuple[Rows, Any] | None = None,
) -> Tensor:
    """A norm, silu and a 3x3 convolution; the result may take the place of whole features, plus a block's shortcut."""
    batch, _, height, width = rows.shape
    table: Table = norm(rows, latents)
    out, waiting = into, None
    for first, last in _bands(rows):
        part = table.apply(rows.rows(first, last).permute(0, 2, 3, 1), first, height, activated=True)
        if waiting is not None and out is not None:  # the band before, whose last rows this one has looked at by now
            out[:, :, waiting[0] : waiting[1]] = waiting[2]
        made = convolution(part.permute(0, 3, 1, 2))
        upper, lower = first + (first > 0), last - (last < height)
        made = made[:, :, upper - first : lower - first]
        if shortcut is not None:
            whole, block = shortcut
            given = whole.rows(upper, lower)
            made.add_(given if block.conv_shortcut is None else block.conv_shortcut(given))
        if out is None:
            out = host_memory.empty(made, batch, height, width, made.shape[1]).permute(0, 3, 1, 2)
        waiting = upper, lower, made
    assert out is not None and waiting is not None
    out[:, :, waiting[0] : waiting[1]] = waiting[2]
    return out


def _halved(convolution: nn.Module, features: Tensor) -> Tensor:
    """Half the size, by a convolution that looks one row and column beyond the lower right edge."""
    height, made = features.shape[2], []
    size = _size(features.shape)
    for first in range(0, height, size):
        part = features[:, :, first : first + size + 1]
        made.append(convolution(F.pad(part, (0, 1, 0, int(first + size >= height)))))
    return torch.cat(made, dim=2)


def _bands(rows: Rows) -> Iterator[tuple[int, int]]:
    """First and last row of bands that overlap by two rows or more, so that rows at their edges are inside another."""
    height, size = rows.shape[2], _size(rows.shape)
    first = 0
    while first + size < height:
        yield first, first + size
        first = min(first + size - 2, height - size)
    yield first, height


def measured(rows: Rows, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation, as `normalise.moments` gives them, of all rows."""
    height, size = rows.shape[2], _size(rows.shape)
    blocks = (rows.rows(first, min(first + size, height)) for first in range(0, height, size))
    return moments((block.permute(0, 2, 3, 1) for block in blocks), groups, eps)


def _size(shape: Sequence[int]) -> int:
    """Rows of a band of features."""
    batch, channels, height, width = shape
    return min(height, max(4 * STEP, NUMBERS // (batch * channels * width) // STEP * STEP))
