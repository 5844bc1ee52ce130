"""Sampler of unCLIP priors: ancestral sampling on the cosine schedule.

Source: Ramesh et al. 2022, section 2.2, https://arxiv.org/abs/2204.06125.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.noise import Generators
from kandinsky22.schedulers.base import SchedulerOutput
from kandinsky22.schedulers.config import as_int
from kandinsky22.schedulers.ddpm import AncestralConfig, AncestralScheduler, Transition


@dataclasses.dataclass(frozen=True)
class UnCLIPConfig(AncestralConfig):
    """Settings of `UnCLIPScheduler`."""

    owner: ClassVar[str] = "UnCLIPScheduler"
    positional: ClassVar[tuple[str, ...]] = (
        "num_train_timesteps",
        "variance_type",
        "clip_sample",
        "clip_sample_range",
        "prediction_type",
        "beta_schedule",
    )
    choices: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        "beta_schedule": ("squaredcos_cap_v2",),
        "prediction_type": ("epsilon", "sample"),
        "variance_type": ("fixed_small_log", "learned_range"),
    }

    beta_schedule: str = "squaredcos_cap_v2"
    variance_type: str = "fixed_small_log"


class UnCLIPScheduler(AncestralScheduler):
    """DDPM as unCLIP uses it.

    Sources: Ramesh et al. 2022, https://arxiv.org/abs/2204.06125; Ho et al. 2020, https://arxiv.org/abs/2006.11239.

    Timesteps have the stride (num_train_timesteps - 1) / (num_inference_steps - 1). They include the first and the last
    training timestep. A single step starts at the last. The caller passes the previous timestep to `step`.

    Args:
        **settings: Settings, see `UnCLIPConfig`.
    """

    config_class = UnCLIPConfig
    config: UnCLIPConfig

    def _get_variance(
        self,
        t: int,
        prev_timestep: int | None = None,
        predicted_variance: Tensor | None = None,
        variance_type: str | None = None,
    ) -> Tensor:
        """Return the variance of a step; scripts for the reference call it."""
        previous = int(t) - 1 if prev_timestep is None else int(prev_timestep)
        return self._variance(int(t), previous, predicted_variance, variance_type)

    def _spaced_timesteps(self, steps: int) -> list[int]:
        last = self.config.num_train_timesteps - 1
        if steps == 1:
            return [last]
        return [int(step) for step in (np.arange(steps) * (last / (steps - 1))).round()[::-1]]

    def _transition(self, timestep: int, prev_timestep: int) -> Transition:
        if prev_timestep == timestep - 1:
            return Transition(self.alphas[timestep], self.betas[timestep])
        beta = 1 - self._alpha_bar(timestep) / self._alpha_bar(prev_timestep)
        return Transition(1 - beta, beta)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        prev_timestep: int | Tensor | None = None,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Return the sample at the previous timestep (equations 6 and 7 of DDPM).

        Args:
            model_output: Network output for `sample`, (B, C, ...), or (B, 2C, ...) with a learned variance.
            timestep: Current timestep, 0 to `num_train_timesteps` - 1.
            sample: Current sample x_t, (B, C, ...).
            prev_timestep: Timestep to which the step leads, -1 (a clean sample) to `timestep` - 1. None means -1 if
                `timestep` is the last of `timesteps`, otherwise `timestep` - 1.
            generator: Generator of the noise, or one per batch item; None uses torch's global generator. Noise is drawn
                at every timestep except 0.
            return_dict: Whether to return a `SchedulerOutput`, or the tuple of its fields.

        Returns:
            The previous sample and the predicted clean sample, both (B, C, ...).

        Raises:
            InputError: If a timestep or the shape of `model_output` is invalid.
        """
        t = self._validated_timestep(timestep)
        if prev_timestep is None:
            prev_t: int | None = -1 if self._previous_timesteps.get(t) == -1 else t - 1
        else:
            prev_t = as_int(prev_timestep)
        if prev_t is None or not -1 <= prev_t < t:
            raise invalid("prev_timestep", prev_timestep, f"an integer from -1 to {t - 1}, or None")
        output = self._sample_posterior(model_output, t, prev_t, sample, generator)
        return output if return_dict else output.to_tuple()
