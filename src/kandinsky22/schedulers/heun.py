"""Second-order methods with two network evaluations per step: Heun's method, and the midpoint method in log sigma.

Sources: Karras et al. 2022, algorithm 1, https://arxiv.org/abs/2206.00364; for the midpoint method DPM-Solver-2, Lu et
al. 2022, algorithm 1, https://arxiv.org/abs/2206.00927.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kandinsky22.noise import Generators, randn_tensor
from kandinsky22.schedulers.base import SchedulerOutput
from kandinsky22.schedulers.config import (
    BETA_ARGUMENTS,
    SIGMA_ARGUMENTS,
    BetaScheduleConfig,
    ClipConfig,
    SigmaScheduleConfig,
    TimestepSpacingConfig,
)
from kandinsky22.schedulers.noise_schedules import FloatArray
from kandinsky22.schedulers.sigmas import (
    VarianceExplodingScheduler,
    sigmas_to_timesteps,
    to_float32,
    without_repetitions,
)


@dataclasses.dataclass(frozen=True)
class TwoStageConfig(SigmaScheduleConfig, TimestepSpacingConfig, BetaScheduleConfig):
    """Settings that both methods share."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    timestep_spacing: str = "linspace"


class SecondStages(NamedTuple):
    """Second network evaluations of all steps.

    Attributes:
        sigmas: Their noise levels, (steps - 1,).
        timesteps: Their timesteps, (steps - 1,).
    """

    sigmas: FloatArray
    timesteps: FloatArray


class FirstStage(NamedTuple):
    """First network evaluation of the current step.

    Attributes:
        sample: Sample at the start of the step, (B, C, ...).
        derivative: dx/dsigma there, (B, C, ...).
    """

    sample: Tensor
    derivative: Tensor


@dataclasses.dataclass(frozen=True)
class AncestralStep:
    """End of a step that goes below the next sigma, to which noise then returns.

    Attributes:
        sigma_down: Noise level that is left before noise is added.
        noise: Standard deviation of the added noise.
    """

    sigma_down: float
    noise: float

    @classmethod
    def between(cls, sigma: float, sigma_next: float) -> AncestralStep:
        """Return the step of the posterior of DDPM: sigma_down^2 + noise^2 = sigma_next^2.

        Args:
            sigma: Noise level at the start, above 0.
            sigma_next: Noise level at the end, at most `sigma`.
        """
        return cls(sigma_next**2 / sigma, sigma_next * math.sqrt(max(sigma**2 - sigma_next**2, 0)) / sigma)


