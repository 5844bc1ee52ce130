"""3x3 convolutions by Winograd's method, F(4x4, 3x3) (Lavin & Gray 2015, https://arxiv.org/abs/1509.09308).

The 16 results of a 4x4 tile and the 6x6 inputs that they depend on are values and coefficients of polynomials: known at
six points in each direction, a product of such polynomials takes 36 multiplications instead of 144. The transforms to
points and back are sums over each tile; between them are 36 matrix products over the channels.

In exact arithmetic nothing changes. In float32 rounding errors are about five times those of the direct sum, with the
points 0, ±3/4, ±3/2 and infinity: their powers stay near 1, and they are exact in binary, so that only sums round.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kandinsky22.kernels import host_memory, settings
from kandinsky22.kernels.linear import drop_packed, onednn_linear, pack_linear_weight

LAYOUT = "winograd"  # name of the layout of a layer's packed weight
OUTPUT_TILE = 4  # side of a tile of results
INPUT_TILE = 6  # side of the tile of inputs that these depend on
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)  # and infinity
TILES_PER_CHUNK = 128  # tiles computed at a time: intermediate values stay in the caches
KERNELS_PER_CHUNK = 2**12  # kernels transformed at a time


class Transforms(NamedTuple):
    """The three linear maps of the method, in float64, over flattened tiles.

    Attributes:
        inputs: Matrix (36, 36) from a tile of inputs to values at points.
        weights: Matrix (36, 9) from a kernel to values at points.
        results: Matrix (16, 36) from products at points to a tile of results.
    """

    inputs: Tensor
    weights: Tensor
    results: Tensor


@functools.cache
def transforms() -> Transforms:
    """Return the matrices Bᵀ⊗Bᵀ, G⊗G and Aᵀ⊗Aᵀ of Lavin & Gray (equation 8) for `POINTS`.

    With N_j the product of p_j - p_l over the other points: weights are evaluated at p_j and divided by N_j, results
    are read from powers of p_j, and inputs meet the coefficients of the product of x - p_l.
    """
    points = torch.tensor(POINTS, dtype=torch.float64)
    count = len(points)
    inputs, weights, results = (
        torch.zeros(rows, columns, dtype=torch.float64) for rows, columns in ((6, 6), (6, 3), (4, 6))
    )
    for j, point in enumerate(points):
        others = torch.cat([points[:j], points[j + 1 :]])
        inputs[j, :count] = _coefficients(others)
        weights[j] = point ** torch.arange(3, dtype=torch.float64) / (point - others).prod()
        results[:, j] = point ** torch.arange(OUTPUT_TILE, dtype=torch.float64)
    inputs[count] = _coefficients(points)
    weights[count, 2] = results[OUTPUT_TILE - 1, count] = 1
    return Transforms(torch.kron(inputs, inputs), torch.kron(weights, weights), torch.kron(results, results))


def _coefficients(roots: Tensor) -> Tensor:
    """Return the coefficients of the product of (x - root), the constant first."""
    coefficients = torch.ones(1, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    for root in roots:
        coefficients = torch.cat([zero, coefficients]) - root * torch.cat([coefficients, zero])
    return coefficients


def transform_weight(weight: Tensor) -> list[Tensor]:
    """Return a weight as 36 packed matrices (out, in), together four times as large.

    Args:
        weight: Tensor (out, in, 3, 3).
    """
    kernels, to_values = weight.reshape(-1, 9).float(), transforms().weights.float()
    return [pack_linear_weight(torch.mv(kernels, row).view(weight.shape[:2])) for row in to_values]


@contextlib.contextmanager
def weights_in_use_by(network: nn.Module, *, after: nn.Module) -> Iterator[None]:
    """Return a context manager that frees the Winograd weights of `after` on entry and those of `network` on exit.

    They take four times the memory of the weights, and packing them again takes a small part of the time that the
    network runs.

    Args:
        network: Network that runs inside the context.
        after: Network that ran before.
    """
    frees = settings.current().free_winograd_weights
    if frees:
        drop_packed(after, LAYOUT)
    try:
        yield
    finally:
        if frees:
            drop_packed(network, LAYOUT)


def is_supported_size(height: int, width: int) -> bool:
    """Return whether features of this size consist of complete tiles.

    Args:
        height: Rows of the features.
        width: Columns of the features.
    """
    return height % OUTPUT_TILE == 0 and width % OUTPUT_TILE == 0


def convolve(
    features: Tensor, matrices: list[Tensor], channels: int, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """Return a 3x3 convolution with padding 1, (batch, channels, H, W), channels last.

    Args:
        features: Tensor (batch, in, H, W), float32, channels last, for whose size `is_supported_size` is true.
        matrices: The weight as `transform_weight` returns it.
        channels: Number of output channels.
        bias: Tensor (channels,), None for no bias.
        residual: Channels-last tensor of the result's shape to add; it is overwritten with the sum. None adds nothing.
    """
    batch, in_channels, height, width = features.shape
    tile_rows, tile_columns = height // OUTPUT_TILE, width // OUTPUT_TILE
    rows_per_chunk = min(tile_rows, max(1, TILES_PER_CHUNK // tile_columns))
    items_per_chunk = min(batch, max(1, TILES_PER_CHUNK // (tile_rows * tile_columns)))
    to_inputs, to_results = transforms().inputs.float(), transforms().results.float()
    pixels = features.permute(0, 2, 3, 1)
    if residual is None:
        out = host_memory.empty_large(features, batch, height, width, channels)
    else:
        out = residual.permute(0, 2, 3, 1)
    for item in range(0, batch, items_per_chunk):
        for row in range(0, tile_rows, rows_per_chunk):
            first, last = OUTPUT_TILE * row, OUTPUT_TILE * (row + rows_per_chunk)
            strip = pixels[item : item + items_per_chunk, max(0, first - 1) : last + 1]
            tiles = _input_tiles(strip, pad_above=row == 0, pad_below=row + rows_per_chunk >= tile_rows)
            values = torch.mm(to_inputs, tiles.reshape(INPUT_TILE**2, -1)).view(INPUT_TILE**2, -1, in_channels)
            products = torch.stack([onednn_linear(*pair) for pair in zip(values, matrices, strict=True)])
            results = torch.mm(to_results, products.flatten(1))
            results = results.view(OUTPUT_TILE, OUTPUT_TILE, *tiles.shape[2:5], channels).permute(2, 3, 0, 4, 1, 5)
            if bias is not None:
                results.add_(bias)
            target = out[item : item + items_per_chunk, first:last]
            target = target.unflatten(2, (tile_columns, OUTPUT_TILE)).unflatten(1, (-1, OUTPUT_TILE))
            target.copy_(results) if residual is None else target.add_(results)
    return out.permute(0, 3, 1, 2)


def _input_tiles(strip: Tensor, *, pad_above: bool, pad_below: bool) -> Tensor:
    """Return the 6x6 tiles, 4 apart, of a strip (items, rows, columns, in): (6, 6, items, tile rows, tile columns, in).

    The strip is padded by a zero column on either side and, if requested, by a zero row above and below.
    """
    padded = torch.nn.functional.pad(strip, (0, 0, 1, 1, int(pad_above), int(pad_below)))
    return padded.unfold(1, INPUT_TILE, OUTPUT_TILE).unfold(2, INPUT_TILE, OUTPUT_TILE).permute(4, 5, 0, 1, 2, 3)
