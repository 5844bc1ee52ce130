"""Denoising diffusion implicit models: the deterministic way, and everything up to ancestral sampling (Song et al.
2021, https://arxiv.org/abs/2010.02502)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.noise import Generators, randn_tensor
from kandinsky22.schedulers.base import Scheduler, SchedulerOutput
from kandinsky22.schedulers.config import ClipConfig, DiscreteConfig, SchedulerConfig


@dataclasses.dataclass(frozen=True)
class DDIMConfig(ClipConfig, DiscreteConfig):
    """Settings of `DDIMScheduler`. With `set_alpha_to_one` the last step removes all noise, otherwise it ends at the
    noise level of timestep 0."""

    owner: ClassVar[str] = "DDIMScheduler"

    set_alpha_to_one: bool = True


class DDIMScheduler(Scheduler):
    """Implicit sampling; settings are the fields of `DDIMConfig`. A variance that the network learned is dropped."""

    config_class = DDIMConfig
    config: DDIMConfig

    def _build(self, config: SchedulerConfig) -> None:
        super()._build(config)
        if not self.config.set_alpha_to_one:
            self.final_alpha_cumprod = self.alphas_cumprod[0]

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """Where a step from `timestep` leads: one even stride down, whatever the spacing; the next one of timesteps
        given by hand. Negative at the end."""
        if self.num_inference_steps is None or self.custom_timesteps:
            return super().previous_timestep(timestep)
        return self._checked(timestep) - self.config.num_train_timesteps // self.num_inference_steps

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """The sample at the previous timestep, and the predicted clean sample; both shaped as `sample` (B, C, ...).

        `eta` from 0 (deterministic, no noise is drawn) to 1 (ancestral) scales the fresh noise: `variance_noise`, or
        drawn from `generator` (one, or one a sample). `use_clipped_model_output` derives the noise prediction anew from
        the clean sample after clipping. Raises InputError before `set_timesteps`, and for arguments that do not fit.
        """
        if self.num_inference_steps is None:
            raise InputError("step before set_timesteps: how far a step leads depends on the number of steps")
        if not 0 <= eta <= 1:
            raise InputError(f"eta={eta}; accepted: a number from 0 to 1")
        if generator is not None and variance_noise is not None:
            raise InputError("generator and variance_noise given; accepted: one of them, as both decide the noise")
        t = self._checked(timestep)
        before, after = self._alpha_bar(t), self._alpha_bar(self.previous_timestep(t))
        prediction, _ = self._split(model_output, sample)
        original = self._original(prediction, sample, before)
        noise = self._noise(prediction, sample, original, before)
        original = self._limit(original)
        if use_clipped_model_output:
            noise = (sample - before**0.5 * original) / (1 - before) ** 0.5
        # Equations 12 and 16: of the noise that stays, a part is fresh and the rest is the predicted one.
        deviation = eta * ((1 - after) / (1 - before) * (1 - before / after)) ** 0.5
        # Rounding can take the rest below 0 where eta is 1 and nearly everything is noise.
        previous = after**0.5 * original + (1 - after - deviation**2).clamp(min=0) ** 0.5 * noise
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(prediction.shape, generator, prediction.device, prediction.dtype)
            previous = previous + deviation * variance_noise
        return SchedulerOutput(previous, original) if return_dict else (previous, original)
