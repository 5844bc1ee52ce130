"""DDPM: ancestral sampling, which draws the previous sample from the posterior given the predicted clean sample.

Sources: Ho et al. 2020, https://arxiv.org/abs/2006.11239; for learned variances Nichol & Dhariwal 2021,
https://arxiv.org/abs/2102.09672.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.noise import Generators, randn_tensor
from kandinsky22.schedulers.base import Scheduler, SchedulerOutput
from kandinsky22.schedulers.config import (
    BETA_ARGUMENTS,
    ClipConfig,
    DiscreteTimeConfig,
)

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


@dataclasses.dataclass(frozen=True)
class AncestralConfig(ClipConfig):
    """Settings of ancestral methods.

    Attributes:
        variance_type: Variance of the fresh noise. "fixed_small" is the posterior variance, the lower bound.
            "fixed_large" is beta, the upper bound (Ho et al. 2020, section 3.2). "learned" is the network's output.
            "learned_range" interpolates between the logarithms of both bounds, with the network's output from -1
            (lower) to 1 (upper bound; Nichol & Dhariwal 2021, equation 15). The `_log` forms differ in rounding only.
    """

    variance_type: str = "fixed_small"


class Transition(NamedTuple):
    """Coefficients of the diffusion from one timestep to a noisier one.

    Attributes:
        alpha: Share of the variance that remains, the ratio of both alpha_bar.
        beta: Variance of the noise that is added, 1 - alpha.
    """

    alpha: Tensor
    beta: Tensor


class AncestralScheduler(Scheduler):
    """Base class of ancestral methods. They differ in the timestep to which a step leads, and in rounding.

    Args:
        **settings: Settings, see `AncestralConfig`.
    """

    config: AncestralConfig

    def _transition(self, timestep: int, prev_timestep: int) -> Transition:
        """Return the coefficients of the diffusion from `prev_timestep` to `timestep`."""
        alpha = self._alpha_bar(timestep) / self._alpha_bar(prev_timestep)
        return Transition(alpha, 1 - alpha)

    def _sample_posterior(
        self, model_output: Tensor, timestep: int, prev_timestep: int, sample: Tensor, generator: Generators
    ) -> SchedulerOutput:
        """Draw the previous sample from q(x_prev | x_t, x_0) (Ho et al. 2020, equations 6 and 7)."""
        prediction, variance = self._split_output(model_output, sample)
        if variance is None and timestep > 0 and self.config.variance_type.startswith("learned"):
            raise invalid(
                "model_output.shape",
                tuple(model_output.shape),
                "twice the channels of sample, the second half being the variance, "
                f"because variance_type={self.config.variance_type!r}",
            )
        alpha_bar, alpha_bar_prev = self._alpha_bar(timestep), self._alpha_bar(prev_timestep)
        alpha, beta = self._transition(timestep, prev_timestep)
        x0 = self._threshold(self._predicted_x0(prediction, sample, alpha_bar))
        # Equation 7: the posterior mean is a weighted sum of the clean and the noisy sample.
        prev_sample = (alpha_bar_prev**0.5 * beta / (1 - alpha_bar)) * x0
        prev_sample = prev_sample + (alpha**0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar)) * sample
        if timestep > 0:
            noise = randn_tensor(prediction.shape, generator, prediction.device, prediction.dtype)
            posterior_variance = self._posterior_variance(timestep, prev_timestep)
            prev_sample = prev_sample + self._noise_scale(posterior_variance, beta, variance) * noise
        return SchedulerOutput(prev_sample, x0)

    def _posterior_variance(self, timestep: int, prev_timestep: int) -> Tensor:
        """Return the variance of the posterior (equation 7), bounded so that its logarithm is finite at the end."""
        alpha_bar, alpha_bar_prev = self._alpha_bar(timestep), self._alpha_bar(prev_timestep)
        return ((1 - alpha_bar_prev) / (1 - alpha_bar) * self._transition(timestep, prev_timestep).beta).clamp(
            min=1e-20
        )

    def _variance(
        self, timestep: int, prev_timestep: int, predicted: Tensor | float | None, variance_type: str | None
    ) -> Tensor:
        """Return what the reference calls the variance: with a `_log` type its square root or its logarithm."""
        posterior, beta = (
            self._posterior_variance(timestep, prev_timestep),
            self._transition(timestep, prev_timestep).beta,
        )
        kind = variance_type or self.config.variance_type
        if predicted is not None and kind == "learned_range":
            fraction = (predicted + 1) / 2
            return fraction * torch.log(beta) + (1 - fraction) * torch.log(posterior)
        if predicted is not None and kind == "learned":
            return torch.as_tensor(predicted)
        if kind == "fixed_small_log":
            return torch.exp(0.5 * torch.log(posterior))
        if kind.startswith("fixed_large"):
            return torch.log(beta) if kind.endswith("log") else beta
        return posterior

    def _noise_scale(self, posterior_variance: Tensor, beta: Tensor, learned: Tensor | None) -> Tensor:
        """Return the standard deviation of the fresh noise."""
        variance_type = self.config.variance_type
        if learned is not None and variance_type == "learned":
            return learned**0.5
        if learned is not None and variance_type == "learned_range":
            fraction = (learned + 1) / 2
            return torch.exp(0.5 * (fraction * torch.log(beta) + (1 - fraction) * torch.log(posterior_variance)))
        variance = beta if variance_type.startswith("fixed_large") else posterior_variance
        return torch.exp(0.5 * torch.log(variance)) if variance_type.endswith("log") else variance**0.5


@dataclasses.dataclass(frozen=True)
class DDPMConfig(AncestralConfig, DiscreteTimeConfig):
    """Settings of `DDPMScheduler`."""

    owner: ClassVar[str] = "DDPMScheduler"
    positional: ClassVar[tuple[str, ...]] = (
        *BETA_ARGUMENTS,
        "variance_type",
        "clip_sample",
        "prediction_type",
        "thresholding",
        "dynamic_thresholding_ratio",
        "clip_sample_range",
        "sample_max_value",
        "timestep_spacing",
        "steps_offset",
        "rescale_betas_zero_snr",
    )
    choices: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        **DiscreteTimeConfig.choices,
        "variance_type": VARIANCE_TYPES,
    }


class DDPMScheduler(AncestralScheduler):
    """DDPM: ancestral sampling over any of the training timesteps.

    Source: Ho et al. 2020, algorithm 2, https://arxiv.org/abs/2006.11239.

    Without `set_timesteps` all training timesteps are used. A network that predicts no variance needs a fixed
    `variance_type`. With a fixed `variance_type` a learned variance is dropped.

    Args:
        **settings: Settings, see `DDPMConfig`.
    """

    config_class = DDPMConfig
    config: DDPMConfig

    def _get_variance(
        self, t: int, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor:
        """Return the variance of a step; scripts for the reference call it."""
        return self._variance(int(t), self._previous(int(t)), predicted_variance, variance_type)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Return the sample at the previous timestep (equations 6 and 7).

        Args:
            model_output: Network output for `sample`, (B, C, ...), or (B, 2C, ...) with a learned variance.
            timestep: Current timestep, an element of `timesteps`.
            sample: Current sample x_t, (B, C, ...).
            generator: Generator of the noise, or one per batch item; None uses torch's global generator. Noise is drawn
                at every timestep except 0, in the dtype of `model_output`.
            return_dict: Whether to return a `SchedulerOutput`, or the tuple of its fields.

        Returns:
            The previous sample and the predicted clean sample, both (B, C, ...).

        Raises:
            InputError: If `timestep` or the shape of `model_output` is invalid.
        """
        t = self._validated_timestep(timestep)
        output = self._sample_posterior(model_output, t, self._previous(t), sample, generator)
        return output if return_dict else output.to_tuple()
