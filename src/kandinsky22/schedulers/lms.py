"""LMS: linear multistep, the Adams-Bashforth method in sigma with coefficients for uneven steps.

Source: Hairer et al. 1993, "Solving Ordinary Differential Equations I", chapter III.5.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.schedulers.base import SchedulerOutput
from kandinsky22.schedulers.config import (
    BETA_ARGUMENTS,
    SIGMA_ARGUMENTS,
    BetaScheduleConfig,
    SigmaScheduleConfig,
    TimestepSpacingConfig,
    as_int,
)
from kandinsky22.schedulers.exponential_integrator import quadrature_weights
from kandinsky22.schedulers.sigmas import VarianceExplodingScheduler, to_float32


@dataclasses.dataclass(frozen=True)
class LMSConfig(SigmaScheduleConfig, TimestepSpacingConfig, BetaScheduleConfig):
    """Settings of `LMSDiscreteScheduler`."""

    owner: ClassVar[str] = "LMSDiscreteScheduler"
    positional: ClassVar[tuple[str, ...]] = (
        *BETA_ARGUMENTS,
        *SIGMA_ARGUMENTS,
        "prediction_type",
        "timestep_spacing",
        "steps_offset",
    )

    timestep_spacing: str = "linspace"


class LMSDiscreteScheduler(VarianceExplodingScheduler):
    """Linear multistep on the ODE dx/dsigma = (x - D(x; sigma)) / sigma, one network evaluation per step.

    Source of the ODE: Karras et al. 2022, equations 1 and 3, https://arxiv.org/abs/2206.00364.

    A learned variance is dropped.

    Args:
        **settings: Settings, see `LMSConfig`.
    """

    config_class = LMSConfig
    config: LMSConfig

    def _reset(self) -> None:
        super()._reset()
        self._derivatives: list[Tensor] = []  # of the last steps, newest first

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        order: int = 4,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Return the sample at the next sigma: the integral of the polynomial through the last derivatives.

        Args:
            model_output: Network output for the scaled sample, (B, C, ...), or (B, 2C, ...) with a learned variance.
            timestep: Current timestep, an element of `timesteps`.
            sample: Current sample x_0 + sigma epsilon, (B, C, ...).
            order: Largest number of derivatives used, 1 or more.
            return_dict: Whether to return a `SchedulerOutput`, or the tuple of its fields.

        Returns:
            The next sample and the predicted clean sample, both (B, C, ...).

        Raises:
            InputError: If timesteps are not set, or an argument is invalid.
        """
        max_order = as_int(order)
        if max_order is None or max_order < 1:
            raise invalid("order", order, "an integer above 0")
        index = self._index_for_timestep(timestep)
        sigma, sigma_next = self._sigma_list[index : index + 2]
        sample = to_float32(sample)
        denoised = self._denoised(self._split_output(model_output, sample).prediction, sample, sigma)
        self._derivatives = [(sample - denoised) / sigma, *self._derivatives][:max_order]
        length = sigma_next - sigma
        if length == 0:  # a last step without length
            self._step_index = index + 1
            return self._output(sample.to(model_output.dtype), denoised, return_dict)
        nodes = [(self._sigma_list[index - back] - sigma) / length for back in range(len(self._derivatives))]
        weights = quadrature_weights(nodes, [1 / (k + 1) for k in range(len(nodes))])  # integrals of u^k over the step
        prev_sample = sample
        for weight, derivative in zip(weights, self._derivatives, strict=True):
            prev_sample = prev_sample + (length * weight) * derivative
        self._step_index = index + 1
        return self._output(prev_sample.to(model_output.dtype), denoised, return_dict)
