"""Classifier-free guidance: how the conditional and the unconditional prediction are combined, and at which steps.

Ho & Salimans 2022 (https://arxiv.org/abs/2207.12598): ``uncond + guidance_scale * (cond - uncond)``. Strong guidance
makes samples follow their condition, and exaggerates contrast and colour. The options of `Guidance` limit that side
effect, or the cost.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from kandinsky22.errors import InputError, invalid
from kandinsky22.inputs import validation
from kandinsky22.schedulers.base import dynamic_threshold

Interval: TypeAlias = tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The guidance of a call, validated on construction. Errors name pipeline arguments (``guidance_...``).

    Attributes:
        scale: Guidance scale. At 1 and below guidance is disabled, and the other fields have no effect.
        rescale: 0 to 1: moves the standard deviation of the guided prediction towards that of the conditional one; 1
            makes them equal (Lin et al. 2023, section 3.4, https://arxiv.org/abs/2305.08891).
        interval: Fractions (start, end) of the denoising process, 0 = pure noise, 1 = finished sample. A step that
            begins in [start, end) is guided and runs a batch of twice the size; every other step runs the conditional
            half alone (Kynkäänniemi et al. 2024, https://arxiv.org/abs/2404.07724). None guides every step.
        threshold: Quantile in (0, 1] at which magnitudes of the guided x0 are limited (Saharia et al. 2022, section
            2.3, https://arxiv.org/abs/2205.11487). Values beyond it are clipped, the rest is scaled to the range of the
            conditional x0: latents and embeddings do not have the fixed range [-1, 1] of the paper's pixels. Applied
            after `rescale`. None disables it.

    Raises:
        InputError: If a field is out of range.
    """

    scale: float
    rescale: float = 0.0
    interval: Interval = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {"scale": validation.finite_float("guidance_scale", self.scale)}
        checked["rescale"] = validation.finite_float("guidance_rescale", self.rescale)
        if not 0 <= checked["rescale"] <= 1:
            raise invalid("guidance_rescale", self.rescale, "a number from 0 (off) to 1")
        if self.interval is not None:
            checked["interval"] = _checked_interval(self.interval)
        if self.threshold is not None:
            checked["threshold"] = validation.finite_float("guidance_threshold", self.threshold)
            if not 0 < checked["threshold"] <= 1:
                raise invalid("guidance_threshold", self.threshold, "a number above 0 and at most 1")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def enabled(self) -> bool:
        """Whether any step may be guided; negative conditions are required then."""
        return self.scale > 1

    def is_active(self, progress: float) -> bool:
        """Return whether a step is guided.

        Args:
            progress: Fraction of the denoising process at which the step begins, 0 (pure noise) to 1.
        """
        return self.enabled and (self.interval is None or self.interval[0] <= progress < self.interval[1])

    def check_scheduler(self, scheduler: Any) -> None:
        """Check that the scheduler provides what the options need.

        Args:
            scheduler: A scheduler whose timesteps are set.

        Raises:
            InputError: If `threshold` is set and x0 does not follow from a prediction of this scheduler.
        """
        if self.threshold is not None:
            x0_coefficients(scheduler, scheduler.timesteps[0])

    def combine(self, output: Tensor, model_input: Tensor, scheduler: Any, timestep: Any) -> Tensor:
        """Combine both halves of a guided batch into the guided prediction.

        Channels beyond those of `model_input` (a learned variance) are not guided; they come from the conditional half.

        Args:
            output: Network output (2 * batch, channels, ...), unconditional half first.
            model_input: Network input of one half, (batch, latent channels, ...).
            scheduler: The scheduler of this call.
            timestep: Timestep of `output`.

        Returns:
            The guided prediction, (batch, channels, ...).
        """
        channels = model_input.shape[1]
        unconditional_output, conditional_output = output.chunk(2)
        unconditional, conditional = unconditional_output[:, :channels], conditional_output[:, :channels]
        guided = unconditional + self.scale * (conditional - unconditional)
        if self.rescale > 0:
            factor = self.rescale * _standard_deviation(conditional) / _standard_deviation(guided)
            guided = guided * (factor + (1 - self.rescale))
        if self.threshold is not None:
            coefficients = x0_coefficients(scheduler, timestep)
            guided = threshold_guided(guided, conditional, model_input, coefficients, self.threshold)
        if output.shape[1] == channels:
            return guided
        return torch.cat([guided, conditional_output[:, channels:]], dim=1)


