"""PNDM: pseudo numerical methods for diffusion models.

Runge-Kutta and linear multistep methods combine predictions of the noise, and DDIM's formula takes each step.
Source: Liu et al. 2022, https://arxiv.org/abs/2202.09778.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.inputs.validation import storing_device
from kandinsky22.schedulers.base import SchedulerOutput
from kandinsky22.schedulers.config import (
    BETA_ARGUMENTS,
    BetaScheduleConfig,
    SchedulerConfig,
    TimestepSpacingConfig,
)
from kandinsky22.schedulers.sigmas import StatefulScheduler, without_repetitions

# Adams-Bashforth coefficients of order 1 to 4, newest derivative first (equations 9 and 12).
_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


@dataclasses.dataclass(frozen=True)
class PNDMConfig(TimestepSpacingConfig, BetaScheduleConfig):
    """Settings of `PNDMScheduler`.

    Attributes:
        skip_prk_steps: Whether to replace the Runge-Kutta steps at the start, of four network evaluations each, by one
            step of two evaluations. The Runge-Kutta steps provide the first predictions of the multistep method.
        set_alpha_to_one: Whether the last step removes all noise. Otherwise it ends at the noise level of timestep 0.
    """

    owner: ClassVar[str] = "PNDMScheduler"
    positional: ClassVar[tuple[str, ...]] = (
        *BETA_ARGUMENTS,
        "skip_prk_steps",
        "set_alpha_to_one",
        "prediction_type",
        "timestep_spacing",
        "steps_offset",
    )

    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One network evaluation, and the transfer that follows it.

    Attributes:
        start: Timestep at which the transfer starts.
        end: Timestep at which the transfer ends; a negative number stands for the end of sampling.
        runge_kutta_stage: Stage of a Runge-Kutta step, 0 to 3; None in a multistep step.
        repeats_step: Whether the step before is taken again, with the mean of the predictions at both of its ends.
    """

    start: int
    end: int
    runge_kutta_stage: int | None = None
    repeats_step: bool = False


