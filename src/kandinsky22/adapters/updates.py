"""Updates of weights: what an adapter adds to one parameter of a network, and the sum of several of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """Low-rank update of a matrix or a convolution: scale · up · down (https://arxiv.org/abs/2106.09685, equation 3).

    Attributes:
        down: Matrix (rank, in), or kernels (rank, in, height, width).
        up: Matrix (out, rank).
        alpha: Numerator of the scale; the scale is alpha / rank.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return len(self.down)

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return (len(self.up), *self.down.shape[1:])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the update consists of."""
        return self.down, self.up

    def add_to(self, total: Tensor, base: Tensor, weight: float) -> None:
        """Add the weighted update to a tensor in place.

        Args:
            total: Contiguous float32 or float64 tensor of the parameter's shape.
            base: Value of the parameter without updates; unused.
            weight: Factor.
        """
        down, up = (factor.to(total).flatten(1) for factor in self.tensors)
        total.view(len(total), -1).addmm_(up, down, alpha=self.scale * weight)


@dataclasses.dataclass(frozen=True, eq=False)
class ReplacementUpdate:
    """Another value of a parameter, from a fine-tuned network: the update is its difference to the base weight.

    Attributes:
        value: Tensor of the parameter's shape.
    """

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.value.shape)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the update consists of."""
        return (self.value,)

    def add_to(self, total: Tensor, base: Tensor, weight: float) -> None:
        """Add the weighted update to a tensor in place.

        Args:
            total: Tensor of the parameter's shape.
            base: Value of the parameter without updates.
            weight: Factor.
        """
        total.add_(self.value.to(total) - base.to(total), alpha=weight)


WeightUpdate: TypeAlias = LowRankUpdate | ReplacementUpdate
Adapter: TypeAlias = Mapping[str, WeightUpdate]
"""One adapter of one network: updates by the name of the parameter."""


def merged(base: Tensor, updates: Sequence[tuple[float, WeightUpdate]]) -> Tensor:
    """Return base + Σ weight · update, in dtype, strides and device of the base.

    The sum is computed in float32 and rounded once. A single replacement with weight 1 is exact.

    Args:
        base: Value of a parameter without updates.
        updates: Pairs of weight and update, at least one.
    """
    with torch.inference_mode(False), torch.no_grad():
        replacements = [pair for pair in updates if isinstance(pair[1], ReplacementUpdate)]
        remaining = [*replacements, *(pair for pair in updates if not isinstance(pair[1], ReplacementUpdate))]
        start: Tensor = base.detach()
        if replacements and replacements[0][0] == 1:
            start = replacements[0][1].tensors[0]
            remaining = remaining[1:]
            if not remaining and start.dtype == base.dtype and start.device == base.device:
                return start  # perhaps mapped from its file, which needs no memory
        dtype = torch.promote_types(base.dtype, torch.float32)
        total = torch.empty(base.shape, dtype=dtype, device=base.device).copy_(start)
        for weight, update in remaining:
            update.add_to(total, base, weight)
        return torch.empty_like(base).copy_(total)


def concatenated(updates: Sequence[tuple[float, LowRankUpdate]]) -> tuple[Tensor, Tensor]:
    """Return the factors (down, up) of the weighted sum of low-rank updates; its rank is the sum of their ranks.

    Args:
        updates: Pairs of weight and update, at least one.
    """
    with torch.inference_mode(False), torch.no_grad():
        down = torch.cat([update.down.float() for _, update in updates])
        up = torch.cat([weight * update.scale * update.up.float() for weight, update in updates], dim=1)
    return down, up
