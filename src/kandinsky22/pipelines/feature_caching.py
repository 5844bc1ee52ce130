"""Feature caching of pipelines: options for `models.feature_cache`."""

from __future__ import annotations

import dataclasses
from typing import Any

from kandinsky22.errors import InputError
from kandinsky22.inputs.validation import positive_int
from kandinsky22.models.feature_cache import FeatureCache, check_levels
from kandinsky22.runtime.calls import check_idle
from kandinsky22.runtime.network_state import check_run_by_torch, unwrapped


@dataclasses.dataclass(frozen=True)
class FeatureCaching:
    """Settings of feature caching.

    Attributes:
        every: The whole UNet runs on every so many network evaluations.
        levels: Outer resolution levels that run on the others.
    """

    every: int
    levels: int


class FeatureCachingMixin:
    """Mixin for pipelines with a UNet: enable and disable feature caching (DeepCache, https://arxiv.org/abs/2312.00858)."""

    _feature_caching: FeatureCaching | None = None

    def enable_feature_caching(self, every: int = 2, levels: int = 1) -> None:
        """Run the whole UNet on every `every`-th step only, and its outer resolution levels on the steps between.

        Images change a little more with each step that is left out, see the documentation of speed and memory. Methods
        with two network evaluations per step count each evaluation.

        Args:
            every: From 1, which leaves nothing out.
            levels: Outer resolution levels that run on every step, from 1 to one less than the UNet has.

        Raises:
            InputError: If a number is out of range, the pipeline has no UNet, or OpenVINO runs it.
        """
        settings = FeatureCaching(positive_int("every", every), positive_int("levels", levels))
        unet: Any = getattr(self, "unet", None)
        if unet is None:
            raise InputError(f"{type(self).__name__} has no unet, the network whose features can be cached")
        check_run_by_torch({"unet": unet}, "enable_feature_caching()")
        check_levels(levels, len(unwrapped(unet).config.block_out_channels))
        check_idle(self, "feature caching")
        self._feature_caching = settings

    def disable_feature_caching(self) -> None:
        """Run the whole UNet on each step again."""
        check_idle(self, "feature caching")
        self._feature_caching = None

    def _new_feature_cache(self) -> FeatureCache | None:
        """Return an empty cache, or None if feature caching is disabled."""
        settings = self._feature_caching
        return None if settings is None else FeatureCache(settings.every, settings.levels)