class TwoStageScheduler(VarianceExplodingScheduler):
    """Base class of methods with two network evaluations per step on the ODE dx/dsigma = (x - D(x; sigma)) / sigma.

    `timesteps` has two elements per step, except for the last step, which has one because it ends at sigma 0.

    Args:
        **settings: Settings, see `TwoStageConfig`.
    """

    order = 2

    def _reset(self) -> None:
        super()._reset()
        self._first_stage: FirstStage | None = None

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next network evaluation is the first of a step."""
        return self._first_stage is None

    def _combined_derivative(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the derivative of a step from those of its two stages."""
        raise NotImplementedError

    def _step_end(self, sigma: float, sigma_next: float) -> AncestralStep:
        """Return where a step ends, and the noise that is added there."""
        return AncestralStep(sigma_next, 0.0)

    def _one_per_step(self, timesteps: Any) -> Any:
        return without_repetitions(timesteps)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Return the sample for the next network evaluation.

        Args:
            model_output: Network output for the scaled sample, (B, C, ...), or (B, 2C, ...) with a learned variance.
            timestep: Timestep of the network evaluation, an element of `timesteps`.
            sample: Current sample x_0 + sigma epsilon, (B, C, ...).
            return_dict: Whether to return a `SchedulerOutput`, or the tuple of its fields.

        Returns:
            The next sample and the predicted clean sample, both (B, C, ...).

        Raises:
            InputError: If timesteps are not set, or `timestep` or the shape of `model_output` is invalid.
        """
        return self._stage(model_output, timestep, sample, None, return_dict)

    def _stage(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators,
        return_dict: bool,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Return the sample after one network evaluation."""
        index = self._index_for_timestep(timestep)
        sigma, sigma_next = self._sigma_list[index : index + 2]
        sample = to_float32(sample)
        prediction = self._split_output(model_output, sample).prediction
        denoised = self._denoised(prediction, sample, sigma)
        derivative = (sample - denoised) / sigma
        end = AncestralStep(sigma_next, 0.0)
        if index % 2 == 0 or self._first_stage is None:
            self._first_stage = FirstStage(sample, derivative)
        else:
            # The second stage takes the step again from its start, with both derivatives.
            sigma, sample = self._sigma_list[index - 1], self._first_stage.sample
            derivative = self._combined_derivative(self._first_stage.derivative, derivative)
            self._first_stage = None
            end = self._step_end(sigma, sigma_next)
        self._step_index = index + 1
        prev_sample = sample + derivative * (end.sigma_down - sigma)
        if end.noise > 0:
            noise = randn_tensor(prediction.shape, generator, prediction.device, prediction.dtype)
            prev_sample = prev_sample + noise * end.noise
        return self._output(prev_sample.to(model_output.dtype), denoised, return_dict)

    def _set_sigmas(
        self, sigmas: FloatArray, final: list[float], timesteps: FloatArray, device: torch.device | str | None
    ) -> None:
        second = self._second_stages(sigmas[:-1], sigmas[1:], timesteps[1:])
        all_sigmas = np.concatenate([sigmas[:1], np.stack([second.sigmas, sigmas[1:]], 1).ravel()])
        all_timesteps = np.concatenate([timesteps[:1], np.stack([second.timesteps, timesteps[1:]], 1).ravel()])
        super()._set_sigmas(all_sigmas, final, all_timesteps, device)
        self.num_inference_steps = len(sigmas)

    def _second_stages(self, starts: FloatArray, ends: FloatArray, end_timesteps: FloatArray) -> SecondStages:
        """Return the second evaluations of steps between these sigmas; `end_timesteps` are the timesteps of `ends`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class HeunConfig(ClipConfig, TwoStageConfig):
    """Settings of `HeunDiscreteScheduler`."""

    owner: ClassVar[str] = "HeunDiscreteScheduler"
    positional: ClassVar[tuple[str, ...]] = (
        *BETA_ARGUMENTS,
        "prediction_type",
        *SIGMA_ARGUMENTS,
        "clip_sample",
        "clip_sample_range",
        "timestep_spacing",
        "steps_offset",
    )
    choices: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        **BetaScheduleConfig.choices,
        "beta_schedule": (*BetaScheduleConfig.choices["beta_schedule"], "exp"),
    }

    clip_sample: bool = False


class HeunDiscreteScheduler(TwoStageScheduler):
    """Heun's method: steps use the mean of the derivatives at both ends.

    Source: Karras et al. 2022, algorithm 1, https://arxiv.org/abs/2206.00364.

    A learned variance is dropped.

    Args:
        **settings: Settings, see `HeunConfig`.
    """

    config_class = HeunConfig
    config: HeunConfig

    def _second_stages(self, starts: FloatArray, ends: FloatArray, end_timesteps: FloatArray) -> SecondStages:
        return SecondStages(ends, end_timesteps)

    def _combined_derivative(self, first: Tensor, second: Tensor) -> Tensor:
        return (first + second) / 2


@dataclasses.dataclass(frozen=True)
class KDPM2Config(TwoStageConfig):
    """Settings of `KDPM2DiscreteScheduler`."""

    owner: ClassVar[str] = "KDPM2DiscreteScheduler"
    positional: ClassVar[tuple[str, ...]] = (
        *BETA_ARGUMENTS,
        *SIGMA_ARGUMENTS,
        "prediction_type",
        "timestep_spacing",
        "steps_offset",
    )


class KDPM2DiscreteScheduler(TwoStageScheduler):
    """Midpoint method in log sigma: steps use the derivative at the geometric mean of both sigmas.

    Sources: DPM-Solver-2, Lu et al. 2022, algorithm 1, https://arxiv.org/abs/2206.00927; for the ODE Karras et al.
    2022, https://arxiv.org/abs/2206.00364.

    A learned variance is dropped.

    Args:
        **settings: Settings, see `KDPM2Config`.
    """

    config_class = KDPM2Config
    config: KDPM2Config

    def _sigmas_to_timesteps(self, sigmas: FloatArray, source: str) -> FloatArray:
        timesteps = super()._sigmas_to_timesteps(sigmas, source)
        return timesteps.round() if source == "use_karras_sigmas" else timesteps

    def _second_stages(self, starts: FloatArray, ends: FloatArray, end_timesteps: FloatArray) -> SecondStages:
        middles = np.sqrt(starts.astype(np.float64) * ends)
        return SecondStages(middles, sigmas_to_timesteps(middles, self._training_sigmas))

    def _combined_derivative(self, first: Tensor, second: Tensor) -> Tensor:
        return second


@dataclasses.dataclass(frozen=True)
class KDPM2AncestralConfig(KDPM2Config):
    """Settings of `KDPM2AncestralDiscreteScheduler`."""

    owner: ClassVar[str] = "KDPM2AncestralDiscreteScheduler"


class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler):
    """Midpoint method in log sigma with ancestral noise: a step goes below the next sigma, and noise raises it to that.

    Sources: DPM-Solver-2, Lu et al. 2022, algorithm 1, https://arxiv.org/abs/2206.00927; for the noise Ho et al. 2020,
    equations 6 and 7, https://arxiv.org/abs/2006.11239.

    The middle between a sigma and the end of the step is the next sigma. A learned variance is dropped.

    Args:
        *arguments: Settings by position, in the order of the reference's constructor.
        **settings: Settings, see `KDPM2AncestralConfig`.
    """

    config_class = KDPM2AncestralConfig
    config: KDPM2AncestralConfig

    def _second_stages(self, starts: FloatArray, ends: FloatArray, end_timesteps: FloatArray) -> SecondStages:
        # The step ends at ends^2 / starts, whose geometric mean with `starts` is `ends`.
        return SecondStages(ends, sigmas_to_timesteps(ends, self._training_sigmas))

    def _step_end(self, sigma: float, sigma_next: float) -> AncestralStep:
        return AncestralStep.between(sigma, sigma_next)

    def step(  # type: ignore[override]  # the reference has its arguments in this order
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Return the sample for the next network evaluation.

        Args:
            model_output: Network output for the scaled sample, (B, C, ...), or (B, 2C, ...) with a learned variance.
            timestep: Timestep of the network evaluation, an element of `timesteps`.
            sample: Current sample x_0 + sigma epsilon, (B, C, ...).
            generator: Generator of the noise, or one per batch item; None uses torch's global generator. Noise is drawn
                in the second evaluation of every step.
            return_dict: Whether to return a `SchedulerOutput`, or the tuple of its fields.

        Returns:
            The next sample and the predicted clean sample, both (B, C, ...).

        Raises:
            InputError: If `timestep` or the shape of `model_output` is invalid.
        """
        return self._stage(model_output, timestep, sample, generator, return_dict)
