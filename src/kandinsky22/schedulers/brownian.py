"""Sample paths of Brownian motion: noise of intervals that belong together.

A path is a function of its seed alone. It does not depend on which of its values are asked for, or in which order, so
that steps of different lengths see the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

DIGITS = 6  # times are rounded to this number of decimals
POOL_SIZE = 24  # of the sequences of seeds, in words of 32 bits
CACHED_VALUES = 4  # a step of two stages uses three values


class BrownianPath:
    """A path W(t) of Brownian motion between two times, with W = 0 at the first.

    It is refined by halving: given the increment over an interval, the increment over its first half is normally
    distributed (the Brownian bridge). Each interval of this tree has its own seed.

    Sources: Levy's construction; for trees of seeds Li et al. 2020, algorithm 3, https://arxiv.org/abs/2001.01328. The
    seeds are those of torchsde's `BrownianInterval` with `halfway_tree=True`, so that the paths are equal too.

    Args:
        start: First time.
        end: Last time, not below `start`.
        seed: Seed, 0 or more.
        shape: Shape of a value.
        dtype: Type of the values.
        device: Device of the values. The noise is drawn on the CPU, and is the same for all devices.
    """

    def __init__(
        self,
        start: float,
        end: float,
        seed: int,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._start, self._end = round(start, DIGITS), round(end, DIGITS)
        self._seed, self._shape, self._dtype, self._device = seed, tuple(shape), dtype, device
        self._total = self._normal(()) * math.sqrt(end - start)
        self._values: dict[float, Tensor] = {}

    def increment(self, first: float, second: float) -> Tensor:
        """Return W(second) - W(first), which has the variance |second - first|.

        Args:
            first: A time; times outside the path are moved to its nearest end.
            second: Another time.
        """
        return self._value(second) - self._value(first)

    def _value(self, time: float) -> Tensor:
        time = min(max(round(time, DIGITS), self._start), self._end)
        if time not in self._values:
            while len(self._values) >= CACHED_VALUES:
                self._values.pop(next(iter(self._values)))
            self._values[time] = self._evaluate(time)
        return self._values[time]

    def _evaluate(self, time: float) -> Tensor:
        """Descend to the interval that ends at `time`, adding up the increments of the intervals before it."""
        start, end, increment = self._start, self._end, self._total
        value, index, depth = torch.zeros_like(increment), 0, 0
        while start < time < end:
            middle = round((start + end) / 2, DIGITS)
            before, after = middle - start, end - middle
            bridge = math.sqrt(before * after / (end - start)) * self._normal((index, depth))
            first_half = before / (end - start) * increment + bridge
            if time <= middle:
                end, increment, index = middle, first_half, 2 * index
            else:
                start, increment, index = middle, increment - first_half, 2 * index + 1
                value = value + first_half
            depth += 1
        return value + increment if time >= end else value

    def _normal(self, spawn_key: tuple[int, ...]) -> Tensor:
        """Return the standard normal noise of an interval: its position and depth in the tree; () for the whole."""
        sequence = np.random.SeedSequence(entropy=self._seed, spawn_key=spawn_key, pool_size=POOL_SIZE)
        # The tree's seeds are the first of 3 or 4 words, which do not depend on their number.
        generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
        return torch.randn(self._shape, generator=generator, dtype=self._dtype).to(self._device)
