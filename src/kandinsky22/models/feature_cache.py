"""Feature caching: what the inner levels of the UNet make of one step serves the steps after it too.

From step to step the coarse content of a picture changes little, and the levels that make it take most of the time
(DeepCache, https://arxiv.org/abs/2312.00858). It changes results, so it is off until a pipeline is told otherwise.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kandinsky22.errors import InputError


class FeatureCache:
    """What the inner levels made of a step, for the next ones: of one generation, and of one condition of it.

    On every `every`-th call of the network, beginning with the first, all levels run (`recall` gives None, and the
    network leaves its features by `keep`); on the calls between, only the `levels` outer ones.
    """

    def __init__(self, every: int, levels: int = 1) -> None:
        self.every, self.levels = every, levels
        self._features: Tensor | None = None
        self._calls = 0

    def recall(self, rows: int) -> Tensor | None:
        """The features to go on with in this call, for a batch of so many rows; None if all levels have to run."""
        due = self._calls % self.every == 0
        self._calls += 1
        if due:
            self._features = None  # before the new ones take memory too
        features = self._features
        if features is not None and len(features) != rows:
            raise InputError(f"sample has {rows} rows, its FeatureCache serves {len(features)}: use one for each batch")
        return features

    def keep(self, features: Tensor) -> None:
        """Take what the inner levels made, unless the next call is to make its own."""
        if self.every > 1:  # copied on GPUs, where CUDA graphs (`compile.py`) may use the memory again in the next step
            self._features = features.clone() if features.is_cuda else features


def check_levels(levels: int, count: int) -> None:
    """Raise InputError unless so many outer levels of `count` leave inner ones whose features could be kept."""
    if not 0 < levels < count:
        raise InputError(f"levels={levels}: this UNet has {count} levels; accepted: 1 to {count - 1} outer ones")


class CachesFeatures:
    """What pipelines with a UNet can be told about feature caching."""

    _feature_caching: tuple[int, int] | None = None

    def enable_feature_caching(self, every: int = 2, levels: int = 1) -> None:
        """Run all of the UNet on every `every`-th step only, its `levels` outer levels on those between.

        Pictures change a little more with each step left out: docs/speed-and-memory.md. With every=1 nothing is left
        out. Methods that call the network twice a step count each call. Raises InputError for numbers below 1, or
        as many levels as the UNet has.
        """
        given: dict[str, Any] = {"every": every, "levels": levels}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r}; accepted: a whole number from 1")
        unet: Any = getattr(self, "unet", None)
        if unet is None:
            raise InputError(f"{type(self).__name__} has no unet, the network whose features can be kept")
        check_levels(levels, len(unet.config.block_out_channels))
        self._feature_caching = every, levels

    def disable_feature_caching(self) -> None:
        """Run all of the UNet on each step again."""
        self._feature_caching = None

    def _feature_cache(self) -> FeatureCache | None:
        """An empty cache, if there is to be one."""
        return None if self._feature_caching is None else FeatureCache(*self._feature_caching)