@dataclasses.dataclass(frozen=True)
class X0Coefficients:
    """Coefficients of ``x0 = model_input * input_factor + prediction * prediction_factor``.

    Attributes:
        input_factor: Factor of the network's input.
        prediction_factor: Factor of its prediction.
    """

    input_factor: float
    prediction_factor: float


def threshold_guided(
    guided: Tensor, conditional: Tensor, model_input: Tensor, coefficients: X0Coefficients, quantile: float
) -> Tensor:
    """Return the guided prediction whose x0 is dynamically thresholded to the range of the conditional x0.

    Args:
        guided: Guided prediction, (batch, channels, ...).
        conditional: Conditional prediction of the same shape.
        model_input: Input of the network, same shape.
        coefficients: Relation between prediction and x0.
        quantile: Quantile of magnitudes that counts as the range, in (0, 1].
    """
    from_input = coefficients.input_factor * model_input.float()
    factor = coefficients.prediction_factor
    scale = torch.quantile((from_input + factor * conditional).abs().flatten(1), quantile, dim=1)
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny).reshape(-1, *[1] * (model_input.ndim - 1))
    x0 = dynamic_threshold((from_input + factor * guided) / scale, quantile, math.inf) * scale
    return ((x0 - from_input) / factor).to(guided.dtype)


def x0_coefficients(scheduler: Any, timestep: Any) -> X0Coefficients:
    """Return the coefficients that give x0 from the network's input and prediction.

    Networks are given samples at the variance they were trained with. The coefficients therefore follow from the
    timestep alone, fractional or not, for schedulers in either parametrisation.

    Args:
        scheduler: A scheduler with `alphas_cumprod`, or one whose `prediction_type` is "sample".
        timestep: Current timestep, 0 to `num_train_timesteps` - 1.

    Raises:
        InputError: If the scheduler has no `alphas_cumprod`, or its prediction type does not determine x0.
    """
    prediction_type, alphas_cumprod = scheduler.config.prediction_type, getattr(scheduler, "alphas_cumprod", None)
    if prediction_type == "sample":
        return X0Coefficients(input_factor=0.0, prediction_factor=1.0)
    if alphas_cumprod is None or prediction_type not in ("epsilon", "v_prediction"):
        raise InputError(
            f"guidance_threshold is not supported by {type(scheduler).__name__} with "
            f"prediction_type={prediction_type!r}: expected a scheduler with alphas_cumprod that predicts epsilon, "
            "sample or v_prediction"
        )
    table = alphas_cumprod.cpu().double().numpy()
    alpha_cumprod = float(np.interp(float(timestep), np.arange(len(table)), table))
    # the lower bound avoids an infinite x0 at pure noise
    signal, noise = max(alpha_cumprod, 1e-12) ** 0.5, (1 - alpha_cumprod) ** 0.5
    if prediction_type == "v_prediction":
        return X0Coefficients(input_factor=signal, prediction_factor=-noise)
    return X0Coefficients(input_factor=1 / signal, prediction_factor=-noise / signal)


def _standard_deviation(prediction: Tensor) -> Tensor:
    """Return the standard deviation of each batch item, (batch, 1, ...), above 0."""
    deviation = prediction.std(dim=tuple(range(1, prediction.ndim)), keepdim=True)
    return deviation.clamp(min=torch.finfo(prediction.dtype).tiny)


def _checked_interval(interval: Any) -> tuple[float, float]:
    ends = validation.listed("guidance_interval", interval) if isinstance(interval, tuple | list) else []
    if len(ends) == 2:
        start, end = (validation.finite_float("guidance_interval", each) for each in ends)
        if 0 <= start < end <= 1:
            return start, end
    raise invalid("guidance_interval", interval, "two numbers from 0 to 1, the first below the second")
