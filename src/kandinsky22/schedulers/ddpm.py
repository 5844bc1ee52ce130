"""Ancestral sampling: the posterior of the previous sample given the predicted clean one, with fresh noise each step
(Ho et al. 2020, https://arxiv.org/abs/2006.11239; learned variances: Nichol & Dhariwal 2021,
https://arxiv.org/abs/2102.09672)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.noise import Generators, randn_tensor
from kandinsky22.schedulers.base import Scheduler, SchedulerOutput
from kandinsky22.schedulers.config import ClipConfig, DiscreteConfig

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


@dataclasses.dataclass(frozen=True)
class AncestralConfig(ClipConfig):
    """`variance_type` says which variance the fresh noise has.

    Between the smallest (`fixed_small`: the posterior's, if the data were one point) and the largest (`fixed_large`:
    beta, if they were white noise), or the network's own: `learned` the variance itself, `learned_range` a place from
    -1 to 1 between the two, on a logarithmic scale. The `_log` forms differ in rounding only.
    """

    variance_type: str = "fixed_small"


class AncestralScheduler(Scheduler):
    """Common ground of the ancestral methods: they differ in where a step leads, and how beta is found for it."""

    config: AncestralConfig

    def _transition(self, timestep: int, previous: int) -> tuple[Tensor, Tensor]:
        """alpha and beta of the jump from `previous` to `timestep`."""
        alpha = self._alpha_bar(timestep) / self._alpha_bar(previous)
        return alpha, 1 - alpha

    def _denoise(
        self, model_output: Tensor, timestep: int, previous: int, sample: Tensor, generator: Generators
    ) -> SchedulerOutput:
        prediction, values = self._split(model_output, sample)
        if values is None and self.config.variance_type.startswith("learned"):
            raise InputError(
                f"model_output has shape {tuple(model_output.shape)}, variance_type={self.config.variance_type!r}; "
                "accepted: twice the channels of the sample, the second half being the variance"
            )
        noise_left = 1 - self._alpha_bar(timestep)
        noise_after = 1 - self._alpha_bar(previous)
        alpha, beta = self._transition(timestep, previous)
        original = self._limit(self._original(prediction, sample, self._alpha_bar(timestep)))
        # Equation 7 of Ho et al.: the posterior mean weighs the clean and the noisy sample.
        mean = (self._alpha_bar(previous) ** 0.5 * beta / noise_left) * original
        mean = mean + (alpha**0.5 * noise_after / noise_left) * sample
        if timestep > 0:
            noise = randn_tensor(prediction.shape, generator, prediction.device, prediction.dtype)
            # The posterior variance is 0 where no noise is left; its logarithm must stay finite.
            smallest = (noise_after / noise_left * beta).clamp(min=1e-20)
            mean = mean + self._deviation(smallest, beta, values) * noise
        return SchedulerOutput(mean, original)

    def _deviation(self, smallest: Tensor, beta: Tensor, values: Tensor | None) -> Tensor:
        """Standard deviation of the fresh noise; `values` is what the network learned about it."""
        kind = self.config.variance_type
        if values is not None and kind == "learned":
            return values**0.5
        if values is not None and kind == "learned_range":
            place = (values + 1) / 2
            return torch.exp(0.5 * (place * torch.log(beta) + (1 - place) * torch.log(smallest)))
        variance = beta if kind.startswith("fixed_large") else smallest
        return torch.exp(0.5 * torch.log(variance)) if kind.endswith("log") else variance**0.5


@dataclasses.dataclass(frozen=True)
class DDPMConfig(AncestralConfig, DiscreteConfig):
    """Settings of `DDPMScheduler`."""

    owner: ClassVar[str] = "DDPMScheduler"
    choices: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        **DiscreteConfig.choices,
        "variance_type": VARIANCES,
    }


class DDPMScheduler(AncestralScheduler):
    """Ancestral sampling over any of the training timesteps; settings are the fields of `DDPMConfig`.

    Without `set_timesteps` every training timestep is visited. A network that predicts no variance takes a fixed
    `variance_type`; if it predicts one that is not wanted, that half of its output is dropped.
    """

    config_class = DDPMConfig
    config: DDPMConfig

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """The sample at the previous timestep, and the predicted clean sample; both shaped as `sample` (B, C, ...).

        `timestep` is one of `timesteps`. Noise is drawn from `generator` (one, or one a sample) at every timestep but
        0, in the type of `model_output`. Raises InputError for other timesteps and shapes that do not fit.
        """
        t = self._checked(timestep)
        out = self._denoise(model_output, t, self.previous_timestep(t), sample, generator)
        return out if return_dict else out.to_tuple()
