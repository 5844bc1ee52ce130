"""Euler's method in sigma: deterministic, with added noise ("churn"), or ancestral.

Source: Karras et al. 2022, algorithm 2, https://arxiv.org/abs/2206.00364.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.noise import Generators, randn_tensor
from kandinsky22.schedulers.base import SchedulerOutput
from kandinsky22.schedulers.config import (
    BETA_ARGUMENTS,
    SIGMA_ARGUMENTS,
    BetaScheduleConfig,
    SigmaScheduleConfig,
    TimestepSpacingConfig,
    ZeroTerminalSNRConfig,
)
from kandinsky22.schedulers.noise_schedules import FloatArray
from kandinsky22.schedulers.sigmas import VarianceExplodingScheduler, to_float32


@dataclasses.dataclass(frozen=True)
class EulerConfig(SigmaScheduleConfig, TimestepSpacingConfig, ZeroTerminalSNRConfig, BetaScheduleConfig):
    """Settings of `EulerDiscreteScheduler`.

    Attributes:
        interpolation_type: "linear" takes the sigmas of the timesteps. "log_linear" spaces sigmas evenly in log sigma
            between the highest and the lowest of training, whatever the timesteps; the last step ends at the lowest.
        timestep_type: "discrete", or "continuous": networks that predict v receive log(sigma) / 4 as the timestep.
        final_sigmas_type: Sigma at which the last step ends: "zero", or "sigma_min", the lowest of training.
        sigma_min: Last sigma of a schedule of sigmas, above 0; None is the one of the last timestep.
        sigma_max: First sigma of a schedule of sigmas, above 0; None is the one of the first timestep.
    """

    owner: ClassVar[str] = "EulerDiscreteScheduler"
    positional: ClassVar[tuple[str, ...]] = (
        *BETA_ARGUMENTS,
        "prediction_type",
        "interpolation_type",
        *SIGMA_ARGUMENTS,
        "sigma_min",
        "sigma_max",
        "timestep_spacing",
        "timestep_type",
        "steps_offset",
        "rescale_betas_zero_snr",
        "final_sigmas_type",
    )
    choices: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        **BetaScheduleConfig.choices,
        "interpolation_type": ("linear", "log_linear"),
        "timestep_type": ("discrete", "continuous"),
    }

    timestep_spacing: str = "linspace"
    interpolation_type: str = "linear"
    timestep_type: str = "discrete"
    final_sigmas_type: str = "zero"
    sigma_min: float | None = None
    sigma_max: float | None = None


class EulerDiscreteScheduler(VarianceExplodingScheduler):
    """Euler's method: first order, one network evaluation per step.

    Source: Karras et al. 2022, algorithm 2 without its second-order correction, https://arxiv.org/abs/2206.00364.

    A learned variance is dropped.

    Args:
        **settings: Settings, see `EulerConfig`.
    """

    config_class = EulerConfig
    config: EulerConfig

    def _requested_timesteps(
        self, num_inference_steps: int | None, timesteps: Sequence[int] | Tensor | None
    ) -> Sequence[float]:
        if timesteps is not None and self._uses_log_sigma_timesteps():
            expected = "None, because the config has timestep_type='continuous'"
            raise invalid("timesteps", timesteps, expected, "pass sigmas instead")
        return super()._requested_timesteps(num_inference_steps, timesteps)

    def _uses_log_sigma_timesteps(self) -> bool:
        return self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction"

    def _interpolated_sigmas(self, timesteps: FloatArray) -> FloatArray:
        if self.config.interpolation_type == "linear":
            return super()._interpolated_sigmas(timesteps)
        first, last = np.log(self._training_sigmas[-1]), np.log(self._training_sigmas[0])
        return (
            torch.linspace(float(first), float(last), len(timesteps) + 1, dtype=torch.float32, device="cpu")
            .exp()
            .numpy()
        )

    def _set_sigmas(
        self, sigmas: FloatArray, final: list[float], timesteps: FloatArray, device: torch.device | str | None
    ) -> None:
        if len(sigmas) > len(timesteps):
            final = []  # log-linear sigmas contain the final one
        if self._uses_log_sigma_timesteps():
            timesteps = 0.25 * np.log(sigmas[: len(timesteps)].astype(np.float32))
        super()._set_sigmas(sigmas, final, timesteps, device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Return the sample at the next sigma: x + (sigma_next - sigma_hat) dx/dsigma.

        Args:
            model_output: Network output for the scaled sample, (B, C, ...), or (B, 2C, ...) with a learned variance.
            timestep: Current timestep, an element of `timesteps`.
            sample: Current sample x_0 + sigma epsilon, (B, C, ...).
            s_churn: Amount of noise that is added before steps, over all steps, relative to sigma; 0 adds none.
            s_tmin: Smallest sigma at which noise is added.
            s_tmax: Largest sigma at which noise is added.
            s_noise: Standard deviation of the added noise.
            generator: Generator of the added noise, or one per batch item; None uses torch's global generator.
            return_dict: Whether to return a `SchedulerOutput`, or the tuple of its fields.

        Returns:
            The next sample and the predicted clean sample, both (B, C, ...).

        Raises:
            InputError: If timesteps are not set, or `timestep` or the shape of `model_output` is invalid.
        """
        index = self._index_for_timestep(timestep)
        sigma, sigma_next = self._sigma_list[index : index + 2]
        sample = to_float32(sample)
        prediction = self._split_output(model_output, sample).prediction
        # Algorithm 2, line 6: gamma raises sigma to sigma_hat.
        gamma = min(s_churn / len(self._timestep_list), math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            noise = randn_tensor(prediction.shape, generator, prediction.device, prediction.dtype)
            sample = sample + noise * (s_noise * math.sqrt(sigma_hat**2 - sigma**2))
        denoised = self._denoised(prediction, sample, sigma_hat)
        self._step_index = index + 1
        # Euler's step x + (sigma_next - sigma_hat) (x - denoised) / sigma_hat, rearranged.
        prev_sample = denoised + (sample - denoised) * (sigma_next / sigma_hat)
        return self._output(prev_sample.to(model_output.dtype), denoised, return_dict)


@dataclasses.dataclass(frozen=True)
class EulerAncestralConfig(TimestepSpacingConfig, ZeroTerminalSNRConfig, BetaScheduleConfig):
    """Settings of `EulerAncestralDiscreteScheduler`."""

    owner: ClassVar[str] = "EulerAncestralDiscreteScheduler"
    positional: ClassVar[tuple[str, ...]] = (
        *BETA_ARGUMENTS,
        "prediction_type",
        "timestep_spacing",
        "steps_offset",
        "rescale_betas_zero_snr",
    )

    timestep_spacing: str = "linspace"


class EulerAncestralDiscreteScheduler(VarianceExplodingScheduler):
    """Euler's method with ancestral noise: a step goes below the next sigma, and fresh noise raises it to that sigma.

    The sample is drawn from the posterior of DDPM (Ho et al. 2020, equations 6 and 7, https://arxiv.org/abs/2006.11239),
    in the variance-exploding form. A learned variance is dropped.

    Args:
        **settings: Settings, see `EulerAncestralConfig`.
    """

    config_class = EulerAncestralConfig
    config: EulerAncestralConfig

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Return the sample at the next sigma.

        Args:
            model_output: Network output for the scaled sample, (B, C, ...), or (B, 2C, ...) with a learned variance.
            timestep: Current timestep, an element of `timesteps`.
            sample: Current sample x_0 + sigma epsilon, (B, C, ...).
            generator: Generator of the noise, or one per batch item; None uses torch's global generator. Noise is drawn
                in every step.
            return_dict: Whether to return a `SchedulerOutput`, or the tuple of its fields.

        Returns:
            The next sample and the predicted clean sample, both (B, C, ...).

        Raises:
            InputError: If timesteps are not set, or `timestep` or the shape of `model_output` is invalid.
        """
        index = self._index_for_timestep(timestep)
        sigma, sigma_next = self._sigma_list[index : index + 2]
        sample = to_float32(sample)
        prediction = self._split_output(model_output, sample).prediction
        denoised = self._denoised(prediction, sample, sigma)
        # With betas rescaled to zero terminal SNR, the bound of alpha_bar can make the first sigma lower than the next.
        sigma_up = sigma_next * math.sqrt(max(sigma**2 - sigma_next**2, 0)) / sigma
        noise = randn_tensor(prediction.shape, generator, prediction.device, prediction.dtype)
        self._step_index = index + 1
        # sigma_down = sigma_next^2 / sigma is the end of Euler's step: sigma_down^2 + sigma_up^2 = sigma_next^2.
        prev_sample = denoised + (sample - denoised) * (sigma_next**2 / sigma**2) + noise * sigma_up
        return self._output(prev_sample.to(model_output.dtype), denoised, return_dict)
