"""Guidance: how the predictions with and without a condition become one, and when.

Ho & Salimans 2022 (https://arxiv.org/abs/2207.12598) extrapolate from the unconditional prediction through the
conditional one. Much of it makes samples follow their condition, and exaggerates contrast and colours; the options of
`Guidance` are ways to have the one without the other, or at half the cost.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.inputs import validation
from kandinsky22.schedulers.base import dynamic_threshold

Interval: TypeAlias = tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The guidance of a call, checked; errors name a field as pipelines do, with `guidance_` before it.

    `scale` is how far to extrapolate; at 1 and below guidance is off and the other fields have nothing to act on.

    `rescale`, 0 to 1, draws the deviation of the guided prediction towards that of the conditional one, 1 making them
    equal (Lin et al. 2023, section 3.4, https://arxiv.org/abs/2305.08891).

    `interval` is the part of the way from noise (0) to the finished sample (1) that is guided: a step that begins
    within it, its end excluded, costs both halves of a batch, every other step the conditional half alone
    (Kynkäänniemi et al. 2024, https://arxiv.org/abs/2404.07724). None guides everywhere.

    `threshold`, above 0 and up to 1, is the quantile of magnitudes at which the guided clean sample is limited (Saharia
    et al. 2022, section 2.3, https://arxiv.org/abs/2205.11487): what is beyond it is cut off, and the rest scaled down
    to where the conditional clean sample has that quantile. The paper scales to [-1, 1], the range of pixels, where
    latents and embeddings have no such range. None leaves samples as they are; it acts after `rescale`.
    """

    scale: float
    rescale: float = 0.0
    interval: Interval = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "scale", validation.number("guidance_scale", self.scale))
        put(self, "rescale", validation.number("guidance_rescale", self.rescale))
        if not 0 <= self.rescale <= 1:
            raise InputError(f"guidance_rescale={self.rescale!r}: a number from 0 (off) to 1 is needed")
        if self.interval is not None:
            put(self, "interval", _interval(self.interval))
        if self.threshold is not None:
            put(self, "threshold", validation.number("guidance_threshold", self.threshold))
            if not 0 < self.threshold <= 1:
                raise InputError(f"guidance_threshold={self.threshold!r}: a number above 0, at most 1, is needed")

    @property
    def on(self) -> bool:
        """Whether any step may be guided, so that negatives are needed."""
        return self.scale > 1

    def acts(self, progress: float) -> bool:
        """Whether a step is guided that begins at this part of the way, 0 to 1."""
        return self.on and (self.interval is None or self.interval[0] <= progress < self.interval[1])

    def check(self, scheduler: Any) -> None:
        """Raise InputError unless this scheduler, its timesteps set, tells what the options need to know."""
        if self.threshold is not None:
            clean_weights(scheduler, scheduler.timesteps[0])

    def combine(self, output: Tensor, seen: Tensor, scheduler: Any, timestep: Any) -> Tensor:
        """The guided prediction (batch, ...) from the network's `output` for the unconditional rows, then the
        conditional ones; `seen` (batch, channels, ...) is what it was shown.

        Only as many channels as were seen are guided: a variance behind them is taken from the conditional rows.
        """
        channels = seen.shape[1]
        unconditional, conditional = output.chunk(2)
        base, wanted = unconditional[:, :channels], conditional[:, :channels]
        guided = base + self.scale * (wanted - base)
        if self.rescale > 0:
            guided = guided * (self.rescale * _deviation(wanted) / _deviation(guided) + (1 - self.rescale))
        if self.threshold is not None:
            guided = limited(guided, wanted, seen, clean_weights(scheduler, timestep), self.threshold)
        return torch.cat([guided, conditional[:, channels:]], dim=1) if output.shape[1] > channels else guided


def limited(guided: Tensor, wanted: Tensor, seen: Tensor, weights: tuple[float, float], ratio: float) -> Tensor:
    """The guided prediction whose clean sample is thresholded in the range of that of the prediction `wanted`.

    All are (batch, ...); `weights` are those of `clean_weights`, `ratio` is the quantile that counts as the range.
    """
    carried, factor = weights[0] * seen.float(), weights[1]
    scale = torch.quantile((carried + factor * wanted).abs().flatten(1), ratio, dim=1)
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny).reshape(-1, *[1] * (seen.ndim - 1))
    clean = dynamic_threshold((carried + factor * guided) / scale, ratio, math.inf) * scale
    return ((clean - carried) / factor).to(guided.dtype)


def clean_weights(scheduler: Any, timestep: Any) -> tuple[float, float]:
    """What the sample that the network is shown, and its prediction, are multiplied with to give the clean sample.

    Networks are shown samples at the variance they were trained with, so that this follows from `timestep` alone,
    whole or not, whichever way the scheduler goes. Raises InputError for one that knows no such products of alphas.
    """
    kind, table = scheduler.config.prediction_type, getattr(scheduler, "alphas_cumprod", None)
    if kind == "sample":
        return 0.0, 1.0
    if table is None or kind not in ("epsilon", "v_prediction"):
        raise InputError(
            f"guidance_threshold: {type(scheduler).__name__} with prediction_type={kind!r} does not tell what clean "
            "sample a prediction implies; schedulers with alphas_cumprod, and predictions of epsilon, sample or "
            "v_prediction do"
        )
    kept = float(np.interp(float(timestep), np.arange(len(table)), table.cpu().double().numpy()))
    signal, noise = max(kept, 1e-12) ** 0.5, (1 - kept) ** 0.5  # pure noise would imply an infinite clean sample
    return (signal, -noise) if kind == "v_prediction" else (1 / signal, -noise / signal)


def _deviation(prediction: Tensor) -> Tensor:
    """Standard deviation of each sample's numbers, (batch, 1, ...), above 0."""
    deviation = prediction.std(dim=tuple(range(1, prediction.ndim)), keepdim=True)
    return deviation.clamp(min=torch.finfo(prediction.dtype).tiny)


def _interval(given: Any) -> tuple[float, float]:
    if isinstance(given, tuple | list) and len(given) == 2:
        start, end = (validation.number("guidance_interval", each) for each in given)
        if 0 <= start < end <= 1:
            return start, end
    raise InputError(f"guidance_interval={given!r}: two numbers from 0 to 1, the first below the second, are needed")
