"""Methods of second order with two network calls a step: Heun's (Karras et al. 2022, algorithm 1,
https://arxiv.org/abs/2206.00364) and the midpoint method in log sigma (DPM-Solver-2: Lu et al. 2022,
https://arxiv.org/abs/2206.00927)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kandinsky22.schedulers.base import Floats, SchedulerOutput
from kandinsky22.schedulers.config import ClipConfig, GridConfig, SpacingConfig, TableConfig
from kandinsky22.schedulers.sigmas import ExplodingScheduler, timesteps_of, widened


@dataclasses.dataclass(frozen=True)
class TwoStageConfig(GridConfig, SpacingConfig, TableConfig):
    """What both methods can be set to."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    timestep_spacing: str = "linspace"


class TwoStageScheduler(ExplodingScheduler):
    """Common ground: `timesteps` holds two visits a step, but one for the last step, which goes to no noise."""

    order = 2

    def _restart(self) -> None:
        super()._restart()
        self._stage: tuple[Tensor, Tensor] | None = None  # where the step began, and its first derivative

    def _finish(self, first: Tensor, second: Tensor) -> Tensor:
        """The derivative of a whole step."""
        raise NotImplementedError

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """The sample for the next visit, and the predicted clean sample; both shaped as `sample` (B, C, ...). Raises
        InputError for timesteps that are not visited, and shapes that do not fit."""
        place = self._locate(timestep)
        level, end = self._levels[place : place + 2]
        sample = widened(sample)
        prediction, _ = self._split(model_output, sample)
        original = self._clean(prediction, sample, level)
        slope = (sample - original) / level
        if place % 2 == 0 or self._stage is None:
            self._stage = sample, slope
        else:
            level, (sample, first) = self._levels[place - 1], self._stage
            slope, self._stage = self._finish(first, slope), None
        self._place = place + 1
        return self._result(sample + slope * (end - level), original, model_output, return_dict)

    def _visit(self, levels: Floats, final: list[float], timesteps: Floats, device: torch.device | str | None) -> None:
        between, times = self._between(levels[:-1], levels[1:], timesteps[1:])
        visits = np.concatenate([levels[:1], np.stack([between, levels[1:]], 1).ravel()])
        times = np.concatenate([timesteps[:1], np.stack([times, timesteps[1:]], 1).ravel()])
        super()._visit(visits, final, times, device)
        self.num_inference_steps = len(levels)

    def _between(self, starts: Floats, ends: Floats, timesteps: Floats) -> tuple[Floats, Floats]:
        """Levels and timesteps of the second visits of steps; `timesteps` are those of the ends."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class HeunConfig(ClipConfig, TwoStageConfig):
    """Settings of `HeunDiscreteScheduler`."""

    owner: ClassVar[str] = "HeunDiscreteScheduler"
    choices: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        **TableConfig.choices,
        "beta_schedule": (*TableConfig.choices["beta_schedule"], "exp"),
    }

    clip_sample: bool = False


class HeunDiscreteScheduler(TwoStageScheduler):
    """Each step with the mean of the derivatives at its two ends; settings are the fields of `HeunConfig`. A variance
    that the network learned is dropped."""

    config_class = HeunConfig
    config: HeunConfig

    def _between(self, starts: Floats, ends: Floats, timesteps: Floats) -> tuple[Floats, Floats]:
        return ends, timesteps

    def _finish(self, first: Tensor, second: Tensor) -> Tensor:
        return (first + second) / 2


@dataclasses.dataclass(frozen=True)
class KDPM2Config(TwoStageConfig):
    """Settings of `KDPM2DiscreteScheduler`."""

    owner: ClassVar[str] = "KDPM2DiscreteScheduler"


class KDPM2DiscreteScheduler(TwoStageScheduler):
    """Each step with the derivative at its geometric middle; settings are the fields of `KDPM2Config`. A variance that
    the network learned is dropped."""

    config_class = KDPM2Config
    config: KDPM2Config

    def _timesteps_of(self, levels: Floats, spread: str) -> Floats:
        found = super()._timesteps_of(levels, spread)
        return found.round() if spread == "use_karras_sigmas" else found

    def _between(self, starts: Floats, ends: Floats, timesteps: Floats) -> tuple[Floats, Floats]:
        middle = np.sqrt(starts.astype(np.float64) * ends)
        return middle, timesteps_of(middle, self._table)

    def _finish(self, first: Tensor, second: Tensor) -> Tensor:
        return second
