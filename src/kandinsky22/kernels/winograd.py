"""3x3 convolutions with a quarter of the multiplications (Lavin & Gray 2015, https://arxiv.org/abs/1509.09308).

Sixteen results of a 4x4 square and the 6x6 numbers that they depend on are values and coefficients of polynomials:
known at six points in each direction, a product of such polynomials takes 36 multiplications instead of 144. The
transforms to points and back are sums over each square; what is between them is 36 matrix products over the channels.

In exact arithmetic nothing changes. In float32 rounding errors are about five times those of the direct sum, with the
points 0, +-3/4, +-3/2 and infinity: powers of them stay near 1, and they are exact in binary, so that only sums round.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kandinsky22.kernels import host_memory, linear
from kandinsky22.kernels.linear import packed_matrix, product

KIND = "winograd"  # of a layer's copy of its weight
SIDE = 4  # results of a square, along each side
REACH = 6  # numbers that they depend on
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)  # and infinity
SQUARES = 128  # so many are computed at a time, so that what is between the transforms stays in the caches
SLICE = 2**12  # kernels transformed at a time

turns = True
"""False switches `turn` off: matrices stay from one generation to the next."""


@functools.cache
def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """What turns 36 numbers into values (36, 36), 9 weights into values (36, 9), products into 16 results (16, 36).

    In float64. With N_j the product of p_j - p_l over the other points: weights are evaluated at p_j and divided by
    N_j, results are read from powers of p_j, and numbers meet the coefficients of the product of x - p_l.
    """
    points = torch.tensor(POINTS, dtype=torch.float64)
    count = len(points)
    values, weights, results = (
        torch.zeros(rows, columns, dtype=torch.float64) for rows, columns in ((6, 6), (6, 3), (4, 6))
    )
    for j, point in enumerate(points):
        others = torch.cat([points[:j], points[j + 1 :]])
        values[j, :count] = _coefficients(others)
        weights[j] = point ** torch.arange(3) / (point - others).prod()
        results[:, j] = point ** torch.arange(SIDE)
    values[count] = _coefficients(points)
    weights[count, 2] = results[SIDE - 1, count] = 1
    return torch.kron(values, values), torch.kron(weights, weights), torch.kron(results, results)


def _coefficients(roots: Tensor) -> Tensor:
    """Of the product of (x - root), the constant first."""
    made = torch.ones(1, dtype=torch.float64)
    for root in roots:
        made = torch.cat([made.new_zeros(1), made]) - root * torch.cat([made, made.new_zeros(1)])
    return made


def transformed(weight: Tensor) -> list[Tensor]:
    """A weight (out, in, 3, 3) as 36 packed matrices (out, in), four times as large together."""
    kernels = weight.reshape(-1, 9)
    values = host_memory.empty(kernels.float(), REACH * REACH, len(kernels))
    for start in range(0, len(kernels), SLICE):
        part = kernels[start : start + SLICE].double()
        values[:, start : start + SLICE] = transforms()[1] @ part.T
    return [packed_matrix(matrix) for matrix in values.view(-1, *weight.shape[:2])]


@contextlib.contextmanager
def turn(network: nn.Module, *, after: nn.Module) -> Iterator[None]:
    """Of the two networks, only the first has such matrices within, and none has at the end.

    They take four times the memory of weights, and making them takes a small part of the time of a network's work.
    """
    if turns:
        linear.give_up(after, KIND)
    try:
        yield
    finally:
        if turns:
            linear.give_up(network, KIND)


def fits(height: int, width: int) -> bool:
    """Whether pictures of this size are made of whole squares."""
    return height % SIDE == 0 and width % SIDE == 0


def convolve(
    features: Tensor, matrices: list[Tensor], channels: int, bias: Tensor | None, onto: Tensor | None = None
) -> Tensor:
    """The convolution of features (batch, in, H, W), padded by 1, as (batch, `channels`, H, W), both channels last.

    It is added to `onto`, if that is given, in its memory.
    """
    batch, inside, height, width = features.shape
    down, across = height // SIDE, width // SIDE
    rows = min(down, max(1, SQUARES // across))
    samples = min(batch, max(1, SQUARES // (down * across)))
    to_values, _, to_results = (matrix.float() for matrix in transforms())
    pixels = features.permute(0, 2, 3, 1)
    out = host_memory.empty(features, batch, height, width, channels) if onto is None else onto.permute(0, 2, 3, 1)
    for sample in range(0, batch, samples):
        for row in range(0, down, rows):
            band = pixels[sample : sample + samples, max(0, SIDE * row - 1) : SIDE * (row + rows) + 1]
            edges = int(row == 0), int(row + rows >= down)
            squares = _squares(band, edges)
            values = torch.mm(to_values, squares.reshape(REACH * REACH, -1)).view(REACH * REACH, -1, inside)
            products = torch.stack([product(part, matrix) for part, matrix in zip(values, matrices, strict=True)])
            results = torch.mm(to_results, products.flatten(1)).view(SIDE, SIDE, *squares.shape[2:5], channels)
            place = out[sample : sample + samples, SIDE * row : SIDE * (row + rows)]
            place = place.unflatten(2, (across, SIDE)).unflatten(1, (-1, SIDE))
            results = results.permute(2, 3, 0, 4, 1, 5)
            if bias is not None:
                results.add_(bias)
            place.copy_(results) if onto is None else place.add_(results)
    return out.permute(0, 3, 1, 2)


def _squares(band: Tensor, edges: tuple[int, int]) -> Tensor:
    """All 6x6 squares, 4 apart, of a band (samples, rows, columns, in), as (6, 6, samples, down, across, in).

    Zeros stand to its left and right, and where `edges` say so above and below.
    """
    padded = torch.nn.functional.pad(band, (0, 0, 1, 1, *edges))
    return padded.unfold(1, REACH, SIDE).unfold(2, REACH, SIDE).permute(4, 5, 0, 1, 2, 3)