class PNDMScheduler(StatefulScheduler):
    """PNDM: linear multistep with up to four predictions of the noise, after Runge-Kutta steps at the start.

    Source: Liu et al. 2022, https://arxiv.org/abs/2202.09778.

    `timesteps` has one element per network evaluation, and thus more elements than there are steps. A learned variance
    is dropped.

    Args:
        **settings: Settings, see `PNDMConfig`.
    """

    config_class = PNDMConfig
    config: PNDMConfig

    def _build(self, config: SchedulerConfig) -> None:
        super()._build(config)
        if not self.config.set_alpha_to_one:
            self.final_alpha_cumprod = self.alphas_cumprod[0]
        self._evaluations: list[Evaluation] = []
        self._reset()

    def _reset(self) -> None:
        super()._reset()
        self._epsilons: list[Tensor] = []  # predicted noise at the starts of the last 4 steps, newest first
        self._step_start: Tensor | None = None  # sample at the start of the step while it needs more evaluations
        self._epsilon_sum: Tensor | float = 0.0  # weighted sum over the stages of a Runge-Kutta step

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Set `timesteps` for a new generation: a number of steps, spaced as configured, or the starts of the steps.

        Args:
            num_inference_steps: Number of steps, 1 to `num_train_timesteps`; None if `timesteps` is passed.
            device: Device of `timesteps`; None leaves them on the CPU.
            timesteps: Descending training timesteps at which steps start; None spaces them as configured.

        Raises:
            InputError: If not exactly one of `num_inference_steps` and `timesteps` is passed, or its value is invalid.
        """
        device = storing_device(device)
        starts = [int(step) for step in self._requested_timesteps(num_inference_steps, timesteps)]
        self.custom_timesteps = timesteps is not None
        stride = self.config.num_train_timesteps // len(starts)
        ends = [*starts[1:], -1] if self.custom_timesteps else [start - stride for start in starts]
        runge_kutta_steps = 0 if self.config.skip_prk_steps else min(3, len(starts) - 1)
        self._evaluations = []
        evaluated_at: list[int] = []
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if index < runge_kutta_steps:
                # A Runge-Kutta step goes through its middle to the start of the next step.
                half = (start - end if self.custom_timesteps else stride) // 2
                end = starts[index + 1]
                middle = start - half if self.custom_timesteps else end + half
                evaluated_at += [start, middle, middle, end]
                stage_ends = (start - half, middle, end, end)
                self._evaluations += [Evaluation(start, stage_end, i) for i, stage_end in enumerate(stage_ends)]
            else:
                evaluated_at.append(start)
                self._evaluations.append(Evaluation(start, end))
                if index == 0 and self.config.skip_prk_steps and len(starts) > 1:
                    evaluated_at.append(starts[1])
                    self._evaluations.append(Evaluation(starts[1] + (start - end), starts[1], repeats_step=True))
        self.num_inference_steps = len(starts)
        self._begin_index = None
        self.timesteps = torch.from_numpy(np.asarray(evaluated_at, np.int64)).to(device)
        self._reset()

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Return the sample for the next network evaluation.

        Args:
            model_output: Network output for `sample`, (B, C, ...), or (B, 2C, ...) with a learned variance.
            timestep: Timestep of the network evaluation, an element of `timesteps`.
            sample: Current sample, (B, C, ...).
            return_dict: Whether to return a `SchedulerOutput`, or the tuple of its fields.

        Returns:
            The next sample and the predicted clean sample, both (B, C, ...).

        Raises:
            InputError: If timesteps are not set, or `timestep` or the shape of `model_output` is invalid.
        """
        return self._step_at(self._index_for_timestep(timestep), model_output, sample, return_dict)

    def _step_at(
        self, index: int, model_output: Tensor, sample: Tensor, return_dict: bool
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Return the sample after the network evaluation at an index."""
        evaluation = self._evaluations[index]
        t = int(self._timestep_list[index])
        alpha_bar = float(self._alpha_bar(t))
        prediction = self._split_output(model_output, sample).prediction
        x0 = self._predicted_x0(prediction, sample, alpha_bar)
        epsilon = self._predicted_epsilon(prediction, sample, x0, alpha_bar)
        if (evaluation.runge_kutta_stage or evaluation.repeats_step) and self._step_start is None:
            # The run starts inside a step: take a DDIM step from here.
            start, evaluation = sample, Evaluation(t, evaluation.end)
        elif evaluation.runge_kutta_stage is None:
            start, epsilon = self._multistep(evaluation, epsilon, sample)
        else:
            start, epsilon = self._runge_kutta(evaluation.runge_kutta_stage, epsilon, sample)
        self._step_index = index + 1
        prev_sample = self._transfer(start, epsilon, evaluation.start, evaluation.end)
        return self._output(prev_sample, x0, return_dict)

    @property
    def step_starts(self) -> list[int]:
        """Indices in `timesteps` of the network evaluations with which the steps begin, ascending."""
        if not self._evaluations:  # before `set_timesteps`
            return super().step_starts
        return [
            index
            for index, evaluation in enumerate(self._evaluations)
            if not (evaluation.runge_kutta_stage or evaluation.repeats_step)
        ]

    @property
    def _runge_kutta_count(self) -> int:
        """Number of the first evaluations that belong to Runge-Kutta steps."""
        return sum(evaluation.runge_kutta_stage is not None for evaluation in self._evaluations)

    @property
    def prk_timesteps(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Timesteps of the Runge-Kutta steps at the start, one per network evaluation."""
        return np.asarray(self._timestep_list[: self._runge_kutta_count], np.int64)

    @property
    def plms_timesteps(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Timesteps of the multistep method, one per network evaluation."""
        return np.asarray(self._timestep_list[self._runge_kutta_count :], np.int64)

    @property
    def ets(self) -> list[Tensor]:
        """Predicted noise at the starts of the last steps, oldest first; assigning replaces it."""
        return self._epsilons[::-1]

    @ets.setter
    def ets(self, predictions: Sequence[Tensor]) -> None:
        self._epsilons = list(predictions)[::-1][:4]

    def step_prk(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Return the sample after the next evaluation of a Runge-Kutta step: `step` without a search for the timestep.

        Args:
            model_output: Network output for `sample`, (B, C, ...), or (B, 2C, ...) with a learned variance.
            timestep: Timestep of the evaluation, which has no effect: the evaluations follow each other.
            sample: Current sample, (B, C, ...).
            return_dict: Whether to return a `SchedulerOutput`, or the tuple of its fields.

        Returns:
            The next sample and the predicted clean sample, both (B, C, ...).

        Raises:
            InputError: If timesteps are not set, or no evaluation of a Runge-Kutta step is left.
        """
        self._require_timesteps()
        index = self._step_index or 0
        if index >= self._runge_kutta_count:
            raise InputError("step_prk was called after the last Runge-Kutta step: call step_plms, or step")
        return self._step_at(index, model_output, sample, return_dict)

    def step_plms(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Return the sample after the next evaluation of the multistep method: `step` without a search.

        Args:
            model_output: Network output for `sample`, (B, C, ...), or (B, 2C, ...) with a learned variance.
            timestep: Timestep of the evaluation, which has no effect: the evaluations follow each other.
            sample: Current sample, (B, C, ...).
            return_dict: Whether to return a `SchedulerOutput`, or the tuple of its fields.

        Returns:
            The next sample and the predicted clean sample, both (B, C, ...).

        Raises:
            InputError: If timesteps are not set, the Runge-Kutta steps are missing, or no evaluation is left.
        """
        self._require_timesteps()
        first = self._runge_kutta_count
        if len(self._epsilons) < first // 4:
            raise InputError(f"step_plms was called before the Runge-Kutta steps: expected {first} calls of step_prk")
        index = max(self._step_index or 0, first)
        if index >= len(self._evaluations):
            raise InputError("step_plms was called after the last step: call set_timesteps to start again")
        if (self._step_index or 0) < first:
            self._step_start = None  # an unfinished Runge-Kutta step is left
        return self._step_at(index, model_output, sample, return_dict)

    def _one_per_step(self, timesteps: Any) -> Any:
        return without_repetitions(timesteps)

    def _runge_kutta(self, stage: int, epsilon: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sample to start from and the noise to step with, at one stage of a Runge-Kutta step."""
        if stage == 0 or self._step_start is None:
            self._epsilons = [epsilon, *self._epsilons][:4]
            self._step_start, self._epsilon_sum = sample, 0.0
        start, self._epsilon_sum = self._step_start, self._epsilon_sum + _RUNGE_KUTTA[stage] * epsilon
        if stage < 3:
            return start, epsilon
        self._step_start = None
        return start, self._epsilon_sum

    def _multistep(self, evaluation: Evaluation, epsilon: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sample to start from and the noise to step with, in a multistep step."""
        if evaluation.repeats_step and self._step_start is not None:
            start, self._step_start = self._step_start, None
            return start, (epsilon + self._epsilons[0]) / 2
        self._epsilons, self._step_start = [epsilon, *self._epsilons][:4], sample
        coefficients = _ADAMS_BASHFORTH[len(self._epsilons) - 1]
        combined = coefficients[0] * epsilon
        for coefficient, past_epsilon in zip(coefficients[1:], self._epsilons[1:], strict=True):
            combined = combined + coefficient * past_epsilon
        return sample, combined

    def _transfer(self, sample: Tensor, epsilon: Tensor, start: int, end: int) -> Tensor:
        """Return the sample at timestep `end`: DDIM's formula for this prediction of the noise (equation 11)."""
        alpha_bar, alpha_bar_end = float(self._alpha_bar(start)), float(self._alpha_bar(end))
        sample_scale = (alpha_bar_end / alpha_bar) ** 0.5
        epsilon_scale = (1 - alpha_bar_end) ** 0.5 - ((1 - alpha_bar) * alpha_bar_end / alpha_bar) ** 0.5
        return sample_scale * sample + epsilon_scale * epsilon
