"""Euler's method along the noise level: deterministic, with noise churned in, or ancestral (Karras et al. 2022,
algorithm 2, https://arxiv.org/abs/2206.00364)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.noise import Generators, randn_tensor
from kandinsky22.schedulers.base import Floats, SchedulerOutput
from kandinsky22.schedulers.config import GridConfig, SpacingConfig, TableConfig, TerminalConfig
from kandinsky22.schedulers.sigmas import ExplodingScheduler, widened


@dataclasses.dataclass(frozen=True)
class EulerConfig(GridConfig, SpacingConfig, TerminalConfig, TableConfig):
    """Settings of `EulerDiscreteScheduler`.

    With `interpolation_type` `log_linear` the levels are even in log sigma over the whole of training's, whatever the
    timesteps, and the last step ends at the lowest. With `timestep_type` `continuous` networks that predict v are shown
    log(sigma) / 4 for the timestep. `sigma_min` and `sigma_max` bound levels that are spread, `final_sigmas_type` says
    where the last step ends: at no noise or at the lowest level of training.
    """

    owner: ClassVar[str] = "EulerDiscreteScheduler"
    choices: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        **TableConfig.choices,
        "interpolation_type": ("linear", "log_linear"),
        "timestep_type": ("discrete", "continuous"),
    }

    timestep_spacing: str = "linspace"
    interpolation_type: str = "linear"
    timestep_type: str = "discrete"
    final_sigmas_type: str = "zero"
    sigma_min: float | None = None
    sigma_max: float | None = None


class EulerDiscreteScheduler(ExplodingScheduler):
    """Euler's method; settings are the fields of `EulerConfig`. A variance that the network learned is dropped."""

    config_class = EulerConfig
    config: EulerConfig

    def _choose(self, num_inference_steps: int | None, timesteps: Sequence[int] | Tensor | None) -> list[Any]:
        if timesteps is not None and self._shows_levels():
            raise InputError("timesteps given, but the config has timestep_type='continuous'; accepted: sigmas")
        return super()._choose(num_inference_steps, timesteps)

    def _shows_levels(self) -> bool:
        return self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction"

    def _interpolated(self, timesteps: Floats) -> Floats:
        if self.config.interpolation_type == "linear":
            return super()._interpolated(timesteps)
        first, last = np.log(self._table[-1]), np.log(self._table[0])
        return torch.linspace(float(first), float(last), len(timesteps) + 1).exp().numpy()

    def _visit(self, levels: Floats, final: list[float], timesteps: Floats, device: torch.device | str | None) -> None:
        if len(levels) > len(timesteps):
            final = []  # log-linear levels bring their own
        if self._shows_levels():
            timesteps = 0.25 * np.log(levels[: len(timesteps)].astype(np.float32))
        super()._visit(levels, final, timesteps, device)

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
        """The sample at the next level, and the predicted clean sample; both shaped as `sample` (B, C, ...).

        `s_churn` noise (over all steps, in parts of the level), of deviation `s_noise` and drawn from `generator`, is
        added before steps from levels between `s_tmin` and `s_tmax`. Raises InputError for timesteps that are not
        visited, and shapes that do not fit.
        """
        place = self._locate(timestep)
        level, end = self._levels[place : place + 2]
        sample = widened(sample)
        prediction, _ = self._split(model_output, sample)
        churn = min(s_churn / len(self._order), math.sqrt(2) - 1) if s_tmin <= level <= s_tmax else 0.0
        start = level * (1 + churn)
        if churn > 0:
            noise = randn_tensor(prediction.shape, generator, prediction.device, prediction.dtype)
            sample = sample + noise * (s_noise * math.sqrt(start**2 - level**2))
        original = self._clean(prediction, sample, start)
        self._place = place + 1
        previous = original + (sample - original) * (end / start)
        return self._result(previous, original, model_output, return_dict)


@dataclasses.dataclass(frozen=True)
class EulerAncestralConfig(SpacingConfig, TerminalConfig, TableConfig):
    """Settings of `EulerAncestralDiscreteScheduler`."""

    owner: ClassVar[str] = "EulerAncestralDiscreteScheduler"

    timestep_spacing: str = "linspace"


class EulerAncestralDiscreteScheduler(ExplodingScheduler):
    """Euler's method below the next level, and fresh noise up to it, so that each step has the variance of ancestral
    sampling; settings are the fields of `EulerAncestralConfig`. A variance that the network learned is dropped."""

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
        """The sample at the next level, and the predicted clean sample; both shaped as `sample` (B, C, ...).

        Noise is drawn from `generator` (one, or one a sample) at every step. Raises InputError for timesteps that are
        not visited, and shapes that do not fit.
        """
        place = self._locate(timestep)
        level, end = self._levels[place : place + 2]
        sample = widened(sample)
        prediction, _ = self._split(model_output, sample)
        original = self._clean(prediction, sample, level)
        # Rescaled to pure noise at the end, a table may have the timestep before it noisier.
        fresh = end * math.sqrt(max(level**2 - end**2, 0)) / level
        noise = randn_tensor(prediction.shape, generator, prediction.device, prediction.dtype)
        self._place = place + 1
        previous = original + (sample - original) * (end**2 / level**2) + noise * fresh
        return self._result(previous, original, model_output, return_dict)
