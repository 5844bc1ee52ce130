"""Feature caching (DeepCache, https://arxiv.org/abs/2312.00858): the UNet's inner stages do not run on every step.

From step to step the coarse content of an image changes little, and the stages that compute it take most of the time.
Results change, therefore it is off by default.
"""

from __future__ import annotations

from torch import Tensor

from kandinsky22.errors import invalid


class FeatureCache:
    """Features of the UNet's inner stages, for one generation and one condition.

    On every `every`-th call of the network, beginning with the first, all stages run: `get` returns None, and the
    network stores the features with `put`. On the calls between, only the outer stages of `levels` resolution levels
    run.

    Args:
        every: Interval of full steps, from 1.
        levels: Number of outer resolution levels that run on every call.
    """

    def __init__(self, every: int, levels: int = 1) -> None:
        self.every, self.levels = every, levels
        self._features: Tensor | None = None
        self._calls = 0

    def get(self, batch: int) -> Tensor | None:
        """Return the features for this call; None if all stages must run.

        Args:
            batch: Batch size of the call.

        Raises:
            InputError: The cache holds features of another batch size.
        """
        is_full_step = self._calls % self.every == 0
        self._calls += 1
        if is_full_step:
            self._features = None  # freed before the next ones take memory
        features = self._features
        if features is not None and len(features) != batch:
            expected = f"{len(features)}, the batch size of the features in the FeatureCache"
            raise invalid("len(sample)", batch, expected, "use one FeatureCache per batch")
        return features

    def put(self, features: Tensor) -> None:
        """Store features of the inner stages, unless the next call is a full step.

        Args:
            features: Tensor (batch, channels, h, w).
        """
        if self.every > 1:  # cloned on GPUs, where the next step may overwrite the memory of CUDA graphs (`compile.py`)
            self._features = features.clone() if features.is_cuda else features


def check_levels(levels: int, count: int) -> None:
    """Check the number of outer resolution levels.

    Args:
        levels: Outer levels that run on every step.
        count: Levels of the UNet.

    Raises:
        InputError: No level, or no inner one, would be left.
    """
    if not 0 < levels < count:
        raise invalid("levels", levels, f"an integer from 1 to {count - 1}: this UNet has {count} resolution levels")
