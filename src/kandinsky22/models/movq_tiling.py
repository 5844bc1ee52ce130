"""MoVQ for large images, one band of rows at a time: exact, in a fraction of the memory.

A 3x3 convolution reads one row up and down, therefore a band with one more row on each side gives all rows between.
Norms depend on the entire image, therefore each takes two passes, the first for its statistics only. Of the features in
a residual block, only the input and the output of the first convolution are ever complete in memory; the input of the
full-size stage never is, but is computed again where it is needed. Attention runs at latent size. The result is that
of the entire image, up to rounding, without seams or shifts of colour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.kernels import host_memory
from kandinsky22.kernels.group_norm import GroupStatistics, ScaleShift, group_statistics

BAND_ELEMENTS = 2**24  # elements of the features in a band: 64 MB in float32
ROW_MULTIPLE = 4  # the height of a band is a multiple of the side of a Winograd tile

Shape = tuple[int, int, int, int]


class RowSource(Protocol):
    """Features (batch, channels, H, W) whose rows are available a few at a time.

    Attributes:
        shape: Shape of all features.
    """

    shape: Shape

    def rows(self, first: int, last: int) -> Tensor:
        """Return features (batch, channels, last - first, W).

        Args:
            first: Index of the first row.
            last: Index after the last row.
        """


class TensorRows:
    """Row source backed by a tensor in memory."""

    def __init__(self, features: Tensor) -> None:
        self.features = features.contiguous(memory_format=torch.channels_last)
        self.shape: Shape = _shape(features)

    def rows(self, first: int, last: int) -> Tensor:
        """Return features (batch, channels, last - first, W).

        Args:
            first: Index of the first row.
            last: Index after the last row.
        """
        return self.features[:, :, first:last]


class UpsampledRows:
    """Row source computed from features of half the size: the output of an upsampler (2x and a 3x3 convolution)."""

    def __init__(self, features: Tensor, upsampler: nn.Module) -> None:
        batch, channels, height, width = features.shape
        self._features, self._upsampler = features, upsampler
        self.shape: Shape = (batch, channels, 2 * height, 2 * width)

    def rows(self, first: int, last: int) -> Tensor:
        """Return features (batch, channels, last - first, W).

        Args:
            first: Index of the first row.
            last: Index after the last row.
        """
        upper, lower = max(0, first // 2 - 1), min(self._features.shape[2], -(-last // 2) + 1)
        upsampled: Tensor = self._upsampler(self._features[:, :, upper:lower])
        return upsampled[:, :, first - 2 * upper : last - 2 * upper]


class ConvRows:
    """Row source computed by a 3x3 convolution of a tensor."""

    def __init__(self, features: Tensor, convolution: nn.Conv2d) -> None:
        batch, _, height, width = features.shape
        self._features, self._convolution = features, convolution
        self.shape: Shape = (batch, convolution.out_channels, height, width)

    def rows(self, first: int, last: int) -> Tensor:
        """Return features (batch, channels, last - first, W).

        Args:
            first: Index of the first row.
            last: Index after the last row.
        """
        upper, lower = max(0, first - 1), min(self.shape[2], last + 1)
        convolved: Tensor = self._convolution(self._features[:, :, upper:lower])
        return convolved[:, :, first - upper : last - upper]


def decode(decoder: Any, features: Tensor, latents: Tensor) -> Tensor:
    """Return images (batch, out_channels, H, W), as `decoder(features, latents)` does.

    Args:
        decoder: MoVQ's `Decoder`.
        features: Tensor (batch, latent_channels, h, w).
        latents: Tensor (batch, vq_embed_dim, h, w).
    """
    latents = latents.contiguous(memory_format=torch.channels_last)  # the layout of ScaleShift
    rows: RowSource = TensorRows(decoder.mid_block(decoder.conv_in(features), latents))
    before_last = len(decoder.up_blocks) - 2  # its upsampler gives features of full size
    for number, stage in enumerate(decoder.up_blocks):
        for index in range(len(stage.resnets)):
            output = _block(stage, index, rows, latents)
            rows = TensorRows(output)
        if number == before_last:
            rows = UpsampledRows(output, stage.upsamplers[0])
        elif stage.resampler is not None:
            rows = TensorRows(stage.upsamplers[0](output))
    return _norm_conv(decoder.conv_norm_out, decoder.conv_out, rows, latents)


def encode(encoder: Any, sample: Tensor) -> Tensor:
    """Return features (batch, latent_channels, h, w), as `encoder(sample)` does.

    Args:
        encoder: MoVQ's `Encoder`.
        sample: Images (batch, in_channels, H, W).
    """
    rows: RowSource = ConvRows(sample, encoder.conv_in)
    for stage in encoder.down_blocks:
        for index in range(len(stage.resnets)):
            output = _block(stage, index, rows, None)
            rows = TensorRows(output)
        if stage.resampler is not None:
            output = _downsample(stage.downsamplers[0].conv, output)
            rows = TensorRows(output)
    output = encoder.mid_block(output)
    return _norm_conv(encoder.conv_norm_out, encoder.conv_out, TensorRows(output), None)


def _block(stage: Any, index: int, rows: RowSource, latents: Tensor | None) -> Tensor:
    """Return the output of a residual block of a stage, or of the attention layer after it if there is one."""
    output = _residual_block(stage.resnets[index], rows, latents)
    return stage.attentions[index](output, latents=latents) if index < len(stage.attentions) else output


@dataclass(frozen=True)
class _Shortcut:
    """The branch of a residual block that is added to the output of its second convolution."""

    source: RowSource
    convolution: nn.Module | None

    def rows(self, first: int, last: int) -> Tensor:
        rows = self.source.rows(first, last)
        return rows if self.convolution is None else self.convolution(rows)


def _residual_block(block: Any, rows: RowSource, latents: Tensor | None) -> Tensor:
    """Return the output of a residual block without time embedding."""
    hidden = _norm_conv(block.norm1, block.conv1, rows, latents)
    shortcut = _Shortcut(rows, block.conv_shortcut)
    return _norm_conv(block.norm2, block.conv2, TensorRows(hidden), latents, out=hidden, shortcut=shortcut)


def _norm_conv(
    norm: Any,
    convolution: nn.Module,
    rows: RowSource,
    latents: Tensor | None,
    *,
    out: Tensor | None = None,
    shortcut: _Shortcut | None = None,
) -> Tensor:
    """Return the output of a norm, SiLU and a 3x3 convolution, plus a shortcut; `out` may be the tensor of `rows`."""
    batch, _, height, width = rows.shape
    scale_shift: ScaleShift = norm.scale_shift(rows, latents)
    pending: tuple[int, int, Tensor] | None = None
    for first, last in _bands(rows.shape):
        pixels = rows.rows(first, last).permute(0, 2, 3, 1)
        band = scale_shift.apply(pixels, first, height, silu=True).permute(0, 3, 1, 2)
        if pending is not None and out is not None:  # this band has read the last rows of the one before by now
            out[:, :, pending[0] : pending[1]] = pending[2]
        upper, lower = first + (first > 0), last - (last < height)
        convolved = convolution(band)[:, :, upper - first : lower - first]
        if shortcut is not None:
            convolved.add_(shortcut.rows(upper, lower))
        if out is None:
            out = host_memory.empty_large(convolved, batch, height, width, convolved.shape[1]).permute(0, 3, 1, 2)
        pending = upper, lower, convolved
    assert out is not None and pending is not None
    out[:, :, pending[0] : pending[1]] = pending[2]
    return out


def _downsample(convolution: nn.Module, features: Tensor) -> Tensor:
    """Return features of half the size, by a strided convolution that reads one pixel beyond the lower right edge."""
    height, bands = features.shape[2], []
    size = _band_height(_shape(features))
    for first in range(0, height, size):
        rows = features[:, :, first : first + size + 1]
        bands.append(convolution(F.pad(rows, (0, 1, 0, int(first + size >= height)))))
    return torch.cat(bands, dim=2)


def _bands(shape: Shape) -> Iterator[tuple[int, int]]:
    """Yield the first row and the row after the last of bands, which overlap by two rows or more.

    A row at the edge of one band is therefore inside another, unless it is at the edge of the image.
    """
    height, size = shape[2], _band_height(shape)
    first = 0
    while first + size < height:
        yield first, first + size
        first = min(first + size - 2, height - size)
    yield first, height


def row_statistics(rows: RowSource, groups: int, eps: float) -> GroupStatistics:
    """Return mean and standard deviation of each group of channels over all rows.

    Args:
        rows: Source of the features.
        groups: Number of groups of channels.
        eps: Added to the variance.
    """
    height, size = rows.shape[2], _band_height(rows.shape)
    blocks = (rows.rows(first, min(first + size, height)) for first in range(0, height, size))
    return group_statistics((block.permute(0, 2, 3, 1) for block in blocks), groups, eps)


def _band_height(shape: Sequence[int]) -> int:
    """Return the rows per band of features (batch, channels, H, W)."""
    batch, channels, height, width = shape
    rows = BAND_ELEMENTS // (batch * channels * width) // ROW_MULTIPLE * ROW_MULTIPLE
    return min(height, max(4 * ROW_MULTIPLE, rows))


def _shape(features: Tensor) -> Shape:
    batch, channels, height, width = features.shape
    return batch, channels, height, width
