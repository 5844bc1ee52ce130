"""DDIM: denoising diffusion implicit models, from deterministic to ancestral sampling.

Source: Song et al. 2021, https://arxiv.org/abs/2010.02502.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.noise import Generators, randn_tensor
from kandinsky22.schedulers.base import Scheduler, SchedulerOutput
from kandinsky22.schedulers.config import (
    BETA_ARGUMENTS,
    ClipConfig,
    DiscreteTimeConfig,
    SchedulerConfig,
)


@dataclasses.dataclass(frozen=True)
class DDIMConfig(ClipConfig, DiscreteTimeConfig):
    """Settings of `DDIMScheduler`.

    Attributes:
        set_alpha_to_one: Whether the last step removes all noise. Otherwise it ends at the noise level of timestep 0.
    """

    owner: ClassVar[str] = "DDIMScheduler"
    positional: ClassVar[tuple[str, ...]] = (
        *BETA_ARGUMENTS,
        "clip_sample",
        "set_alpha_to_one",
        "steps_offset",
        "prediction_type",
        "thresholding",
        "dynamic_thresholding_ratio",
        "clip_sample_range",
        "sample_max_value",
        "timestep_spacing",
        "rescale_betas_zero_snr",
    )

    set_alpha_to_one: bool = True


class DDIMScheduler(Scheduler):
    """DDIM: first order, one network evaluation per step.

    Source: Song et al. 2021, https://arxiv.org/abs/2010.02502.

    A learned variance is dropped.

    Args:
        **settings: Settings, see `DDIMConfig`.
    """

    config_class = DDIMConfig
    config: DDIMConfig

    def _build(self, config: SchedulerConfig) -> None:
        super()._build(config)
        if not self.config.set_alpha_to_one:
            self.final_alpha_cumprod = self.alphas_cumprod[0]

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """Return the timestep to which a step leads.

        It is one stride of num_train_timesteps // num_inference_steps below `timestep`, whatever the spacing. With
        custom timesteps it is the next of them.

        Args:
            timestep: Current timestep, 0 to `num_train_timesteps` - 1.

        Returns:
            The previous timestep, a tensor if `timestep` is one; a negative number stands for the end of sampling.

        Raises:
            InputError: If `timestep` is invalid.
        """
        return super().previous_timestep(timestep)

    def _previous(self, t: int) -> int:
        if self.num_inference_steps is None or self.custom_timesteps:
            return super()._previous(t)
        return t - self.config.num_train_timesteps // self.num_inference_steps

    def _get_variance(self, timestep: int, prev_timestep: int) -> Tensor:
        """Return the variance of the fresh noise with eta 1 (equation 16); scripts for the reference call it."""
        alpha_bar, alpha_bar_prev = self._alpha_bar(int(timestep)), self._alpha_bar(int(prev_timestep))
        return (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)

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
        """Return the sample at the previous timestep (equations 12 and 16).

        Args:
            model_output: Network output for `sample`, (B, C, ...), or (B, 2C, ...) with a learned variance.
            timestep: Current timestep, 0 to `num_train_timesteps` - 1.
            sample: Current sample x_t, (B, C, ...).
            eta: Amount of fresh noise, 0 (deterministic, no noise is drawn) to 1 (ancestral sampling).
            use_clipped_model_output: Whether the predicted noise is derived again from the clipped clean sample.
            generator: Generator of the fresh noise, or one per batch item; None uses torch's global generator.
            variance_noise: The fresh noise itself, (B, C, ...); None draws it.
            return_dict: Whether to return a `SchedulerOutput`, or the tuple of its fields.

        Returns:
            The previous sample and the predicted clean sample, both (B, C, ...).

        Raises:
            InputError: If timesteps are not set, or an argument is invalid.
        """
        self._require_timesteps()
        if not 0 <= eta <= 1:
            raise invalid("eta", eta, "a number from 0 to 1")
        if generator is not None and variance_noise is not None:
            raise invalid("variance_noise", variance_noise, "None if a generator is passed; both determine the noise")
        t = self._validated_timestep(timestep)
        alpha_bar, alpha_bar_prev = self._alpha_bar(t), self._alpha_bar(self._previous(t))
        prediction = self._split_output(model_output, sample).prediction
        x0 = self._predicted_x0(prediction, sample, alpha_bar)
        epsilon = self._predicted_epsilon(prediction, sample, x0, alpha_bar)
        x0 = self._threshold(x0)
        if use_clipped_model_output:
            epsilon = (sample - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5
        sigma = eta * self._get_variance(t, self._previous(t)) ** 0.5  # standard deviation of the fresh noise
        # Equation 12. Rounding can make the radicand negative if eta is 1 and the sample is nearly pure noise.
        epsilon_scale = (1 - alpha_bar_prev - sigma**2).clamp(min=0) ** 0.5
        prev_sample = alpha_bar_prev**0.5 * x0 + epsilon_scale * epsilon
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(prediction.shape, generator, prediction.device, prediction.dtype)
            prev_sample = prev_sample + sigma * variance_noise
        return self._output(prev_sample, x0, return_dict)
